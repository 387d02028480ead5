"""What links between devices need of a device: memory that another process can open, and work that is done in order while the host goes on."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor


class Mark(Protocol):
    """A point in a stream."""

    def passed(self) -> bool:
        """Whether all that was ordered before it is done."""


class TimedMark(Mark, Protocol):
    """That knows when it was passed."""

    def since_us(self, earlier: "TimedMark") -> float:
        """By the device's clock; RuntimeError unless both have been passed."""


Clock = Callable[[], TimedMark]
"""Marks the stream that this thread's own work goes to."""


class Stream(Protocol):
    """Work in the order in which it is ordered. Any thread may order; nothing here waits for the device but `synchronize`."""

    def copy(self, to: Tensor, given: Tensor) -> None:
        """Of one dtype and shape."""

    def write(self, address: int, value: int) -> None:
        """Into a word of registered memory, once what was ordered before can be seen by whoever sees the word."""

    def wait(self, address: int, value: int) -> None:
        """Go on once that word is `value` or later; 32 bits, counted round: see `reached`."""

    def mark(self) -> Mark:
        """Here."""

    def timed_mark(self) -> TimedMark:
        """Here."""

    def follow(self, mark: Mark) -> None:
        """Go on once another stream has passed the mark."""

    def synchronize(self) -> None:
        """Have the host wait until all of it is done."""


class Device(Protocol):
    """A device of this process. What fails raises RuntimeError in one line."""

    place: torch.device

    def stream(self) -> Stream:
        """The one that this thread's own work on the device goes to; equal ones are the same object."""

    def side_stream(self) -> Stream:
        """A new one."""

    def aside(self) -> AbstractContextManager[None]:
        """What this thread orders meanwhile goes to a stream of its own."""

    def allocate(self, size_bytes: int) -> Tensor:
        """[size_bytes] uint8, aligned to 256 bytes."""

    def free(self, memory: Tensor) -> None:
        """What `allocate` gave, once nobody uses it."""

    def export(self, memory: Tensor) -> bytes:
        """What `allocate` gave, for `open` in another process of this host."""

    def open(self, handle: bytes, size_bytes: int) -> Tensor:
        """Another process's memory; [size_bytes] uint8."""

    def close(self, memory: Tensor) -> None:
        """What `open` gave, once nobody here uses it."""

    def register(self, address: int, size_bytes: int) -> int:
        """Host memory for `Stream.write` and `Stream.wait`; gives its address there."""

    def unregister(self, address: int) -> None:
        """By the host's address."""


def reached(word: int, value: int) -> bool:
    """Whether a counter of 32 bits, which may have begun again at 0, has come to this value.

    >>> reached(5, 5), reached(4, 5), reached(2, 0xFFFF_FFFE), reached(0xFFFF_FFFE, 2)
    (True, False, True, False)
    """
    return (word - value) & 0xFFFF_FFFF < 1 << 31
