"""The paged KV cache: blocks handed out to sequences, and the tensor that they index."""

import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from afd_ray.engine.sequence import Sequence
from afd_ray.kernels import native
from afd_ray.models.config import DTYPES

HOST = torch.device("cpu")
CACHE_DTYPES = DTYPES | {"fp8": torch.float8_e4m3fn}
"""By the name that the configuration gives them."""


class BlockAllocator:
    """Hands out the numbers of cache blocks; each is free or owned by exactly one caller."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, got {num_blocks}")
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        self.total, self.block_size = num_blocks, block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._taken = bytearray(num_blocks)

    @property
    def available(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self.total - len(self._free)

    def blocks_for(self, tokens: int) -> int:
        """How many blocks hold that many tokens."""
        return -(-tokens // self.block_size)

    def is_taken(self, block: int) -> bool:
        return bool(self._taken[block])

    def allocate(self, count: int) -> list[int] | None:
        """That many blocks, or None (and nothing taken) when fewer are free."""
        if count > len(self._free):
            return None
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._taken[block] = 1
        return blocks

    def free(self, blocks: list[int]) -> None:
        """Give blocks back; raises ValueError at one that is not taken."""
        for block in reversed(blocks):  # the next caller gets them in the same order: runs of neighbours are gathered faster
            if not 0 <= block < self.total or not self._taken[block]:
                raise ValueError(f"block {block} is not taken, it cannot be freed")
            self._taken[block] = 0
            self._free.append(block)


class PagedCache:
    """Keys and values of every layer: [layers, num_blocks, block_size, 2 * head_dim], a token's key head beside its value head."""

    def __init__(
        self,
        *,
        layers: int,
        num_blocks: int,
        block_size: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device = HOST,
        spare: int = 0,
    ) -> None:
        """`spare`: so many blocks more, behind the others, for rows that belong to no sequence."""
        self.layers, self.num_blocks, self.block_size, self.head_dim, self.dtype = layers, num_blocks, block_size, head_dim, dtype
        # Zeros, not empty: padding rows of a gather are masked with weight 0, and 0 * NaN of stale memory is NaN.
        shape = (layers, num_blocks + spare, block_size, 2 * head_dim)
        self._memory: memoryview | None = None
        if device.type == "cpu":
            # NumPy's, not torch's: they come from the kernel untouched, so that blocks never used take no memory.
            memory = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
            self.blocks = torch.from_numpy(memory).view(dtype).view(shape)
            self._memory = memory.data
        else:
            self.blocks = torch.zeros(shape, dtype=dtype, device=device)
        self._tokens = self.blocks.view(layers, (num_blocks + spare) * block_size, 2 * head_dim)

    @property
    def nbytes(self) -> int:
        return self.blocks.nbytes

    @property
    def token_bytes(self) -> int:
        """Of one token's keys and values, in all layers."""
        return self.layers * 2 * self.head_dim * self.dtype.itemsize

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k and v [N, D] at token slots [N] int64; writing the same again changes nothing."""
        if k.dtype == self.dtype == torch.bfloat16 and native.available():
            native.store(k, v, slots, self._tokens[layer])
            return
        self._tokens[layer].index_copy_(0, slots, torch.cat((k, v), dim=-1).to(self.dtype))

    def gather(self, layer: int, blocks: Tensor, out: Tensor) -> Tensor:
        """Copy blocks [M] int64 of one layer to `out` [M, block_size, 2 * D]."""
        return torch.index_select(self.blocks[layer], 0, blocks, out=out)

    def outgoing(self, block_table: list[int], tokens: int) -> Iterator[list[memoryview]]:
        """For each layer the bytes of the first `tokens` positions, in their order, to be read before the next layer is asked for.

        The bytes together do not depend on where the blocks are, nor on their size, nor on the device.
        """
        return self.spans(block_table, tokens)

    def incoming(self, block_table: list[int], tokens: int) -> Iterator[list[memoryview]]:
        """As `outgoing`, to be written: a layer's bytes are there once the next layer is asked for, or the end is reached."""
        return self.spans(block_table, tokens)

    def spans(self, block_table: list[int], tokens: int) -> Iterator[list[memoryview]]:
        """For each layer the bytes of the first `tokens` positions, in their order: writable views, neighbouring blocks as one.

        Raises RuntimeError where they are not in host memory.
        """
        if self._memory is None:
            raise RuntimeError("keys and values on a GPU have no bytes in host memory")
        token_bytes = 2 * self.head_dim * self.dtype.itemsize
        runs = [(first * token_bytes, end * token_bytes) for first, end in slot_runs(block_table, tokens, self.block_size)]
        for layer in range(self.layers):
            start = layer * self.num_blocks * self.block_size * token_bytes
            yield [self._memory[start + first : start + end] for first, end in runs]


def slot_runs(block_table: list[int], tokens: int, block_size: int) -> list[tuple[int, int]]:
    """The token slots (first, end) of the first `tokens` positions, in their order; neighbouring blocks as one."""
    runs: list[tuple[int, int]] = []
    for index, block in enumerate(block_table[: -(-tokens // block_size)]):
        first = block * block_size
        end = first + min(block_size, tokens - index * block_size)
        if runs and runs[-1][1] == first:
            runs[-1] = (runs[-1][0], end)
        else:
            runs.append((first, end))
    return runs


def slot_indices(block_table: list[int], start: int, count: int, block_size: int) -> list[int]:
    """Token slots of positions start..start+count-1."""
    return [block_table[i // block_size] * block_size + i % block_size for i in range(start, start + count)]


def check_integrity(allocator: BlockAllocator, sequences: Iterable[Sequence]) -> list[str]:
    """Everything wrong with who owns which block, a line each; empty when all is well."""
    held = list(sequences)
    findings = []
    owner: dict[int, str] = {}
    for sequence in held:
        for block in sequence.block_table:
            if block in owner:
                findings.append(f"block {block} is owned by {owner[block]} and {sequence.id}")
            elif not 0 <= block < allocator.total or not allocator.is_taken(block):
                findings.append(f"block {block} of {sequence.id} is not allocated")
            owner[block] = sequence.id
        if len(sequence.block_table) < allocator.blocks_for(sequence.computed):
            findings.append(f"{sequence.id} has {sequence.computed} computed tokens in {len(sequence.block_table)} blocks")
    findings += _leaks(allocator, owner)
    return findings


def _leaks(allocator: BlockAllocator, owner: dict[int, str]) -> list[str]:
    leaked = [block for block in range(allocator.total) if allocator.is_taken(block) and block not in owner]
    findings = [f"block {block} is leaked: taken, and owned by no sequence" for block in leaked]
    taken = sum(allocator.is_taken(block) for block in range(allocator.total))
    if taken != allocator.used:
        findings.append(f"{allocator.used} blocks counted as used, {taken} marked as taken")
    return findings
