"""The files of a checkpoint: safetensors headers read and checked, shards written."""

import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from afd_ray.models.config import ModelConfig

INDEX_NAME = "model.safetensors.index.json"
DTYPE_NAMES = {"F32": torch.float32, "BF16": torch.bfloat16}
E4M3_NAME = "F8_E4M3"
_ITEM_BYTES = {E4M3_NAME: 1, "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
_MAX_HEADER_BYTES = 100_000_000


class CheckpointError(RuntimeError):
    """One line: the directory, file or tensor, and what is wrong with it."""


class StoredTensor(NamedTuple):
    """Where a tensor lies."""

    file: Path
    key: str
    """As the file names it."""
    dtype: str
    """safetensors' name: F32, BF16."""
    shape: tuple[int, ...]
    start: int
    """First byte, from the beginning of the file."""
    end: int


def read_header(file: Path) -> list[StoredTensor]:
    """The tensors in one file; raises CheckpointError when it is truncated or corrupt."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
                raise CheckpointError(f"{file}: truncated, or not a safetensors file ({size} bytes)")
            header = json.loads(stream.read(length))
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror or error}") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        raise CheckpointError(f"{file}: corrupt, its header is not JSON") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: corrupt, its header is not an object")
    header.pop("__metadata__", None)
    return [_stored(file, key, entry, 8 + length, size) for key, entry in header.items()]


def _stored(file: Path, key: str, entry: Any, data_start: int, size: int) -> StoredTensor:
    try:
        dtype, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
        start, end = (data_start + int(n) for n in entry["data_offsets"])
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{file}: corrupt, its header does not describe {key}") from None
    if end > size:
        raise CheckpointError(f"{file}: truncated, {key} ends at byte {end} of {size}")
    expected = _ITEM_BYTES.get(dtype, 1)
    for n in shape:
        expected *= n
    if start > end or (dtype in _ITEM_BYTES and end - start != expected):
        raise CheckpointError(f"{file}: corrupt, {key} takes {end - start} bytes where its shape needs {expected}")
    return StoredTensor(file, key, dtype, shape, start, end)


def shard_files(directory: Path) -> list[Path]:
    """The files that the index names, or every `model*.safetensors`; raises CheckpointError when there is none or one is missing."""
    index = directory / INDEX_NAME
    if not index.is_file():
        files = sorted(directory.glob("model*.safetensors"))
        if not files:
            raise CheckpointError(f"{directory}: no model*.safetensors there")
        return files
    files = [directory / name for name in sorted(set(_weight_map(index).values()))]
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file}: missing, {INDEX_NAME} names it")
    return files


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = {str(key): str(name) for key, name in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{index}: corrupt, it has no weight_map") from None
    outside = next((name for name in names.values() if Path(name).name != name), None)
    if outside is not None:
        raise CheckpointError(f"{index}: names {outside!r}, which is not a file beside it")
    return names


def write_checkpoint(
    directory: Path, config: ModelConfig, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int = 1 << 30
) -> None:
    """Hugging Face layout: shards of at most `max_shard_bytes` (an index beside them when there are several), `config.json` last.

    Keeps one shard in memory. Nothing is left behind when it fails.
    """
    directory.mkdir(parents=True, exist_ok=True)
    written: list[tuple[Path, list[str]]] = []
    try:
        total_bytes = _write_shards(directory, tensors, max_shard_bytes, written)
    except BaseException:
        for part, _ in written:
            part.unlink(missing_ok=True)
        raise
    weight_map: dict[str, str] = {}
    for number, (part, keys) in enumerate(written, start=1):
        name = "model.safetensors" if len(written) == 1 else f"model-{number:05d}-of-{len(written):05d}.safetensors"
        part.rename(directory / name)
        weight_map.update(dict.fromkeys(keys, name))
    if len(written) > 1:
        _write_json(directory / INDEX_NAME, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
    _write_json(directory / "config.json", config.to_dict())


def _write_shards(
    directory: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int, written: list[tuple[Path, list[str]]]
) -> int:
    """Appends to `written` as it goes, so that a caller can clean up; returns the bytes of all tensors."""
    shard: dict[str, Tensor] = {}
    shard_bytes = total_bytes = 0

    def flush() -> None:
        part = directory / f"shard-{len(written) + 1:05d}.tmp"
        written.append((part, list(shard)))
        save_file(shard, part, metadata={"format": "pt"})
        part.chmod(0o644)  # safetensors writes for the owner alone; the actors may be another user
        shard.clear()

    for key, tensor in tensors:
        if shard and shard_bytes + tensor.nbytes > max_shard_bytes:
            flush()
            shard_bytes = 0
        shard[key] = tensor.contiguous()
        shard_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    flush()
    return total_bytes


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
