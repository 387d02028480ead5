"""The kernel that rotates and writes equals the model's rotation and the cache's own write."""

import random

import pytest
import torch
from torch import Tensor

from afd_ray.engine.kv_cache import PagedCache
from afd_ray.kernels.gpu.rope_kv_write import rotate_and_write
from afd_ray.models.step3 import rotary_table, rotate
from tests.triton_device import DEVICE, DTYPES, error, noise

THETA = 500000.0


class Rows:
    """Rows of a micro-batch, k and v side by side in a product as wide as `beside` more columns."""

    def __init__(self, count: int, heads: int, dim: int, dtype: torch.dtype, beside: int = 0, seed: int = 0) -> None:
        generator = noise(seed)
        self.q = torch.randn(count, heads, dim, generator=generator).to(dtype)
        self.product = torch.randn(count, beside + 2 * dim, generator=generator).to(dtype)
        self.beside, self.dim = beside, dim
        self.cos, self.sin = rotary_table(torch.randint(0, 65536, (count,), generator=generator), dim, THETA)
        self.slots = torch.randperm(count + 20, generator=generator)[:count]
        self.size = count + 20

    def run(self, cached: torch.dtype, **scales: float) -> tuple[Tensor, Tensor]:
        """Rotated q, and what is then in a cache of ones."""
        q, product, cos, sin, slots = (t.clone().to(DEVICE) for t in (self.q, self.product, self.cos, self.sin, self.slots))
        k, v = product[:, self.beside :].split(self.dim, dim=1)
        tokens = torch.ones(self.size, 2 * self.dim).to(cached).to(DEVICE)
        rotate_and_write(q, k, v, cos, sin, slots, tokens, **scales)
        return q.cpu(), tokens.cpu()

    def expected(self) -> tuple[Tensor, Tensor]:
        cache = PagedCache(layers=1, num_blocks=self.size, block_size=1, head_dim=self.dim, dtype=self.q.dtype)
        cache.blocks.fill_(1.0)
        k, v = self.product[:, self.beside :].split(self.dim, dim=1)
        cache.write(0, self.slots, rotate(k, self.cos, self.sin), v)
        return rotate(self.q, self.cos[:, None], self.sin[:, None]), cache.blocks[0].squeeze(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("count", "heads", "dim"), [(1, 1, 2), (3, 8, 16), (5, 9, 32), (2, 64, 256)])
def test_equals_rotation_and_write(dtype: torch.dtype, count: int, heads: int, dim: int) -> None:
    rows = Rows(count, heads, dim, dtype)
    for found, expected in zip(rows.run(dtype), rows.expected(), strict=True):
        assert error(found, expected) < 1e-3


def test_values_and_other_slots_are_untouched() -> None:
    rows = Rows(3, 4, 16, torch.float32)
    (_, tokens), (_, expected) = rows.run(torch.float32), rows.expected()
    assert torch.equal(tokens[:, 16:], expected[:, 16:])
    others = torch.ones(rows.size, dtype=torch.bool).index_fill_(0, rows.slots, False)
    assert torch.all(tokens[others] == 1.0)


def test_keys_and_values_as_columns_of_a_wider_product() -> None:
    rows = Rows(4, 2, 16, torch.float16, beside=48)
    assert error(rows.run(torch.float16)[1], rows.expected()[1]) < 1e-3


def test_into_e4m3_by_the_scales() -> None:
    rows = Rows(6, 2, 32, torch.float32)
    tokens = rows.run(torch.float8_e4m3fn, key_scale=0.25, value_scale=2.0)[1].float()
    scaled = rows.expected()[1] / torch.tensor([0.25, 2.0]).repeat_interleave(32)
    assert torch.equal(tokens[rows.slots], scaled[rows.slots].to(torch.float8_e4m3fn).float())


def test_what_e4m3_cannot_hold_is_cut_off() -> None:
    rows = Rows(2, 2, 16, torch.float32)
    rows.product *= 1e6
    tokens = rows.run(torch.float8_e4m3fn)[1].float()
    assert tokens.isfinite().all()
    assert tokens.abs().max() == 448.0


def test_no_rows_write_nothing() -> None:
    q, tokens = Rows(0, 4, 16, torch.float32).run(torch.float32)
    assert q.shape == (0, 4, 16)
    assert torch.all(tokens == 1.0)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(20))
def test_random_shapes(seed: int) -> None:
    rng = random.Random(seed)
    dtype = rng.choice(DTYPES)
    rows = Rows(rng.randrange(1, 20), rng.randrange(1, 70), 1 << rng.randrange(1, 9), dtype, rng.randrange(100), seed)
    for found, expected in zip(rows.run(dtype), rows.expected(), strict=True):
        assert error(found, expected) < 1e-3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": torch.zeros(2, 3, 24)}, "power of two"),
        ({"k": torch.zeros(2, 8)}, r"k must be \[2, 16\]"),
        ({"cos": torch.zeros(2, 16)}, r"cos must be \[2, 8\]"),
        ({"v": torch.zeros(2, 16).half()}, "no kernel"),
        ({"tokens": torch.zeros(9, 32).half()}, "the cache must hold"),
        ({"slots": torch.zeros(2)}, "slots integers"),
        ({"k": torch.zeros(16, 2).T}, "contiguous"),
    ],
)
def test_what_it_cannot_do_is_refused(changed: dict[str, Tensor], message: str) -> None:
    good = {"q": torch.zeros(2, 3, 16), "k": torch.zeros(2, 16), "v": torch.zeros(2, 16), "cos": torch.zeros(2, 8)}
    good |= {"sin": torch.zeros(2, 8), "slots": torch.zeros(2, dtype=torch.int64), "tokens": torch.zeros(9, 32)}
    with pytest.raises(ValueError, match=message):
        rotate_and_write(**good | changed)
