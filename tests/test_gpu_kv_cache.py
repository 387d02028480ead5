"""Keys and values that lie on a device, from rank to rank: the same bytes, a layer at a time, beside steps."""

from collections.abc import Callable, Iterator

import pytest
import torch

from afd_ray.engine.gpu.kv_cache import GPUPagedCache
from afd_ray.engine.kv_cache import PagedCache
from tests.engine_cache import CacheSize, cache_of, content
from tests.test_kv_link import TIMEOUT_S, TINY, TOKENS, Leaver, Taker, leaver_of
from tests.triton_device import DEVICE

E4M3 = torch.float8_e4m3fn
Make = Callable[[CacheSize], PagedCache]


def on_device(size: CacheSize) -> GPUPagedCache:
    return GPUPagedCache(device=torch.device(DEVICE), **size._asdict())


def filled(make: Make, size: CacheSize) -> Leaver:
    leaver = leaver_of(size._replace(dtype=torch.float32))
    values, leaver.cache = leaver.cache.blocks, make(size)
    leaver.cache.blocks.copy_(values.to(size.dtype))
    return leaver


def forgotten(leaver: Leaver) -> None:
    """It may be asked again."""
    assert leaver.gone.wait(TIMEOUT_S)
    leaver.gone.clear()
    leaver.let_go.clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, E4M3])
@pytest.mark.parametrize(
    ("from_device", "to_device"), [(True, True), (True, False), pytest.param(False, True, marks=pytest.mark.full)]
)
def test_what_arrives_is_what_was_there_wherever_either_side_has_it(
    dtype: torch.dtype, from_device: bool, to_device: bool
) -> None:
    size = TINY._replace(dtype=dtype)
    leaver, taker = filled(on_device if from_device else cache_of, size), Taker(size)
    if to_device:
        taker.cache = on_device(size._replace(block_size=5, num_blocks=12))
    for positions in (1, TOKENS):
        assert taker.fetch(leaver.ticket, positions) == ""
        forgotten(leaver)
        expected = content(leaver.cache, leaver.block_table, positions).float().cpu()
        assert expected.any()
        assert torch.equal(content(taker.cache, taker.block_table, positions).float().cpu(), expected)
        assert int((taker.cache.blocks.float() != 0).any(-1).sum()) <= size.layers * positions
    leaver.server.close()


def test_a_layer_is_written_once_the_next_is_asked_for_and_no_other_block_is() -> None:
    cache = on_device(TINY)
    layers = cache.incoming([3, 1], 6)
    for layer, (view,) in enumerate(layers):
        view[:] = bytes([layer + 1]) * (6 * 2 * TINY.head_dim * 4)
    found = cache.blocks.view(torch.uint8).flatten(1, 2)  # [layers, slots, bytes]
    taken = [*range(12, 16), 4, 5]
    assert all((found[layer, taken] == layer + 1).all() for layer in range(TINY.layers))
    found[:, taken] = 0
    assert not found.any()


def test_a_fetch_that_breaks_off_leaves_the_cache_usable() -> None:
    leaver, taker = filled(on_device, TINY), Taker(TINY)
    taker.cache = on_device(TINY._replace(block_size=5, num_blocks=12))
    whole = leaver.cache.outgoing

    def broken(block_table: list[int], tokens: int) -> Iterator[list[memoryview]]:
        yield next(iter(whole(block_table, tokens)))
        raise RuntimeError("the step loop is over")

    leaver.cache.outgoing = broken  # type: ignore[method-assign]
    assert "hung up" in taker.fetch(leaver.ticket)
    leaver.cache.outgoing = whole  # type: ignore[method-assign]
    forgotten(leaver)
    assert taker.fetch(leaver.ticket) == ""
    assert torch.equal(content(taker.cache, taker.block_table, TOKENS), content(leaver.cache, leaver.block_table, TOKENS))
    leaver.server.close()
