"""How much memory an actor's process holds."""

import ctypes
import os
from collections.abc import Iterable
from contextlib import suppress

import torch


def give_back() -> None:
    """Return freed memory to the system: after loading, the C library keeps what plain weights took that are packed by now."""
    with suppress(AttributeError):  # a C library other than glibc
        ctypes.CDLL(None).malloc_trim(0)


def resident_bytes(halves: Iterable[torch.nn.Module]) -> dict[str, int]:
    """Resident set of this process, and the bytes of the weights in `halves`."""
    with open("/proc/self/statm", encoding="ascii") as file:
        pages = int(file.read().split()[1])
    return {
        "resident": pages * os.sysconf("SC_PAGE_SIZE"),
        "weights": sum(p.nbytes for half in halves for p in half.parameters()),
    }
