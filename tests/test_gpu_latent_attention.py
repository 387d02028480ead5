"""The decode kernel over latents equals multi-head latent attention as it is defined: keys and values of each head written out."""

import random
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from afd_ray.engine.kv_cache import slot_indices
from afd_ray.kernels.gpu.latent_attention import TILES, attend_latents
from afd_ray.kernels.gpu.paged_softmax import Rows
from tests.triton_device import CLOSE, DEVICE, DTYPES, error, noise


class Shape(NamedTuple):
    contexts: tuple[int, ...]
    heads: int = 4
    latent: int = 32
    rotary: int = 16
    page: int = 16

    @property
    def scale(self) -> float:
        return float(self.latent + self.rotary) ** -0.5


class Latents(NamedTuple):
    rows: Rows
    expected: Tensor  # [N, A, L] float32


def latents(shape: Shape, dtype: torch.dtype, seed: int = 0) -> Latents:
    """Rows of their own blocks, shuffled, and what attention must give; what lies beyond a context would be seen."""
    rng, generator = random.Random(seed), noise(seed)
    width = shape.latent + shape.rotary
    counts = [-(-context // shape.page) for context in shape.contexts]
    order = rng.sample(range(1, sum(counts) + 1), sum(counts))
    blocks = torch.full((len(order) + 1, shape.page, width), float("nan"))
    q = torch.randn(len(counts), shape.heads, width, generator=generator).to(torch.float16)
    expected = torch.zeros(len(counts), shape.heads, shape.latent)
    starts = [sum(counts[:row]) for row in range(len(counts))]
    for row, (context, start, count) in enumerate(zip(shape.contexts, starts, counts, strict=True)):
        tokens = torch.randn(context, width, generator=generator).to(dtype).float()
        blocks.flatten(0, 1)[slot_indices(order[start : start + count], 0, context, shape.page)] = tokens
        expected[row] = (q[row].float() @ tokens.T * shape.scale).softmax(-1) @ tokens[:, : shape.latent]
    where = (torch.tensor(values, dtype=torch.int32, device=DEVICE) for values in (order, starts, shape.contexts))
    query_dtype = torch.float16 if dtype == torch.float8_e4m3fn else dtype
    return Latents(Rows(q.to(DEVICE, query_dtype), blocks.to(dtype).to(DEVICE), *where), expected)


def found(case: Latents, shape: Shape, splits: int) -> Tensor:
    return attend_latents(case.rows, shape.rotary, scale=shape.scale, splits=splits)


@pytest.mark.parametrize(
    ("dtype", "splits"), [(torch.float32, 3), (torch.float16, 1), (torch.bfloat16, 3), (torch.float8_e4m3fn, 2)], ids=str
)
def test_rows_of_any_context_equal_the_reference(dtype: torch.dtype, splits: int) -> None:
    shape = Shape((0, 1, 31, 32, 33, 256, 257))
    case = latents(shape, dtype)
    assert error(found(case, shape, splits), case.expected) < CLOSE[dtype]


def test_absorbed_projections_give_what_keys_and_values_of_each_head_give() -> None:
    """As the paper defines it: head i has keys [K_i c, r] and values V_i c of a token's latent c and rotary key r."""
    generator, shape, context, plain = noise(3), Shape((70,), heads=3), 70, 24
    up_key, up_value = torch.randn(2, shape.heads, plain, shape.latent, generator=generator).unbind(0)
    latent, rotary = torch.randn(context, shape.latent, generator=generator), torch.randn(context, 16, generator=generator)
    q, q_rotary = torch.randn(shape.heads, plain, generator=generator), torch.randn(shape.heads, 16, generator=generator)
    keys = torch.cat([latent @ up_key.mT, rotary.expand(shape.heads, -1, -1)], 2)  # [A, T, plain + R]
    scale = (plain + 16) ** -0.5
    scores = torch.cat([q, q_rotary], 1)[:, None] @ keys.mT * scale
    expected = scores.softmax(-1) @ (latent @ up_value.mT)  # [A, 1, plain]

    absorbed = torch.cat([(q[:, None] @ up_key)[:, 0], q_rotary], 1)[None]
    blocks = torch.zeros(5, 16, 48)
    blocks.flatten(0, 1)[:context] = torch.cat([latent, rotary], 1)
    where = (torch.tensor(values, dtype=torch.int32, device=DEVICE) for values in (range(5), [0], [context]))
    attended = attend_latents(Rows(absorbed.to(DEVICE), blocks.to(DEVICE), *where), 16, scale=scale, splits=1)
    assert error(attended.cpu()[0, :, None] @ up_value.mT, expected) < CLOSE[torch.float32]


@pytest.mark.parametrize("heads", [64, pytest.param(128, marks=pytest.mark.full)])
def test_the_heads_of_kimi_and_deepseek(heads: int) -> None:
    shape = Shape((70,), heads, latent=512, rotary=64, page=64)
    case = latents(shape, torch.float16)
    assert error(found(case, shape, 1), case.expected) < CLOSE[torch.float16]


@pytest.mark.parametrize("heads", [1, 16, 65])
def test_heads_that_do_not_fill_a_tile_or_need_two(heads: int) -> None:
    shape = Shape((1, 100), heads)
    case = latents(shape, torch.float16)
    assert error(found(case, shape, 1), case.expected) < CLOSE[torch.float16]


def test_rows_of_no_tokens_are_zeros_and_no_rows_are_none() -> None:
    for splits in (1, 4):
        assert not found(latents(Shape((0, 0)), torch.float32), Shape((0, 0)), splits).any()
    assert found(latents(Shape(()), torch.float32), Shape(()), 2).shape == (0, 4, 32)


def test_a_scale_is_that_of_keys_and_values() -> None:
    shape = Shape((100, 300))
    case = latents(shape, torch.float8_e4m3fn)
    small = case.rows._replace(q=case.rows.q / 4)
    scaled = attend_latents(small, shape.rotary, scale=shape.scale, splits=2, cache_scale=4.0)
    assert error(scaled, 4 * case.expected) < CLOSE[torch.float8_e4m3fn]


@pytest.mark.full
@pytest.mark.parametrize("seed", range(15))
def test_random_shapes(seed: int) -> None:
    rng = random.Random(seed)
    contexts = tuple(rng.choice([0, 1, 64, 256, rng.randrange(1500)]) for _ in range(rng.randrange(1, 5)))
    shape = Shape(contexts, rng.randrange(1, 140), rng.choice([16, 64, 128]), rng.choice([16, 32]), rng.choice([1, 16, 128]))
    dtype = rng.choice([*DTYPES, torch.float8_e4m3fn])
    case = latents(shape, dtype, seed)
    assert error(found(case, shape, rng.randrange(1, 9)), case.expected) < CLOSE[dtype], shape


def test_every_dtype_of_a_cache_has_a_tile() -> None:
    assert set(TILES) == {*DTYPES, torch.float8_e4m3fn}


@pytest.mark.parametrize(
    ("changed", "rotary", "message"),
    [
        ({}, 8, "powers of two"),
        ({}, 24, "powers of two"),
        ({"q": torch.zeros(2, 8, 64)}, 16, r"must be \[N, A, L \+ R\]"),
        ({"blocks": torch.zeros(4, 12, 48)}, 16, "powers of two"),
        ({"blocks": torch.zeros(4, 16, 48, dtype=torch.int8)}, 16, "no kernel"),
        ({"contexts": torch.zeros(2, dtype=torch.int64)}, 16, "int32"),
    ],
)
def test_what_it_cannot_do_is_refused(changed: dict[str, Any], rotary: int, message: str) -> None:
    ints = (torch.zeros(2, dtype=torch.int32) for _ in range(3))
    good = Rows(torch.zeros(2, 8, 48), torch.zeros(4, 16, 48), *ints)
    with pytest.raises(ValueError, match=message):
        attend_latents(good._replace(**changed), rotary, scale=1.0, splits=1)
