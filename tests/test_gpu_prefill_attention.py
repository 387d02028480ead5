"""The prefill kernel equals the model's causal attention, chunk by chunk."""

import random
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from afd_ray.engine.kv_cache import slot_indices
from afd_ray.kernels.gpu.paged_softmax import Rows
from afd_ray.kernels.gpu.prefill_attention import TILES, attend_chunks, row_tiles
from afd_ray.models import step3
from tests.triton_device import CLOSE, DEVICE, DTYPES, error, noise


class Shape(NamedTuple):
    chunks: tuple[tuple[int, int], ...]
    """(tokens before, rows) of each."""
    heads: int = 4
    key_heads: int = 1
    dim: int = 32
    page: int = 16


def run(shape: Shape, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """What the kernel gives and what attention must give, [N, A, D]; what lies beyond a chunk's end would be seen."""
    rng, generator = random.Random(seed), noise(seed)
    totals = [before + rows for before, rows in shape.chunks]
    counts = [-(-total // shape.page) for total in totals]
    order = list(range(sum(counts) + 1))
    rng.shuffle(order)
    blocks = torch.full((len(order), shape.page, shape.key_heads, 2, shape.dim), float("nan"))
    q = torch.randn(sum(rows for _, rows in shape.chunks), shape.heads, shape.dim, generator=generator).to(torch.float16)
    tables: list[int] = []
    starts: list[int] = []
    contexts: list[int] = []
    expected = []
    for (before, rows), total, count in zip(shape.chunks, totals, counts, strict=True):
        starts += [len(tables)] * rows
        contexts += range(before + 1, total + 1)
        table = order[len(tables) : len(tables) + count]
        tokens = torch.randn(total, shape.key_heads, 2, shape.dim, generator=generator).to(dtype).float()
        blocks.flatten(0, 1)[slot_indices(table, 0, total, shape.page)] = tokens
        groups = q[len(contexts) - rows : len(contexts)].float().chunk(shape.key_heads, dim=1)
        heads = [step3.attend(group, *tokens[:, head].unbind(1), before) for head, group in enumerate(groups)]
        expected.append(torch.cat(heads, dim=1))
        tables += table
    tiles = row_tiles([rows for _, rows in shape.chunks], shape.heads, shape.key_heads, dtype)
    first_rows, row_counts, *where = (
        torch.tensor(values, dtype=torch.int32, device=DEVICE) for values in (*tiles, tables, starts, contexts)
    )
    queries = q.to(DEVICE, torch.float16 if dtype == torch.float8_e4m3fn else dtype)
    found = attend_chunks(Rows(queries, blocks.to(dtype).to(DEVICE), *where), first_rows, row_counts)
    return found, torch.cat(expected) if expected else q


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn], ids=str)
def test_chunks_of_any_place_and_length_equal_the_reference(dtype: torch.dtype) -> None:
    found, expected = run(Shape(((0, 1), (0, 16), (5, 17), (63, 1), (64, 2), (0, 65))), dtype)
    assert error(found, expected) < CLOSE[dtype]


def test_the_heads_of_step_3() -> None:
    found, expected = run(Shape(((0, 5), (40, 3)), heads=64, dim=256, page=64), torch.float16)
    assert error(found, expected) < CLOSE[torch.float16]


@pytest.mark.parametrize(("heads", "key_heads"), [(1, 1), (4, 4), (12, 4), (130, 1)])
def test_heads_that_do_not_divide_a_tile_or_need_two(heads: int, key_heads: int) -> None:
    found, expected = run(Shape(((3, 9),), heads, key_heads, dim=16), torch.float16)
    assert error(found, expected) < CLOSE[torch.float16]


@pytest.mark.parametrize("page", [1, 8, 64])
def test_blocks_smaller_and_larger_than_a_tile(page: int) -> None:
    found, expected = run(Shape(((30, 40),), page=page), torch.float16)
    assert error(found, expected) < CLOSE[torch.float16]


def test_no_rows_are_no_rows() -> None:
    assert run(Shape(()), torch.float32)[0].shape == (0, 4, 32)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(20))
def test_random_shapes(seed: int) -> None:
    rng = random.Random(seed)
    key_heads = rng.choice([1, 1, 2])
    chunks = tuple((rng.choice([0, 0, rng.randrange(300)]), rng.randrange(1, 80)) for _ in range(rng.randrange(1, 4)))
    shape = Shape(chunks, key_heads * rng.randrange(1, 20), key_heads, rng.choice([16, 64]), rng.choice([1, 16, 64]))
    dtype = rng.choice([*DTYPES, torch.float8_e4m3fn])
    found, expected = run(shape, dtype, seed)
    assert error(found, expected) < CLOSE[dtype], shape


def test_tiles_cover_each_row_once_and_stay_in_a_chunk() -> None:
    tiles = row_tiles([5, 0, 1, 2], heads=64, key_heads=1, cached=torch.bfloat16)
    assert tiles.first_rows == (4, 2, 0, 5, 6)
    assert tiles.row_counts == (1, 2, 2, 1, 2)


def test_more_heads_than_a_tile_holds_leave_a_row_each() -> None:
    assert row_tiles([3], heads=TILES[torch.float32].queries + 1, key_heads=1, cached=torch.float32).row_counts == (1, 1, 1)


def ints(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int32)


@pytest.mark.parametrize(
    ("starts", "first_rows", "row_counts", "message"),
    [
        (ints(4), ints(2).float(), ints(2), "int32"),
        (ints(4), ints(2), ints(3), r"must be \[2\]"),
        (ints(5), ints(2), ints(2), r"must be \[4\]"),
    ],
)
def test_what_it_cannot_do_is_refused(starts: Tensor, first_rows: Tensor, row_counts: Tensor, message: str) -> None:
    rows = Rows(torch.zeros(4, 8, 32), torch.zeros(4, 16, 2, 2, 32), ints(4), starts, ints(4))
    with pytest.raises(ValueError, match=message):
        attend_chunks(rows, first_rows, row_counts)
