"""Routed experts in e4m3, quantised from the checkpoint's weights: in plain torch, what the GPU's products must equal.

Legend of shapes: N rows, K top-k, E experts held, H hidden, I intermediate, O and X rows and columns of a weight.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afd_ray.handoff.quantise import BLOCK, LARGEST, dequantise, quantise
from afd_ray.models.layout import STACKED_EXPERTS, Unallocated
from afd_ray.models.step3 import Experts

QUANTISED_STACKS = tuple(name.replace("_proj", "_scales") for name in STACKED_EXPERTS)
"""Of a layer with QuantisedExperts, beside the weights': one matrix of scales for each expert held."""


def quantise_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[O, X], multiples of 128, to e4m3 [O, X] and float32 scales [O / 128, X / 128], by which blocks of 128 x 128 are to be multiplied.

    The largest of each block becomes 448, as DeepSeek-V3's weights have it.
    """
    rows, columns = weight.shape
    blocks = weight.float().view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    scales = blocks.abs().amax((1, 3)).clamp_(min=torch.finfo(torch.float32).tiny * LARGEST) / LARGEST
    values = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    return values.view(weight.shape), scales


def dequantise_weight(values: Tensor, scales: Tensor) -> Tensor:
    """What `quantise_weight` gave back into float32 [O, X]."""
    return values.float() * scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)


class QuantisedExperts(Experts):
    """`Experts` in e4m3, a float32 scale for each block of 128 x 128; rows too are quantised, on their way in and between the products."""

    gate_scales: nn.Parameter  # [E, I / 128, H / 128]
    up_scales: nn.Parameter
    down_scales: nn.Parameter  # [E, H / 128, I / 128]

    def __init__(self, experts: int, hidden: int, intermediate: int) -> None:
        """Raises ValueError where hidden or intermediate are no multiples of 128."""
        nn.Module.__init__(self)  # not that of the experts it is made from, which would allocate their weights
        if hidden % BLOCK or intermediate % BLOCK:
            raise ValueError(
                f"ffn.expert_dtype: fp8 needs hidden_size and what one rank holds of moe_intermediate_size "
                f"to be multiples of {BLOCK}, got {hidden} and {intermediate}"
            )
        for name in ("gate", "up", "down"):
            shape = (hidden, intermediate) if name == "down" else (intermediate, hidden)
            values = torch.empty(experts, *shape, dtype=torch.float8_e4m3fn)
            scales = torch.empty(experts, *(size // BLOCK for size in shape))
            self.register_parameter(f"{name}_proj", nn.Parameter(values, requires_grad=False))
            self.register_parameter(f"{name}_scales", nn.Parameter(scales, requires_grad=False))

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
    """As rows are after they were e4m3, float32."""
    return dequantise(*quantise(rows), torch.float32)
