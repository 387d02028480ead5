"""Experts, projections and dense layers in e4m3: in plain torch, what the GPU's products must equal.

Legend of shapes: N rows, K top-k, E experts held, H hidden, I intermediate, O and X rows and columns of a weight.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afd_ray.handoff.quantise import BLOCK, LARGEST, quantise
from afd_ray.models.layout import STACKED_EXPERTS, Unallocated
from afd_ray.models.step3 import AttentionLayer, DenseFFN, Experts, FFNLayer, Linear

QUANTISED_STACKS = tuple(name.replace("_proj", "_scales") for name in STACKED_EXPERTS)
"""Of a layer with QuantisedExperts, beside the weights': one matrix of scales for each expert held."""


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "wq", "o_proj")
"""Of attention."""


def quantise_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[O, X] to e4m3 [O, X] and float32 scales [O / 128, X / 128], rounded up, by which blocks of 128 x 128 are to be multiplied.

    The largest of each block becomes 448, as DeepSeek-V3's weights have it.
    """
    rows, columns = weight.shape
    padded = F.pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.view(len(padded) // BLOCK, BLOCK, -1, BLOCK)
    scales = blocks.abs().amax((1, 3)).clamp_(min=torch.finfo(torch.float32).tiny * LARGEST) / LARGEST
    values = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    return values.view(padded.shape)[:rows, :columns].contiguous(), scales


def dequantise_weight(values: Tensor, scales: Tensor) -> Tensor:
    """What `quantise_weight` gave back into float32 [O, X]."""
    rows, columns = values.shape
    return values.float() * scales.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]


class QuantisedLinear(Linear):
    """`Linear` in e4m3, a float32 scale for each block of 128 x 128; rows too are quantised."""

    scales: nn.Parameter  # [out / 128, in / 128], rounded up

    def __init__(self, out_features: int, in_features: int) -> None:
        """Raises ValueError where out_features are no multiple of 64, in_features of 128."""
        nn.Module.__init__(self)
        if out_features % (BLOCK // 2) or in_features % BLOCK:
            raise ValueError(
                f"attention.projection_dtype: fp8 needs projections whose outputs are multiples of {BLOCK // 2} and whose inputs "
                f"are multiples of {BLOCK}, got {out_features} and {in_features}"
            )
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=torch.float8_e4m3fn), requires_grad=False)
        shape = -(-out_features // BLOCK), in_features // BLOCK
        self.scales = nn.Parameter(torch.empty(shape), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(_rounded(x), dequantise_weight(self.weight, self.scales)).to(x.dtype)


class QuantisedExperts(Experts):
    """`Experts` in e4m3, a float32 scale for each block of 128 x 128; rows too are quantised, on their way in and between the products."""

    gate_scales: nn.Parameter  # [E, I / 128, H / 128]
    up_scales: nn.Parameter
    down_scales: nn.Parameter  # [E, H / 128, I / 128]

    def __init__(self, experts: int, hidden: int, intermediate: int) -> None:
        """Raises ValueError where hidden or intermediate are no multiples of 128."""
        nn.Module.__init__(self)  # not that of the experts it is made from, which would allocate their weights
        if hidden % BLOCK or intermediate % BLOCK:
            raise ValueError(self._needs(hidden, intermediate))
        for name in ("gate", "up", "down"):
            shape = (hidden, intermediate) if name == "down" else (intermediate, hidden)
            values = torch.empty(experts, *shape, dtype=torch.float8_e4m3fn)
            scales = torch.empty(experts, *(size // BLOCK for size in shape))
            self.register_parameter(f"{name}_proj", nn.Parameter(values, requires_grad=False))
            self.register_parameter(f"{name}_scales", nn.Parameter(scales, requires_grad=False))

    @staticmethod
    def _needs(hidden: int, intermediate: int) -> str:
        return (
            f"ffn.expert_dtype: fp8 needs hidden_size and what one rank holds of moe_intermediate_size "
            f"to be multiples of {BLOCK}, got {hidden} and {intermediate}"
        )

    def forward(self, x: Tensor, local: Tensor, weights: Tensor) -> Tensor:
        """As `Experts.forward`."""
        rows, out = _rounded(x), torch.zeros_like(x)
        for expert in range(len(self.gate_proj)):
            taken, slots = (local == expert).nonzero(as_tuple=True)
            if taken.numel():
                gate, up, down = (self._weight(name, expert) for name in ("gate", "up", "down"))
                inner = F.silu(rows[taken] @ gate.T) * (rows[taken] @ up.T)
                y = _rounded(inner) @ down.T
                out = out.index_add(0, taken, (y * weights[taken, slots, None]).to(x.dtype))
        return out

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        """Values and scales of "gate", "up" or "down"."""
        return getattr(self, f"{name}_proj"), getattr(self, f"{name}_scales")

    def _weight(self, name: str, expert: int) -> Tensor:
        values, scales = self.pair(name)
        return dequantise_weight(values[expert], scales[expert])


class QuantisedDense(nn.Module):
    """`DenseFFN` in e4m3: one expert that takes every row. Its width is filled up with zeros to a multiple of 128."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        """Raises ValueError where hidden is no multiple of 128."""
        super().__init__()
        if hidden % BLOCK:
            raise ValueError(f"ffn.dense_dtype: fp8 needs hidden_size to be a multiple of {BLOCK}, got {hidden}")
        self.expert = QuantisedExperts(1, hidden, -(-intermediate // BLOCK) * BLOCK)

    def forward(self, x: Tensor) -> Tensor:
        every = torch.zeros(len(x), 1, dtype=torch.int64, device=x.device)
        rows: Tensor = self.expert(x, every, torch.ones_like(every, dtype=x.dtype))
        return rows


def quantised_linear(plain: Linear, device: torch.device | None = None) -> QuantisedLinear:
    """As `quantised`."""
    with Unallocated():
        linear = QuantisedLinear(*plain.weight.shape)
    values, scales = quantise_weight(plain.weight.to(device or plain.weight.device))
    linear.load_state_dict({"weight": values, "scales": scales}, assign=True)
    return linear.requires_grad_(False)


def quantised_dense(plain: DenseFFN, device: torch.device | None = None) -> QuantisedDense:
    """As `quantised`."""
    width, hidden = plain.gate_proj.weight.shape
    missing = -width % BLOCK
    with Unallocated():
        dense, one = QuantisedDense(hidden, width), Experts(1, hidden, width + missing)
    padded = {
        "gate_proj": F.pad(plain.gate_proj.weight, (0, 0, 0, missing))[None],
        "up_proj": F.pad(plain.up_proj.weight, (0, 0, 0, missing))[None],
        "down_proj": F.pad(plain.down_proj.weight, (0, missing))[None],
    }
    one.load_state_dict(padded, assign=True)
    dense.expert = quantised(one, device)
    return dense


def quantise_attention(layer: AttentionLayer, device: torch.device | None = None) -> None:
    """Its projections, in place; those that are quantised already stay."""
    for name in PROJECTIONS:
        plain = getattr(layer.self_attn, name)
        if not isinstance(plain, QuantisedLinear):
            setattr(layer.self_attn, name, quantised_linear(plain, device))


def quantise_experts(layer: FFNLayer, device: torch.device | None = None) -> None:
    """Its routed experts, in place, unless they are quantised already."""
    if layer.moe is not None and not isinstance(layer.moe, QuantisedExperts):
        layer.moe = quantised(layer.moe, device)


def quantise_dense(layer: AttentionLayer | FFNLayer, device: torch.device | None = None) -> None:
    """Its shared expert, or itself where it is dense, in place, unless that is quantised already."""
    for name in ("share_expert", "mlp"):
        plain = getattr(layer, name, None)
        if isinstance(plain, DenseFFN):
            setattr(layer, name, quantised_dense(plain, device))


def quantised(plain: Experts, device: torch.device | None = None) -> QuantisedExperts:
    """The same experts in e4m3, on `device` or where they are; no more than one weight is there in both forms at a time."""
    count, inner, hidden = plain.gate_proj.shape
    with Unallocated():
        experts = QuantisedExperts(count, hidden, inner)
    tensors: dict[str, Tensor] = {}
    for name in ("gate", "up", "down"):
        stack = getattr(plain, f"{name}_proj")
        values, scales = (torch.empty_like(parameter, device=device or stack.device) for parameter in experts.pair(name))
        for expert, weight in enumerate(stack):
            values[expert], scales[expert] = quantise_weight(weight.to(values.device))
        tensors |= {f"{name}_proj": values, f"{name}_scales": scales}
    experts.load_state_dict(tensors, assign=True)
    return experts.requires_grad_(False)


def _rounded(rows: Tensor) -> Tensor:
    """As rows are after they were e4m3, float32; on any device."""
    values, exponents = quantise(rows)
    scales = (exponents.int() << 23).view(torch.float32)
    return values.float() * scales.repeat_interleave(BLOCK, 1)[:, : rows.shape[1]]
