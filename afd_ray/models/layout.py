"""Names and shapes: which tensor of a checkpoint is which parameter of which half, and how much of it there is."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from afd_ray.models.config import ModelConfig
from afd_ray.models.step3 import AttentionHalf, FFNHalf, FFNShard

Part = Literal["embedding", "lm_head", "norms", "attention", "router", "experts", "shared", "dense"]
ATTENTION_PARTS: tuple[Part, ...] = ("embedding", "lm_head", "norms", "attention", "router")
FFN_PARTS: tuple[Part, ...] = ("experts", "shared", "dense")

STACKED_EXPERTS = ("moe.gate_proj", "moe.up_proj", "moe.down_proj")
"""Parameters of a layer with one matrix for each expert held."""
_SCALES = "weight_scale_inv"
_ENDINGS = {".scales": f".{_SCALES}"}
for _name in ("gate", "up", "down"):
    _ENDINGS |= {f".{_name}_proj": f".{_name}_proj.weight", f".{_name}_scales": f".{_name}_proj.{_SCALES}"}
_VISION = ("vision_model.", "vit_downsampler", "vit_large_projector", "model.vision_model.", "model.vit_")
_TEXT_PREFIXES = (("model.language_model.", "model."), ("language_model.", ""))


def file_key(parameter: str) -> str:
    """The checkpoint's name of a parameter of AttentionHalf or FFNHalf: experts are stacked parameters here, `.weight`s there.

    >>> file_key("layers.1.moe.up_proj"), file_key("layers.0.mlp.expert.up_scales"), file_key("layers.0.self_attn.wq.scales")
    ('model.layers.1.moe.up_proj.weight', 'model.layers.0.mlp.up_proj.weight_scale_inv', 'model.layers.0.self_attn.wq.weight_scale_inv')
    """
    if parameter.startswith("lm_head."):
        return parameter
    name = parameter.replace(".expert.", ".")
    for ending, replacement in _ENDINGS.items():
        if name.endswith(ending):
            return f"model.{name.removesuffix(ending)}{replacement}"
    return f"model.{name}"


def text_key(key: str) -> str | None:
    """A checkpoint's key as a text model's; None for a tensor of the vision part."""
    if key.startswith(_VISION):
        return None
    for prefix, replacement in _TEXT_PREFIXES:
        if key.startswith(prefix):
            return replacement + key.removeprefix(prefix)
    return key


def part_of(key: str) -> Part:
    """The part of the model that a checkpoint key belongs to."""
    if key.startswith("model.embed_tokens."):
        return "embedding"
    if key.startswith("lm_head."):
        return "lm_head"
    if "norm." in key or "layernorm." in key:
        return "norms"
    if ".self_attn." in key:
        return "attention"
    if ".moe.gate." in key:
        return "router"
    if ".moe." in key:
        return "experts"
    return "shared" if ".share_expert." in key else "dense"


class Unallocated(TorchFunctionMode):
    """Modules built under this have parameters without memory: `torch.empty` is on the meta device, initialisation is skipped.

    Everything else stays real, unlike under `torch.device("meta")`, which also costs seconds and 70 MB of imports at its first use.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        elif getattr(func, "__name__", "") == "normal_":
            return kwargs.get("tensor", args[0] if args else None)
        return func(*args, **kwargs)


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint of this shape, by key, in the order of the layers."""
    with Unallocated():
        halves: tuple[nn.Module, ...] = (AttentionHalf(config), FFNHalf(config, FFNShard.whole(config)))
    shapes = {file_key(name): tuple(p.shape) for half in halves for name, p in half.named_parameters()}
    return dict(sorted(shapes.items(), key=lambda item: _order(item[0])))


def _order(key: str) -> tuple[int, int]:
    if key.startswith("model.layers."):
        return 1, int(key.split(".")[2])
    return (0 if key.startswith("model.embed_tokens.") else 2), 0


class ParameterCounts(NamedTuple):
    """How many weights a model has, and how many of them one token uses."""

    parts: dict[Part, int]
    attention_per_layer: int
    expert: int
    """One routed expert."""
    dense_per_layer: int
    activated: int
    """For each token, in attention and FFN (without embedding, head, router and norms)."""

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def attention_side(self) -> int:
        return self._sum(ATTENTION_PARTS)

    @property
    def ffn_side(self) -> int:
        return self._sum(FFN_PARTS)

    def _sum(self, parts: Iterable[Part]) -> int:
        return sum(self.parts.get(part, 0) for part in parts)


def count_parameters(config: ModelConfig) -> ParameterCounts:
    """From the shape alone: nothing is allocated."""
    parts: Counter[Part] = Counter()
    for key, shape in expected_shapes(config).items():
        parts[part_of(key)] += elements(shape)
    experts_used = parts["experts"] * config.moe_top_k // config.moe_num_experts
    moe_layers = len(config.moe_layers)
    return ParameterCounts(
        parts=dict(parts),
        attention_per_layer=parts["attention"] // config.num_hidden_layers,
        expert=parts["experts"] // max(1, moe_layers * config.moe_num_experts),
        dense_per_layer=parts["dense"] // max(1, config.num_hidden_layers - moe_layers),
        activated=parts["attention"] + experts_used + parts["shared"] + parts["dense"],
    )


def elements(shape: Iterable[int]) -> int:
    """The number of values in a tensor of this shape."""
    count = 1
    for size in shape:
        count *= size
    return count
