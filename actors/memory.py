"""How much memory an actor's process holds."""

import os

import torch


def resident_bytes(half: torch.nn.Module) -> dict[str, int]:
    """Resident set of this process, and the bytes of the weights in `half`."""
    with open("/proc/self/statm", encoding="ascii") as file:
        pages = int(file.read().split()[1])
    return {"resident": pages * os.sysconf("SC_PAGE_SIZE"), "weights": sum(p.nbytes for p in half.parameters())}
