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
        self._sizes = [prod(shape) * dtype.itemsize for dtype, shape in specs]
        self._starts = list(accumulate((-(-size // ALIGNMENT) * ALIGNMENT for size in self._sizes), initial=0))
        self._buffer = torch.empty(self._starts[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
        self.tensors = self._views(self._buffer)
        """To be written."""

    def send(self) -> list[Tensor]:
        """What is written by now, on the device, by one copy that the host does not wait for; once."""
        return self._views(self._buffer.to(self._device, non_blocking=True))

    def _views(self, buffer: Tensor) -> list[Tensor]:
        return [
            buffer[start : start + size].view(dtype).view(shape)
            for start, size, (dtype, shape) in zip(self._starts[:-1], self._sizes, self._specs, strict=True)
        ]


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
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return staging.tensors


def _specs(tensors: Sequence[Tensor]) -> list[Spec]:
    return [(tensor.dtype, tuple(tensor.shape)) for tensor in tensors]
