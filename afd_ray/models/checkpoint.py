"""Reading a checkpoint: each role its own tensors, sliced from the files."""

import hashlib
import json
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from afd_ray.handoff.quantise import BLOCK
from afd_ray.models import scaled
from afd_ray.models.config import DTYPES, ModelConfig
from afd_ray.models.layout import Part, Unallocated, elements, expected_shapes, file_key, part_of, text_key
from afd_ray.models.shards import (
    DTYPE_NAMES,
    E4M3_NAME,
    CheckpointError,
    StoredTensor,
    read_header,
    shard_files,
    write_checkpoint,
)
from afd_ray.models.step3 import AttentionHalf, CacheScales, FFNHalf, FFNShard, Step3Model

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "digest",
    "file_findings",
    "load_attention",
    "load_ffn",
    "load_model",
    "read_ffn",
    "verify",
    "write_checkpoint",
]

Progress = Callable[[int, int], None]
"""Called with values loaded so far and in all."""

_SAMPLED_ABOVE_BYTES = 1 << 16
_SAMPLES = 8
_SAMPLE_BYTES = 256
_VERIFY_VALUES = 1 << 24


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A directory in Hugging Face layout: its shape, and where each tensor lies. No weight has been read."""

    directory: Path
    config: ModelConfig
    tensors: dict[str, StoredTensor]
    """By key of a text model; the vision part is left out."""

    @classmethod
    def open(cls, directory: Path) -> "Checkpoint":
        """Raises CheckpointError in one line for a file that is missing, truncated or corrupt."""
        try:
            config = ModelConfig.from_directory(directory)
        except (ValueError, OSError) as error:
            raise CheckpointError(str(error)) from None
        tensors: dict[str, StoredTensor] = {}
        for file in shard_files(directory):
            for stored in read_header(file):
                key = text_key(stored.key)
                if key in tensors:
                    raise CheckpointError(f"{file}: {stored.key} is also in {tensors[key].file.name}")
                if key is not None:
                    tensors[key] = stored
        return cls(directory, config, tensors)

    def findings(self) -> list[str]:
        """What keeps it from being loaded: tensors missing, left over, of another shape, of a dtype that cannot be read."""
        expected = expected_shapes(self.config)
        found = [f"{key}: missing" for key in expected if key not in self.tensors]
        layers = self.config.num_hidden_layers
        extra = [key for key in self.tensors if key not in expected and not scaled.belongs(key, self.tensors, layers)]
        found += [f"{key}: extra, the model has no such tensor" for key in extra]
        for key, shape in expected.items():
            stored = self.tensors.get(key)
            if stored is None:
                continue
            if stored.shape != shape:
                found.append(f"{key}: shape must be {list(shape)}, got {list(stored.shape)}")
            if stored.dtype not in (*DTYPE_NAMES, E4M3_NAME):
                found.append(f"{key}: dtype must be one of {', '.join(DTYPE_NAMES)}, got {stored.dtype}")
        return found + list(scaled.findings(self.tensors, layers, self.config.scaled))

    def require_sound(self) -> None:
        """Raises CheckpointError with the first finding and the number of the others."""
        found = self.findings()
        if found:
            others = f" (and {len(found) - 1} more: run `afd-ray checkpoint verify`)" if len(found) > 1 else ""
            raise CheckpointError(f"{self.directory}: {found[0]}{others}")


class Read(NamedTuple):
    """One parameter of a module and the part of a stored tensor that fills it."""

    parameter: str
    stored: StoredTensor
    experts: tuple[int, ...] | None
    """Rows of the first dimension, one after the other; None: `slices` speaks of all dimensions."""
    slices: tuple[slice, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    """It is kept in; None: that of the model."""
    scales: StoredTensor | None
    """By which values in e4m3 are multiplied on their way."""


def plan_reads(checkpoint: Checkpoint, half: nn.Module, shard: FFNShard | None = None) -> list[Read]:
    """What to read for `half` (built `Unallocated`): whole tensors, or those slices that `shard` holds."""
    reads = []
    for name, parameter in half.named_parameters():
        key = file_key(name)
        stored = checkpoint.tensors[key]
        experts = shard.experts if shard is not None and part_of(key) == "experts" else None
        slices = [slice(None)] * (len(stored.shape) - (experts is not None))
        is_scales = key.endswith(scaled.SCALES)
        if shard is not None:
            intermediate = -1 if ".down_proj." in key else -2
            part = shard.dense if experts is None else shard.routed
            weight = checkpoint.tensors[key.removesuffix(scaled.SCALES)]
            cut = part.of(weight.shape[intermediate])
            slices[intermediate] = slice(cut.start // BLOCK, cut.stop // BLOCK) if is_scales else cut
        is_kept = is_scales or parameter.dtype == torch.float8_e4m3fn
        dtype = parameter.dtype if is_kept else None
        scales = checkpoint.tensors[key + scaled.SCALES] if stored.dtype == E4M3_NAME and not is_kept else None
        reads.append(Read(name, stored, experts, tuple(slices), tuple(parameter.shape), dtype, scales))
    return reads


def load_attention(
    checkpoint: Checkpoint,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    *,
    shared: bool = False,
    keep: frozenset[Part] = frozenset(),
) -> AttentionHalf:
    """What an attention actor holds, in `dtype` (None: the checkpoint's). Reads nothing of the FFN, or, `shared`, its shared experts alone.

    `keep`: parts that stay in e4m3 where the files have them so.
    """
    checkpoint.require_sound()
    config = _in_dtype(checkpoint.config, dtype)
    with Unallocated():
        half = AttentionHalf(config, shared)
    scaled.keep_as_stored(half, checkpoint.tensors, keep, None)
    _fill(half, plan_reads(checkpoint, half), config.dtype, progress)
    _read_cache_scales(half, checkpoint)
    return half


def load_ffn(
    checkpoint: Checkpoint,
    shard: FFNShard,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    *,
    keep: frozenset[Part] = frozenset(),
) -> FFNHalf:
    """One FFN rank's experts and columns, in `dtype` (None: the checkpoint's). Reads no other bytes.

    `keep`: parts that stay in e4m3 where the files have them so and no slice of this rank cuts a block of 128.
    """
    checkpoint.require_sound()
    half = _ffn(checkpoint, shard, dtype, keep)
    _fill(half, plan_reads(checkpoint, half, shard), half.config.dtype, progress)
    return half


def read_ffn(
    checkpoint: Checkpoint,
    shard: FFNShard,
    dtype: torch.dtype,
    progress: Progress | None = None,
    *,
    dense: bool,
    keep: frozenset[Part] = frozenset(),
) -> FFNHalf:
    """As `load_ffn`; without `dense`, shared experts and dense layers stay unallocated, and nothing is read of them."""
    if dense and shard.experts:
        return load_ffn(checkpoint, shard, dtype, progress, keep=keep)
    half = _ffn(checkpoint, shard, dtype, keep)
    reads = [read for read in plan_reads(checkpoint, half, shard) if (read.experts if read.experts is not None else dense)]
    _fill(half, reads, dtype, progress, whole=False)
    return half


def _ffn(checkpoint: Checkpoint, shard: FFNShard, dtype: torch.dtype | None, keep: frozenset[Part]) -> FFNHalf:
    """Not filled yet."""
    config = _in_dtype(checkpoint.config, dtype)
    _check_shard(shard, config)
    with Unallocated():
        half = FFNHalf(config, shard)
    scaled.keep_as_stored(half, checkpoint.tensors, keep, shard)
    return half


def load_model(checkpoint: Checkpoint, dtype: torch.dtype | None = None, progress: Progress | None = None) -> Step3Model:
    """Both halves in one process: the reference."""
    with Unallocated():
        model = Step3Model(_in_dtype(checkpoint.config, dtype))
    model.attention = load_attention(checkpoint, dtype, progress)
    model.ffn = load_ffn(checkpoint, FFNShard.whole(checkpoint.config), dtype, progress)
    return model.eval()


def _check_shard(shard: FFNShard, config: ModelConfig) -> None:
    outside = next((expert for expert in shard.experts if not 0 <= expert < config.moe_num_experts), None)
    if outside is not None:
        raise ValueError(f"experts: must be from 0 to {config.moe_num_experts - 1}, got {outside}")
    for name, part in (("routed", shard.routed), ("dense", shard.dense)):
        if not 0 <= part.part < part.parts:
            raise ValueError(f"{name}: part must be from 0 to {part.parts - 1}, got {part.part}")


def _in_dtype(config: ModelConfig, dtype: torch.dtype | None) -> ModelConfig:
    return config if dtype is None else replace(config, dtype=dtype)


def _fill(half: nn.Module, reads: list[Read], dtype: torch.dtype, progress: Progress | None, whole: bool = True) -> None:
    total = sum(elements(read.shape) for read in reads)
    done = 0
    state: dict[str, Tensor] = {}
    for read, tensor in _read_all(reads, dtype):
        state[read.parameter] = tensor
        done += tensor.numel()
        if progress is not None:
            progress(done, total)
    half.load_state_dict(state, strict=whole, assign=True)
    half.requires_grad_(False).eval()


def _read_all(reads: list[Read], dtype: torch.dtype) -> Iterator[tuple[Read, Tensor]]:
    """File by file, so that each is mapped once, and unmapped before the next."""
    scales = _read_whole({read.scales for read in reads if read.scales is not None})
    for file in sorted({read.stored.file for read in reads}):
        with _opened(file) as stored:
            for read in reads:
                if read.stored.file == file:
                    by = None if read.scales is None else scales[read.scales]
                    yield read, _read(stored, read, read.dtype or dtype, by)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as stored:
            yield stored
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: {' '.join(str(error).split())}") from None


def _read_whole(tensors: Collection[StoredTensor]) -> dict[StoredTensor, Tensor]:
    """Small ones, in float32."""
    whole: dict[StoredTensor, Tensor] = {}
    for file in sorted({stored.file for stored in tensors}):
        with _opened(file) as held:
            whole |= {stored: held.get_tensor(stored.key).float().clone() for stored in tensors if stored.file == file}
    return whole


def _read(file: Any, read: Read, dtype: torch.dtype, scales: Tensor | None) -> Tensor:
    """Into memory of its own: a tensor that still mapped the file would fault pages in on the hot path."""
    source = file.get_slice(read.stored.key)
    out = torch.empty(read.shape, dtype=dtype)
    if read.experts is None:
        piece = source[read.slices]
        out.view(piece.shape).copy_(piece if scales is None else _times(piece, scales, read))
        return out
    for row, expert in enumerate(read.experts):
        piece = source[(slice(expert, expert + 1), *read.slices)][0]
        out[row].copy_(piece if scales is None else _times(piece, scales[expert], read))
    return out


def _times(piece: Tensor, scales: Tensor, read: Read) -> Tensor:
    return piece.float() * scaled.spread(scales, read.slices, read.stored.shape)


def _read_cache_scales(half: AttentionHalf, checkpoint: Checkpoint) -> None:
    keys = {index: scaled.cache_scale_keys(index) for index in range(half.config.num_hidden_layers)}
    there = {key: checkpoint.tensors[key] for pair in keys.values() for key in pair if key in checkpoint.tensors}
    numbers = _read_whole(there.values())
    for index, pair in keys.items():
        key_scale, value_scale = (numbers[there[key]].item() if key in there else 1.0 for key in pair)
        for key, scale in zip(pair, (key_scale, value_scale), strict=True):
            if not 0 < scale < float("inf"):
                raise CheckpointError(f"{checkpoint.directory}: {key}: must be above 0, got {scale}")
        half.layer(index).self_attn.cache_scales = CacheScales(key_scale, value_scale)


def digest(checkpoint: Checkpoint) -> int:
    """64 bits over shape, tensor table, file sizes and sampled content: equal on every host that has the same checkpoint."""
    state = hashlib.blake2b(digest_size=8)
    state.update(json.dumps(checkpoint.config.to_dict(), sort_keys=True).encode())
    for file in sorted({stored.file for stored in checkpoint.tensors.values()}):
        state.update(f"{file.name} {file.stat().st_size}".encode())
    for key, stored in sorted(checkpoint.tensors.items()):
        state.update(f"{key} {stored.dtype} {stored.shape}".encode())
        with stored.file.open("rb") as stream:
            for offset, length in _samples(stored):
                stream.seek(offset)
                state.update(stream.read(length))
    return int.from_bytes(state.digest(), "big")


def _samples(stored: StoredTensor) -> list[tuple[int, int]]:
    """(offset, length) of what is hashed: all of a small tensor, evenly spaced pieces of a large one."""
    size = stored.end - stored.start
    if size <= _SAMPLED_ABOVE_BYTES:
        return [(stored.start, size)]
    stride = (size - _SAMPLE_BYTES) // (_SAMPLES - 1)
    return [(stored.start + i * stride, _SAMPLE_BYTES) for i in range(_SAMPLES)]


def file_findings(directory: Path) -> list[str]:
    """What keeps the directory from being opened: every file that is missing, truncated or corrupt."""
    found: list[str] = []
    try:
        ModelConfig.from_directory(directory)
    except (ValueError, OSError) as error:
        found.append(str(error))
    try:
        files = shard_files(directory)
    except CheckpointError as error:
        return [*found, str(error)]
    for file in files:
        try:
            read_header(file)
        except CheckpointError as error:
            found.append(str(error))
    return found


def verify(checkpoint: Checkpoint, progress: Progress | None = None) -> Iterator[str]:
    """Every finding, one line each: those of `findings`, dtypes other than `config.json` says, and values that are not finite."""
    yield from checkpoint.findings()
    named = next(name for name, dtype in DTYPES.items() if dtype == checkpoint.config.dtype)
    expected = expected_shapes(checkpoint.config)
    readable = {key: stored for key, stored in checkpoint.tensors.items() if stored.dtype in (*DTYPE_NAMES, E4M3_NAME)}
    total = sum(elements(stored.shape) for stored in readable.values())
    done = 0
    for key, stored in sorted(readable.items()):
        if key in expected and stored.dtype != E4M3_NAME and DTYPE_NAMES[stored.dtype] != checkpoint.config.dtype:
            yield f"{key}: dtype is {stored.dtype}, config.json says {named}"
        bad = _count_non_finite(stored)
        if bad:
            yield f"{key}: {bad} values are not finite"
        done += elements(stored.shape)
        if progress is not None:
            progress(done, total)


def _count_non_finite(stored: StoredTensor) -> int:
    dtype = DTYPE_NAMES.get(stored.dtype, torch.float8_e4m3fn)
    bad, remaining = 0, stored.end - stored.start
    with stored.file.open("rb") as stream:
        stream.seek(stored.start)
        while remaining > 0:
            piece = bytearray(stream.read(min(remaining, _VERIFY_VALUES * dtype.itemsize)))
            if not piece:
                raise CheckpointError(f"{stored.file}: truncated while it was read")
            remaining -= len(piece)
            bad += int((~torch.frombuffer(piece, dtype=torch.uint8).view(dtype).float().isfinite()).sum())
    return bad
