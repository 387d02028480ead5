"""Small KV caches with something in them."""

from typing import NamedTuple

import torch
from torch import Tensor

from afd_ray.engine.kv_cache import PagedCache, slot_indices


class CacheSize(NamedTuple):
    layers: int = 3
    num_blocks: int = 20
    block_size: int = 4
    head_dim: int = 8
    dtype: torch.dtype = torch.float32


TINY = CacheSize()


def cache_of(size: CacheSize = TINY) -> PagedCache:
    return PagedCache(**size._asdict())


def fill(cache: PagedCache, block_table: list[int], tokens: int) -> None:
    """Every layer's first positions, with what no other place has."""
    slots = torch.tensor(slot_indices(block_table, 0, tokens, cache.block_size))
    for layer in range(cache.layers):
        k, v = torch.randn(2, tokens, cache.head_dim, generator=torch.Generator().manual_seed(layer)).to(cache.dtype)
        cache.write(layer, slots, k, v)


def content(cache: PagedCache, block_table: list[int], tokens: int) -> Tensor:
    """[layers, tokens, 2 * head_dim]"""
    slots = torch.tensor(slot_indices(block_table, 0, tokens, cache.block_size))
    return cache.blocks.flatten(1, 2)[:, slots]
