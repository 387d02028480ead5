"""Weights in e4m3 as checkpoints have them: `X.weight` with a float32 `X.weight_scale_inv` for each block of 128 x 128, by which it is multiplied.

DeepSeek-V3's layout, and that of Step-3 in FP8. Beside them `self_attn.k_scale` and `self_attn.v_scale`, of keys and values in e4m3.

Legend of shapes: E experts, O and X rows and columns of a weight.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from afd_ray.handoff.quantise import BLOCK
from afd_ray.kernels.quantised import PROJECTIONS, QuantisedDense, QuantisedExperts, QuantisedLinear, quantise_weight
from afd_ray.models.layout import Part, Unallocated, file_key, part_of
from afd_ray.models.shards import DTYPE_NAMES, E4M3_NAME, StoredTensor
from afd_ray.models.step3 import AttentionHalf, Experts, FFNHalf, FFNShard, Slice

SCALES = "_scale_inv"
NARROW_PARTS: frozenset[Part] = frozenset(("attention", "experts", "shared", "dense"))
"""What may be in e4m3; embedding, head, router and norms may not."""
_CACHE_SCALES = ("k_scale", "v_scale")

Tensors = Mapping[str, StoredTensor]


def cache_scale_keys(layer: int) -> tuple[str, str]:
    """Of a layer's keys and of its values."""
    key, value = (f"model.layers.{layer}.self_attn.{name}" for name in _CACHE_SCALES)
    return key, value


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of the scales of a weight [..., O, X].

    >>> scale_shape((48, 5120, 7168)), scale_shape((576, 130))
    ((48, 40, 56), (5, 2))
    """
    *stacked, rows, columns = shape
    return (*stacked, -(-rows // BLOCK), -(-columns // BLOCK))


def findings(tensors: Tensors, layers: int, is_scaled: bool) -> Iterator[str]:
    """What is wrong with weights in e4m3 and with scales; `is_scaled`: config.json says that there are such."""
    for key, stored in tensors.items():
        if stored.dtype == E4M3_NAME:
            yield from _weight_findings(key, stored, tensors.get(key + SCALES), is_scaled)
    for layer in range(layers):
        for key in cache_scale_keys(layer):
            stored_scale = tensors.get(key)
            if stored_scale is not None and (stored_scale.shape not in ((), (1,)) or stored_scale.dtype not in DTYPE_NAMES):
                dtypes = " or ".join(DTYPE_NAMES)
                yield f"{key}: must be one number in {dtypes}, got {list(stored_scale.shape)} in {stored_scale.dtype}"


def _weight_findings(key: str, stored: StoredTensor, scales: StoredTensor | None, is_scaled: bool) -> Iterator[str]:
    if not is_scaled:
        yield f"{key}: is in {stored.dtype}, but config.json has no quantization_config"
    if part_of(key) not in NARROW_PARTS or len(stored.shape) < 2:
        yield f"{key}: dtype must be one of {', '.join(DTYPE_NAMES)}, got {stored.dtype}"
        return
    wanted = scale_shape(stored.shape)
    if scales is None:
        yield f"{key}{SCALES}: missing, {key} is in {stored.dtype}"
    elif scales.shape != wanted or scales.dtype not in DTYPE_NAMES:
        dtypes = " or ".join(DTYPE_NAMES)
        yield f"{key}{SCALES}: must be {list(wanted)} in {dtypes}, got {list(scales.shape)} in {scales.dtype}"


def belongs(key: str, tensors: Tensors, layers: int) -> bool:
    """Whether a tensor that is no parameter is a scale of something that is there."""
    weight = tensors.get(key.removesuffix(SCALES))
    if key.endswith(SCALES) and weight is not None:
        return weight.dtype == E4M3_NAME
    return key.endswith(_CACHE_SCALES) and any(key in cache_scale_keys(layer) for layer in range(layers))


def spread(scales: Tensor, slices: tuple[slice, ...], shape: tuple[int, ...]) -> Tensor:
    """Scales [..., O / 128, X / 128] over the values of a slice of weights [..., O, X], wherever it cuts the blocks."""
    for dimension, (cut, size) in enumerate(zip(slices[-2:], shape[-2:], strict=True), start=-2):
        blocks = torch.arange(size)[cut] // BLOCK
        scales = scales.index_select(dimension, blocks)
    return scales


def keep_as_stored(half: nn.Module, tensors: Tensors, keep: frozenset[Part], shard: FFNShard | None) -> None:
    """Of a half that is built `Unallocated`: what `keep` names becomes e4m3, where the files have it so and no slice cuts a block.

    Raises ValueError where e4m3 is not possible for the shape.
    """
    with Unallocated():
        if isinstance(half, AttentionHalf):
            for index in range(half.config.num_hidden_layers):
                layer = half.layer(index)
                if "attention" in keep:
                    _keep_projections(layer.self_attn, f"layers.{index}.self_attn", tensors)
                if "shared" in keep:
                    _keep_dense(layer, "share_expert", f"layers.{index}", tensors, Slice())
        elif isinstance(half, FFNHalf):
            for index, ffn in enumerate(half.layers):
                assert shard is not None
                if "experts" in keep:
                    _keep_experts(ffn, f"layers.{index}.moe", tensors, shard.routed)
                for part, name in (("shared", "share_expert"), ("dense", "mlp")):
                    if part in keep:
                        _keep_dense(ffn, name, f"layers.{index}", tensors, shard.dense)


def _keep_projections(attention: nn.Module, prefix: str, tensors: Tensors) -> None:
    for name in PROJECTIONS:
        stored = tensors[file_key(f"{prefix}.{name}.weight")]
        if stored.dtype == E4M3_NAME:
            setattr(attention, name, QuantisedLinear(*stored.shape))


def _keep_experts(layer: nn.Module, prefix: str, tensors: Tensors, part: Slice) -> None:
    moe = layer.moe
    if isinstance(moe, Experts) and (width := _whole_blocks(prefix, tensors, part)):
        layer.moe = QuantisedExperts(len(moe.gate_proj), tensors[f"model.{prefix}.down_proj.weight"].shape[1], width)


def _keep_dense(layer: nn.Module, name: str, prefix: str, tensors: Tensors, part: Slice) -> None:
    if getattr(layer, name, None) is not None and (width := _whole_blocks(f"{prefix}.{name}", tensors, part)):
        setattr(layer, name, QuantisedDense(tensors[f"model.{prefix}.{name}.down_proj.weight"].shape[0], width))


def _whole_blocks(prefix: str, tensors: Tensors, part: Slice) -> int:
    """The width of a slice of weights that are all in e4m3; 0 where they are not, or where it begins or ends inside a block."""
    gate, up, down = (tensors[f"model.{prefix}.{name}_proj.weight"] for name in ("gate", "up", "down"))
    cut = part.of(down.shape[-1])
    is_narrow = all(stored.dtype == E4M3_NAME for stored in (gate, up, down))
    return cut.stop - cut.start if is_narrow and cut.start % BLOCK == cut.stop % BLOCK == 0 else 0


def scaled_tensors(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """A checkpoint's tensors with all weights that may be in e4m3 in it, each followed by its scales."""
    for key, tensor in tensors:
        if part_of(key) not in NARROW_PARTS:
            yield key, tensor
            continue
        pairs = [quantise_weight(weight) for weight in tensor.view(-1, *tensor.shape[-2:])]
        values, scales = (torch.stack([pair[i].view(torch.uint8) if i == 0 else pair[i] for pair in pairs]) for i in (0, 1))
        yield key, values.view(torch.float8_e4m3fn).view(tensor.shape)
        yield key + SCALES, scales.view(scale_shape(tuple(tensor.shape)))
