"""A CUDA GPU as links between devices see it: memory by cuMemAlloc and IPC handles, streams and events by torch, words by stream memory operations.

Signatures as in the CUDA driver API's manual, sections Memory Management and Stream Memory Operations, by NVIDIA's cuda-bindings. Memory is
allocated beside torch's allocator: what that hands out may be a part of a larger piece, or made of pieces that no IPC handle can name.
"""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from cuda.bindings import driver
from torch import Tensor

from afd_ray.handoff.device.streams import Mark, TimedMark

SHARED_BYTES = 2 << 20
"""What a handle opens is made of whole pieces of so many bytes: nothing else may lie in them."""


class CudaMark:
    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def passed(self) -> bool:
        return bool(self.event.query())


class CudaTimedMark(CudaMark):
    """Of an event with timing."""

    def since_us(self, earlier: TimedMark) -> float:
        assert isinstance(earlier, CudaTimedMark)
        return float(earlier.event.elapsed_time(self.event)) * 1000


class _Thread(threading.local):
    """Whose context the thread has."""

    place: torch.device | None = None


_thread = _Thread()


def _enter(place: torch.device) -> None:
    """The driver wants the device's context to be the thread's; torch's guards leave a thread whose device is 0 anyway without any."""
    if _thread.place != place:
        torch.cuda.set_device(place)
        _thread.place = place


class CudaStream:
    """A stream of torch's."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.torch = stream
        self.handle: int = stream.cuda_stream

    def copy(self, to: Tensor, given: Tensor) -> None:
        with torch.cuda.stream(self.torch):
            to.copy_(given, non_blocking=True)

    def write(self, address: int, value: int) -> None:
        _enter(self.torch.device)
        _call(
            driver.cuStreamWriteValue32, self.handle, address, value, 0
        )  # default flags: a fence of the whole system goes before it

    def wait(self, address: int, value: int) -> None:
        _enter(self.torch.device)
        _call(
            driver.cuStreamWaitValue32, self.handle, address, value, int(driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_GEQ)
        )

    def mark(self) -> CudaMark:
        event = torch.cuda.Event()
        event.record(self.torch)
        return CudaMark(event)

    def timed_mark(self) -> CudaTimedMark:
        event = torch.cuda.Event(enable_timing=True)
        event.record(self.torch)
        return CudaTimedMark(event)

    def follow(self, mark: Mark) -> None:
        assert isinstance(mark, CudaMark)
        self.torch.wait_event(mark.event)

    def synchronize(self) -> None:
        self.torch.synchronize()


class CudaDevice:
    """A `Device`."""

    def __init__(self, place: torch.device) -> None:
        self.place = place
        self._streams: dict[int, CudaStream] = {}

    def stream(self) -> CudaStream:
        current = torch.cuda.current_stream(self.place)
        known = self._streams.get(current.cuda_stream)
        if known is None:
            known = self._streams[current.cuda_stream] = CudaStream(current)
        return known

    def side_stream(self) -> CudaStream:
        return CudaStream(_urgent(self.place))

    def aside(self) -> AbstractContextManager[None]:
        aside: AbstractContextManager[None] = torch.cuda.stream(_urgent(self.place))
        return aside

    def allocate(self, size_bytes: int) -> Tensor:
        return self._tensor(int(self._call(driver.cuMemAlloc, -(-size_bytes // SHARED_BYTES) * SHARED_BYTES)), size_bytes)

    def free(self, memory: Tensor) -> None:
        self._call(driver.cuMemFree, memory.data_ptr())

    def export(self, memory: Tensor) -> bytes:
        return bytes(self._call(driver.cuIpcGetMemHandle, memory.data_ptr()).reserved)

    def open(self, handle: bytes, size_bytes: int) -> Tensor:
        name = driver.CUipcMemHandle()
        name.reserved = handle
        lazily = int(driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS)
        return self._tensor(int(self._call(driver.cuIpcOpenMemHandle, name, lazily)), size_bytes)

    def close(self, memory: Tensor) -> None:
        self._call(driver.cuIpcCloseMemHandle, memory.data_ptr())

    def register(self, address: int, size_bytes: int) -> int:
        flags = driver.CU_MEMHOSTREGISTER_PORTABLE | driver.CU_MEMHOSTREGISTER_DEVICEMAP
        self._call(driver.cuMemHostRegister, address, size_bytes, flags)
        return int(self._call(driver.cuMemHostGetDevicePointer, address, 0))

    def unregister(self, address: int) -> None:
        self._call(driver.cuMemHostUnregister, address)

    def _call(self, function: Callable[..., tuple[Any, ...]], *arguments: Any) -> Any:
        """From any thread."""
        _enter(self.place)
        return _call(function, *arguments)

    def _tensor(self, address: int, size_bytes: int) -> Tensor:
        return torch.as_tensor(_Array(address, size_bytes), device=self.place)


def _urgent(place: torch.device) -> torch.cuda.Stream:
    """Of the 32 that torch gives out in turn with this priority: those of the others may be capturing a graph, which would take in what is ordered."""
    return torch.cuda.Stream(place, priority=-1)


class _Array:
    """What torch takes a tensor from without a copy."""

    def __init__(self, address: int, size_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


def _call(function: Callable[..., tuple[Any, ...]], *arguments: Any) -> Any:
    error, *results = function(*arguments)
    if error != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"{function.__name__} failed: {error.name}")
    return results[0] if results else None
