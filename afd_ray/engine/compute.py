"""What an actor's halves compute on: what makes them run there, and the room that keys and values have."""

import os
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from afd_ray.engine.kv_cache import PagedCache
from afd_ray.engine.passage import HostPassage, Passage
from afd_ray.engine.sequence import Chunk
from afd_ray.kernels.packed import packed_attention, packed_ffn
from afd_ray.kernels.regather import Read, regather
from afd_ray.models.config import ModelConfig
from afd_ray.models.layout import Part
from afd_ray.models.step3 import AttentionHalf, FFNHalf, FFNShard

MAX_CACHE_BYTES = 1 << 30
CACHE_SHARE = 0.1
"""Of the machine's free memory, for one actor's KV cache where `num_blocks` is auto."""


class Needs(NamedTuple):
    """What an attention rank's micro-batches may come to in an epoch."""

    rows: int
    """Of one, at most."""
    decoding: int
    """Of those, at most, that decode."""
    slots: int
    instances: int
    """Of the FFN; 0: colocated."""


class Compute(Protocol):
    """A kind of device. Halves are given as they were loaded, and may be changed in place."""

    spare_blocks: int
    """That `cache` makes beyond those asked for."""

    @property
    def narrow_parts(self) -> frozenset[Part]:
        """What halves hold in e4m3: what files have so need not be made wider first."""

    def begin(self, half: AttentionHalf, cache: PagedCache, chunks: Sequence[Chunk], slot: int) -> Passage:
        """A micro-batch's way through what `attention` and `cache` gave; a slot has one at a time."""

    def attention(self, half: AttentionHalf) -> AttentionHalf:
        """For an attention rank."""

    def ffn(self, half: FFNHalf) -> FFNHalf:
        """For an FFN rank: rows come from host memory and go back there."""

    def regathered_ffn(self, held: FFNHalf, wanted: FFNShard, read: Read) -> FFNHalf:
        """As `ffn`, for another shard than that of a half which `ffn` gave, and which may be served meanwhile."""

    def colocated_ffn(self, half: FFNHalf) -> FFNHalf:
        """For rows that an attention half has where it computes."""

    def cache_bytes(self, config: ModelConfig, needs: Needs) -> int:
        """Of the KV cache, at most, beside the halves that are loaded."""

    def cache(self, config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype) -> PagedCache:
        """Where the halves compute; `num_blocks` may be what `cache_bytes` has room for."""

    def warm_up_attention(self, half: AttentionHalf, cache: PagedCache, needs: Needs, ffn: FFNHalf | None = None) -> None:
        """Do at once what first steps would wait for; also beside steps with fewer slots or instances. `ffn`: colocated.

        Raises RuntimeError in one line where steps could not run.
        """

    def warm_up_ffn(self, half: FFNHalf, rows: int, narrow: bool) -> None:
        """As `warm_up_attention`, for what `ffn` or `regathered_ffn` gave; up to so many rows decode in a wave, and may come in 8 bits."""


class HostCompute:
    """The CPU: compiled kernels where it can run them, else plain torch."""

    spare_blocks = 0
    narrow_parts: frozenset[Part] = frozenset()

    def begin(self, half: AttentionHalf, cache: PagedCache, chunks: Sequence[Chunk], slot: int) -> Passage:
        return HostPassage(half, cache, chunks)

    def attention(self, half: AttentionHalf) -> AttentionHalf:
        return packed_attention(half)

    def ffn(self, half: FFNHalf) -> FFNHalf:
        return packed_ffn(half)

    def regathered_ffn(self, held: FFNHalf, wanted: FFNShard, read: Read) -> FFNHalf:
        return regather(held, wanted, read)

    def colocated_ffn(self, half: FFNHalf) -> FFNHalf:
        return packed_ffn(half)

    def cache_bytes(self, config: ModelConfig, needs: Needs) -> int:
        free_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return min(MAX_CACHE_BYTES, int(free_bytes * CACHE_SHARE))

    def cache(self, config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype) -> PagedCache:
        return PagedCache(
            layers=config.num_hidden_layers,
            num_blocks=max(1, num_blocks),
            block_size=block_size,
            head_dim=config.head_dim,
            dtype=dtype,
        )

    def warm_up_attention(self, half: AttentionHalf, cache: PagedCache, needs: Needs, ffn: FFNHalf | None = None) -> None:
        """Nothing is made later here."""

    def warm_up_ffn(self, half: FFNHalf, rows: int, narrow: bool) -> None:
        """Nothing is made later here."""
