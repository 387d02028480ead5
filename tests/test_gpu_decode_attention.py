"""The decode attention kernel equals the model's attention over whole keys and values."""

import random
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from afd_ray.engine.kv_cache import PagedCache, slot_indices
from afd_ray.kernels.gpu.decode_attention import SHORTEST_SPLIT, TILES, attend, attend_narrow, splits_for
from afd_ray.kernels.gpu.paged_softmax import Rows
from afd_ray.kernels.gpu.quantise_rows import quantise_rows, room
from afd_ray.models import step3
from afd_ray.models.step3 import Narrow
from tests.triton_device import CLOSE, DEVICE, DTYPES, error, noise


class Shape(NamedTuple):
    contexts: tuple[int, ...]
    heads: int = 4
    key_heads: int = 1
    dim: int = 32
    page: int = 16


class Paged(NamedTuple):
    rows: Rows
    expected: Tensor  # [N, A, D] float32

    def scaled(self, factor: float) -> Rows:
        return self.rows._replace(q=self.rows.q * factor)


def paged(shape: Shape, dtype: torch.dtype, seed: int = 0) -> Paged:
    """Rows of their own blocks, shuffled, and what attention must give; what lies beyond a context would be seen."""
    rng, generator = random.Random(seed), noise(seed)
    counts = [-(-context // shape.page) for context in shape.contexts]
    order = list(range(1, sum(counts) + 2))
    rng.shuffle(order)
    blocks = torch.full((len(order) + 1, shape.page, shape.key_heads, 2, shape.dim), float("nan"), dtype=torch.float32)
    q = torch.randn(len(counts), shape.heads, shape.dim, generator=generator).to(torch.float16)
    tables: list[int] = []
    starts, expected = [], []
    for row, (context, count) in enumerate(zip(shape.contexts, counts, strict=True)):
        starts.append(len(tables))
        tables += order[len(tables) : len(tables) + count]
        tokens = torch.randn(context, shape.key_heads, 2, shape.dim, generator=generator).to(dtype).float()
        blocks.flatten(0, 1)[slot_indices(tables[starts[row] :], 0, context, shape.page)] = tokens
        expected.append(whole(q[row].float(), tokens))
    on_device = (torch.tensor(values, dtype=torch.int32, device=DEVICE) for values in (tables, starts, shape.contexts))
    query_dtype = torch.float16 if dtype == torch.float8_e4m3fn else dtype
    empty = torch.empty(0, shape.heads, shape.dim)
    rows = Rows(q.to(DEVICE, query_dtype), blocks.to(dtype).to(DEVICE), *on_device)
    return Paged(rows, torch.stack(expected) if expected else empty)


def whole(q: Tensor, tokens: Tensor) -> Tensor:
    """q [A, D] over tokens [T, G, 2, D]: [A, D]; zeros over none."""
    if not len(tokens):
        return torch.zeros_like(q)
    groups = q.chunk(tokens.shape[1])
    return torch.cat(
        [step3.attend(group[None], *tokens[:, head].unbind(1), len(tokens) - 1)[0] for head, group in enumerate(groups)]
    )


AROUND_A_SPLIT = (SHORTEST_SPLIT - 1, SHORTEST_SPLIT, SHORTEST_SPLIT + 1)
AROUND_A_TILE = (0, 1, 63, 64, 65)


@pytest.mark.parametrize(
    ("dtype", "splits"),
    [(torch.float32, 1), (torch.float16, 3), (torch.bfloat16, 1), (torch.float8_e4m3fn, 3)],
    ids=str,
)
def test_rows_of_any_context_equal_the_reference(dtype: torch.dtype, splits: int) -> None:
    case = paged(Shape((*AROUND_A_TILE, *AROUND_A_SPLIT, 600)), dtype)
    assert error(attend(case.rows, splits=splits), case.expected) < CLOSE[dtype]


def test_the_heads_of_step_3() -> None:
    case = paged(Shape((300,), heads=64, dim=256, page=64), torch.float16)
    assert error(attend(case.rows, splits=2), case.expected) < CLOSE[torch.float16]


@pytest.mark.parametrize(("heads", "key_heads"), [(1, 1), (12, 4), (40, 1), (130, 2)])
def test_heads_that_do_not_fill_a_tile_or_need_two(heads: int, key_heads: int) -> None:
    case = paged(Shape((1, 100), heads, key_heads, dim=16), torch.float16)
    assert error(attend(case.rows, splits=1), case.expected) < CLOSE[torch.float16]


@pytest.mark.parametrize("page", [1, 8, 256])
def test_blocks_smaller_and_larger_than_a_tile(page: int) -> None:
    case = paged(Shape((1, 64, 257), page=page), torch.float16)
    assert error(attend(case.rows, splits=2), case.expected) < CLOSE[torch.float16]


def test_splits_without_a_token_count_for_nothing() -> None:
    case = paged(Shape((0, 1, SHORTEST_SPLIT, 2 * SHORTEST_SPLIT), heads=1), torch.float16)
    assert error(attend(case.rows, splits=8), case.expected) < CLOSE[torch.float16]


def test_a_row_of_no_tokens_is_zeros() -> None:
    for splits in (1, 4):
        assert not attend(paged(Shape((0, 0)), torch.float32).rows, splits=splits).any()


def test_no_rows_are_no_rows() -> None:
    assert attend(paged(Shape(()), torch.float32).rows, splits=2).shape == (0, 4, 32)


def test_scales_of_keys_and_values() -> None:
    case = paged(Shape((100, 300)), torch.float8_e4m3fn)
    found = attend(case.scaled(0.25), splits=2, key_scale=4.0, value_scale=0.5)
    assert error(found, case.expected / 2) < CLOSE[torch.float8_e4m3fn]


def test_scores_far_apart_stay_finite() -> None:
    case = paged(Shape((5, 300)), torch.float32)
    assert attend(case.scaled(1e4), splits=2).isfinite().all()


def test_a_row_does_not_depend_on_its_batch_mates() -> None:
    case = paged(Shape((300, 5, 70)), torch.float32)
    q, blocks, tables, starts, contexts = case.rows
    alone = attend(Rows(q[1:2], blocks, tables, starts[1:2], contexts[1:2]), splits=2)
    assert torch.equal(attend(case.rows, splits=2)[1:2], alone)


def test_what_the_splits_of_a_row_give_is_not_rounded_before_it_is_combined() -> None:
    """Queries of zeros give means of values, whose sums are exact."""
    case = paged(Shape((600, 999)), torch.bfloat16)
    means = paged(Shape((600, 999)), torch.bfloat16).rows._replace(q=torch.zeros_like(case.rows.q))
    whole, split = (attend(means, splits=splits) for splits in (1, 3))
    assert (whole == split).float().mean() > 0.99


def test_rows_may_share_a_table() -> None:
    """As the rows of a prompt do."""
    case = paged(Shape((40,)), torch.float32)
    q, starts = case.rows.q.expand(3, -1, -1).contiguous(), case.rows.starts.expand(3).contiguous()
    contexts = torch.tensor([38, 39, 40], dtype=torch.int32, device=DEVICE)
    out = attend(case.rows._replace(q=q, starts=starts, contexts=contexts), splits=1)
    assert error(out[2:], case.expected) < CLOSE[torch.float32]
    assert not torch.equal(out[1], out[2])


def test_reads_the_engine_s_cache_as_it_lies() -> None:
    cache = PagedCache(layers=2, num_blocks=9, block_size=8, head_dim=16, dtype=torch.float32)
    table, (k, v), q = [5, 2, 7], torch.randn(2, 20, 16, generator=noise(1)), torch.randn(1, 4, 16, generator=noise(2))
    cache.write(1, torch.tensor(slot_indices(table, 0, 20, 8)), k, v)
    blocks = cache.blocks[1].view(9, 8, 1, 2, 16).to(DEVICE)
    where = (torch.tensor(values, dtype=torch.int32, device=DEVICE) for values in (table, [0], [20]))
    found = attend(Rows(q.to(DEVICE), blocks, *where), splits=1)
    assert error(found, step3.attend(q, k, v, 19)) < CLOSE[torch.float32]


@pytest.mark.full
@pytest.mark.parametrize("seed", range(15))
def test_random_shapes(seed: int) -> None:
    rng = random.Random(seed)
    key_heads = rng.choice([1, 1, 2, 8])
    contexts = tuple(rng.choice([0, 1, 16, 64, 256, rng.randrange(1500)]) for _ in range(rng.randrange(1, 6)))
    shape = Shape(contexts, key_heads * rng.randrange(1, 70), key_heads, rng.choice([16, 64, 128]), rng.choice([1, 16, 64, 128]))
    dtype = rng.choice([*DTYPES, torch.float8_e4m3fn])
    case = paged(shape, dtype, seed)
    assert error(attend(case.rows, splits=rng.randrange(1, 9)), case.expected) < CLOSE[dtype], shape


def check_narrow(rows: Rows, splits: int, **scales: float) -> Tensor:
    """What is attended in e4m3, among rows of others, is to the bit what is attended, then quantised; gives the values, unscaled."""
    count, heads, dim = rows.q.shape
    among = room(count + 2, heads * dim, rows.q.device)
    for tensor in among:
        tensor.view(torch.uint8).fill_(0xAA)
    attend_narrow(rows, Narrow(*(tensor[1:-1] for tensor in among)), splits=splits, **scales)
    right = quantise_rows(attend(rows, splits=splits, **scales).flatten(0, 1))  # blocks are within heads
    for found, expected in zip(among, right, strict=True):
        codes = found.view(torch.uint8)
        assert torch.equal(codes[1:-1], expected.view(torch.uint8).view_as(codes[1:-1]))
        assert (codes[[0, -1]] == 0xAA).all()
    return among.values[1:-1].float()


@pytest.mark.parametrize(
    ("dtype", "splits"),
    [(torch.float32, 1), (torch.float16, 3), (torch.bfloat16, 1), (torch.bfloat16, 3), (torch.float8_e4m3fn, 1)],
    ids=str,
)
def test_in_e4m3_it_is_what_was_rounded_then_quantised(dtype: torch.dtype, splits: int) -> None:
    check_narrow(paged(Shape((*AROUND_A_TILE, *AROUND_A_SPLIT, 600), dim=128), dtype).rows, splits)


@pytest.mark.parametrize("splits", [1, 2])
def test_in_e4m3_with_two_scales_a_head_and_heads_that_do_not_fill_a_tile(splits: int) -> None:
    check_narrow(paged(Shape((0, 1, 300), heads=21, key_heads=3, dim=256), torch.bfloat16).rows, splits)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("splits", [1, 2])
def test_in_e4m3_what_the_model_s_dtype_cannot_hold_stays_not_finite(splits: int) -> None:
    rows, scales = paged(Shape((0, 300), dim=128), torch.float8_e4m3fn).rows, {"key_scale": 0.5, "value_scale": 1e6}
    finite = attend(rows, splits=splits, **scales).flatten(1).isfinite()
    assert torch.equal(check_narrow(rows, splits, **scales).isfinite(), finite)
    assert 0 < finite[1].sum() < finite.shape[1]


def test_no_rows_and_heads_smaller_than_a_block_in_e4m3() -> None:
    check_narrow(paged(Shape((), dim=128), torch.float32).rows, splits=2)
    with pytest.raises(ValueError, match=r"head_dim must be a multiple of 128 .* got 64"):
        check_narrow(paged(Shape((1,), dim=64), torch.float32).rows, splits=1)
    with pytest.raises(ValueError, match="needs room"):
        attend_narrow(paged(Shape((1,), dim=128), torch.float32).rows, room(1, 128, torch.device(DEVICE)), splits=1)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(12))
def test_random_shapes_in_e4m3(seed: int) -> None:
    rng = random.Random(seed)
    key_heads = rng.choice([1, 1, 2, 8])
    contexts = tuple(rng.choice([0, 1, 64, 256, rng.randrange(1500)]) for _ in range(rng.randrange(1, 6)))
    shape = Shape(contexts, key_heads * rng.randrange(1, 40), key_heads, rng.choice([128, 256]), rng.choice([1, 16, 64]))
    rows = paged(shape, rng.choice([*DTYPES, torch.float8_e4m3fn]), seed).rows
    check_narrow(rows, rng.randrange(1, 9), key_scale=rng.choice([1.0, 0.3]), value_scale=rng.choice([1.0, 1e-4, 700.0]))


@pytest.mark.parametrize(("programs", "expected"), [(0, 1), (1, 29), (16, 8), (64, 2), (128, 1), (132, 1), (256, 1), (4096, 1)])
def test_few_rows_are_split_until_they_fill_an_h100(programs: int, expected: int) -> None:
    assert splits_for(programs, 132) == expected


def test_every_dtype_has_a_tile_whose_span_is_whole_tiles() -> None:
    assert all(SHORTEST_SPLIT % tile.tokens == 0 for tile in TILES.values())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": torch.zeros(2, 3, 32)}, "multiple of the key heads"),
        ({"q": torch.zeros(2, 8, 16)}, r"must be \[N, A, D\]"),
        ({"q": torch.zeros(2, 8, 32, dtype=torch.float64)}, "no kernel"),
        ({"q": torch.zeros(2, 32, 8).transpose(1, 2)}, "contiguous"),
        ({"blocks": torch.zeros(4, 12, 2, 2, 32)}, "powers of two"),
        ({"blocks": torch.zeros(4, 16, 2, 2, 32, dtype=torch.int8)}, "no kernel"),
        ({"contexts": torch.zeros(2, dtype=torch.int64)}, "int32"),
        ({"starts": torch.zeros(3, dtype=torch.int32)}, r"must be \[2\]"),
        ({"splits": 33}, "from 1 to 32"),
    ],
)
def test_what_it_cannot_do_is_refused(changed: dict[str, Any], message: str) -> None:
    splits = changed.pop("splits", 1)
    ints = (torch.zeros(2, dtype=torch.int32) for _ in range(3))
    good = Rows(torch.zeros(2, 8, 32), torch.zeros(4, 16, 2, 2, 32), *ints)
    with pytest.raises(ValueError, match=message):
        attend(good._replace(**changed), splits=splits)
