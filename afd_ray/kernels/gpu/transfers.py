"""Tensors to and from a GPU: side by side in one buffer of pinned host memory, so that the driver copies them while the host goes on.

Pinned buffers come from torch's own allocator, which gives one out again only once the copies that it is used in are done.
"""

from collections.abc import Sequence
from itertools import accumulate
from math import prod

import torch
from torch import Tensor

ALIGNMENT = 256
"""Bytes, of each tensor in the buffer, as torch's own allocator aligns them: kernels are compiled for it."""

Spec = tuple[torch.dtype, tuple[int, ...]]


class Staging:
    """Host memory for tensors of these dtypes and shapes, at least one; pinned where the device is a GPU."""

    def __init__(self, device: torch.device, *specs: Spec) -> None:
        self._device, self._specs = device, specs
        self._buffer = torch.empty(nbytes_of(specs), dtype=torch.uint8, pin_memory=device.type == "cuda")
        self.tensors = views(self._buffer, specs)
        """To be written."""

    def send(self) -> list[Tensor]:
        """What is written by now, on the device, by one copy that the host does not wait for; once."""
        return views(self._buffer.to(self._device, non_blocking=True), self._specs)

    def send_into(self, memory: Tensor) -> None:
        """As `send`, to the begin of memory [bytes] uint8 that is on the device already."""
        memory[: len(self._buffer)].copy_(self._buffer, non_blocking=True)

    def receive(self, memory: Tensor) -> list[Tensor]:
        """What lies at the begin of memory [bytes] uint8 on the device, by one copy. Waits for it, and so for all that is launched by now."""
        self._buffer.copy_(memory[: len(self._buffer)], non_blocking=True)
        _wait(self._device)
        return self.tensors


def views(buffer: Tensor, specs: Sequence[Spec]) -> list[Tensor]:
    """Tensors one after the other in buffer [bytes] uint8, which may be larger."""
    *starts, _ = _starts(specs)
    return [
        buffer[start : start + _size(dtype, shape)].view(dtype).view(shape)
        for start, (dtype, shape) in zip(starts, specs, strict=True)
    ]


def nbytes_of(specs: Sequence[Spec]) -> int:
    """Of a buffer for them."""
    return _starts(specs)[-1]


def upload(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Contiguous copies on the device of tensors in host memory, which may change at once."""
    staging = Staging(device, *_specs(tensors))
    for place, tensor in zip(staging.tensors, tensors, strict=True):
        place.copy_(tensor)
    return staging.send()


def download(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Contiguous copies in host memory of tensors on one device. Waits for them, and so for all that is launched by now."""
    device = tensors[0].device
    staging = Staging(device, *_specs(tensors))
    for place, tensor in zip(staging.tensors, tensors, strict=True):
        place.copy_(tensor, non_blocking=True)
    _wait(device)
    return staging.tensors


def _specs(tensors: Sequence[Tensor]) -> list[Spec]:
    return [(tensor.dtype, tuple(tensor.shape)) for tensor in tensors]


def _starts(specs: Sequence[Spec]) -> list[int]:
    """And where the last one ends."""
    return list(accumulate((-(-_size(*spec) // ALIGNMENT) * ALIGNMENT for spec in specs), initial=0))


def _size(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return prod(shape) * dtype.itemsize


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
