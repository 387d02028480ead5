"""The words by which two processes of a host tell each other, and each other's streams, about places in device memory."""

import fcntl
import mmap
import os
from contextlib import suppress
from typing import NamedTuple

import torch

from afd_ray.handoff import shm
from afd_ray.handoff.device.streams import Device

LINE_BYTES = 64
"""Of a place: nobody else's words lie in its cache line."""
_LINE_WORDS = LINE_BYTES // 4
FULL, FREE, CREDIT = range(3)


class Words:
    """A segment of shared memory, registered with the device: a line for its owner, then one for each place of its inbound edges.

    Of a place FULL counts the messages that were written into it and FREE those that were read, both stored by streams; CREDIT counts those
    whose reading has been ordered, stored by the owner's host. One process stores each word, unless the owner's links are over.
    """

    def __init__(self, device: Device, descriptor: int) -> None:
        """Takes the descriptor."""
        self._device, self._descriptor = device, descriptor
        self._mapping = mmap.mmap(descriptor, 0)
        self._page = torch.frombuffer(self._mapping, dtype=torch.uint8)
        self._host: memoryview = memoryview(self._mapping).cast("I")
        self._address: int = self._page.data_ptr()
        self._there = device.register(self._address, len(self._page))

    @property
    def abandoned(self) -> bool:
        """Whether the owner's streams may have gone on without what they waited for."""
        return self._host[0] != 0

    def abandon(self) -> None:
        self._host[0] = 1

    def read(self, line: int, word: int) -> int:
        return self._host[(1 + line) * _LINE_WORDS + word]

    def store(self, line: int, word: int, value: int) -> None:
        self._host[(1 + line) * _LINE_WORDS + word] = value

    def address(self, line: int, word: int) -> int:
        """For streams."""
        return self._there + ((1 + line) * _LINE_WORDS + word) * 4

    def owner_is_there(self) -> bool:
        """Whether the owner still has device memory of others open; of attached words alone."""
        with suppress(BlockingIOError):
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            return False
        return True

    def close(self) -> None:
        """Of the owner this tells that it has closed what it had opened of others."""
        self._device.unregister(self._address)
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # the mapping keeps a duplicate
        os.close(self._descriptor)
        self._host.release()
        del self._page


class Named(NamedTuple):
    """Where others find words."""

    words: Words
    name: str

    def unlink(self) -> None:
        """Those who have them keep them; harmless to repeat."""
        (shm.DIRECTORY / self.name).unlink(missing_ok=True)


def create_words(device: Device, lines: int) -> Named:
    """All zero; the lock that says that this process is there is the descriptor's. OSError where there is no shared memory left."""
    name, descriptor = shm.create_file()
    try:
        os.posix_fallocate(descriptor, 0, (1 + lines) * LINE_BYTES)
        return Named(Words(device, descriptor), name)
    except BaseException:
        (shm.DIRECTORY / name).unlink(missing_ok=True)
        raise


def attach_words(device: Device, name: str) -> Words:
    """Of another process; OSError when this host has none of that name."""
    if not name.startswith(shm.PREFIX) or "/" in name:
        raise FileNotFoundError(f"no words are named {name!r}")
    return Words(device, os.open(shm.DIRECTORY / name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC))
