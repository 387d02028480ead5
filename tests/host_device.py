"""A device that every machine has: its memory is shared memory, and a thread plays its stream, late and in order.

What a test or a step loop computes it computes at once, on its own thread, which so stands for the kernels of its stream: an order to wait
holds that thread up, as a kernel behind it would be, while copies and words that were ordered before may still be on their way.
"""

import ctypes
import mmap
import os
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from afd_ray.handoff import shm
from afd_ray.handoff.device.streams import Mark, TimedMark, reached

POLL_S = 50e-6


class HostMark:
    def __init__(self) -> None:
        self.event = threading.Event()

    def passed(self) -> bool:
        return self.event.is_set()


class HostTimedMark(HostMark):
    """Read by the stream's thread as it comes there."""

    def __init__(self, now_us: Callable[[], float]) -> None:
        super().__init__()
        self._now_us, self._at_us = now_us, 0.0

    def reach(self) -> None:
        self._at_us = self._now_us()
        self.event.set()

    def since_us(self, earlier: TimedMark) -> float:
        assert isinstance(earlier, HostTimedMark)
        if not (self.passed() and earlier.passed()):
            raise RuntimeError("a mark that has not been passed has no time")
        return self._at_us - earlier._at_us


class HostStream:
    """Orders are carried out one after the other by a thread, each up to `lateness_s` late."""

    def __init__(self, lateness_s: float = 0.0, holds_up: bool = True, *, pretends: bool = False) -> None:
        """`holds_up`: the thread that orders to wait, or to follow, is held up too. `pretends`: its clock tells of what it was told to `take` alone."""
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lateness_s, self._holds_up, self._random = lateness_s, holds_up, random.Random(7)
        self.waits = False
        self._pretended_us: float | None = 0.0 if pretends else None
        threading.Thread(target=self._work, name="host-stream", daemon=True).start()

    @torch.inference_mode()  # as step loops, whose tensors it writes into
    def _work(self) -> None:
        while True:
            order = self._orders.get()
            if self._lateness_s:
                time.sleep(self._random.random() * self._lateness_s)
            order()

    def run(self, order: Callable[[], None]) -> None:
        """What a kernel would do."""
        self._orders.put(order)

    def copy(self, to: Tensor, given: Tensor) -> None:
        """Of what is given now: whoever computes does so at once."""
        now = given.clone()
        self.run(partial(_copy, to, now))

    def write(self, address: int, value: int) -> None:
        self.run(lambda: _store(address, value))

    def wait(self, address: int, value: int) -> None:
        def wait() -> None:
            self.waits = True
            _until(lambda: reached(_load(address), value))
            self.waits = False

        self._hold_up(wait)

    def take(self, duration_us: float) -> None:
        """Work that lasts so long, of a stream that pretends."""

        def pretend() -> None:
            assert self._pretended_us is not None
            self._pretended_us += duration_us

        self.run(pretend)

    def timed_mark(self) -> HostTimedMark:
        mark = HostTimedMark(self.now_us)
        self.run(mark.reach)
        return mark

    def now_us(self) -> float:
        return time.monotonic_ns() / 1000 if self._pretended_us is None else self._pretended_us

    def mark(self) -> HostMark:
        mark = HostMark()
        self.run(mark.event.set)
        return mark

    def follow(self, mark: Mark) -> None:
        self._hold_up(lambda: _until(mark.passed))

    def synchronize(self) -> None:
        self.mark().event.wait()

    def _hold_up(self, order: Callable[[], None]) -> None:
        self.run(order)
        if self._holds_up:
            self.synchronize()


def stalled(device: "HostDevice", going: threading.Event | None = None) -> threading.Event:
    """Its stream comes no further than the next copy, until the event."""
    stream, going = device.stream(), going or threading.Event()
    stream.copy = lambda to, given: stream.run(lambda: going.wait() and None)  # type: ignore[method-assign]
    return going


class HostDevice:
    """Of one member of a group; `opened` counts what it has of others, `allocated` what it has of its own."""

    place = torch.device("cpu")

    def __init__(self, lateness_s: float = 0.0, holds_up: bool = True, *, pretends: bool = False) -> None:
        self._lateness_s = lateness_s
        self._own = HostStream(lateness_s, holds_up, pretends=pretends)
        self._names: dict[int, str] = {}
        self.allocated = self.opened = self.registered = 0

    def stream(self) -> HostStream:
        return self._own

    def side_stream(self) -> HostStream:
        return HostStream(self._lateness_s, holds_up=False)

    @contextmanager
    def aside(self) -> Iterator[None]:
        yield

    def allocate(self, size_bytes: int) -> Tensor:
        name, descriptor = shm.create_file()
        os.truncate(descriptor, size_bytes)
        memory = _mapped(descriptor)
        self._names[memory.data_ptr()] = name
        self.allocated += 1
        return memory

    def free(self, memory: Tensor) -> None:
        (shm.DIRECTORY / self._names.pop(memory.data_ptr())).unlink()
        memory.fill_(0xEE)  # whoever still reads it finds out
        self.allocated -= 1

    def export(self, memory: Tensor) -> bytes:
        return self._names[memory.data_ptr()].encode()

    def open(self, handle: bytes, size_bytes: int) -> Tensor:
        memory = _mapped(os.open(shm.DIRECTORY / handle.decode(), os.O_RDWR))
        assert len(memory) == size_bytes
        self.opened += 1
        return memory

    def close(self, memory: Tensor) -> None:
        self.opened -= 1

    def register(self, address: int, size_bytes: int) -> int:
        self.registered += 1
        return address

    def unregister(self, address: int) -> None:
        self.registered -= 1


def _mapped(descriptor: int) -> Tensor:
    memory = torch.frombuffer(mmap.mmap(descriptor, 0), dtype=torch.uint8)
    os.close(descriptor)
    return memory


def _copy(to: Tensor, given: Tensor) -> None:
    to.copy_(given)


def _load(address: int) -> int:
    return ctypes.c_uint32.from_address(address).value


def _store(address: int, value: int) -> None:
    ctypes.c_uint32.from_address(address).value = value


def _until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(POLL_S)
