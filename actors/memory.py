"""How much memory an actor's process holds."""

import os
from collections.abc import Iterable

import torch


def resident_bytes(halves: Iterable[torch.nn.Module]) -> dict[str, int]:
    """Resident set of this process, and the bytes of the weights in `halves`."""
    with open("/proc/self/statm", encoding="ascii") as file:
        pages = int(file.read().split()[1])
    return {
        "resident": pages * os.sysconf("SC_PAGE_SIZE"),
        "weights": sum(p.nbytes for half in halves for p in half.parameters()),
    }
