"""Products of rows and weights in e4m3, interpreted on a CPU or on a GPU."""

import random

import pytest
import torch
from torch import Tensor

from afd_ray.handoff.quantise import dequantise, quantise
from afd_ray.kernels.gpu import linear
from afd_ray.kernels.gpu.linear import ScaledWeight, joined, product, rounded_product, splits_for
from afd_ray.kernels.gpu.norm_quantise import add_norm_quantise
from afd_ray.kernels.gpu.rope_kv_write import rotate_and_write
from afd_ray.kernels.quantised import dequantise_weight, quantise_weight
from afd_ray.models.step3 import Narrow, rms_norm, rotary_table, rotate
from tests.triton_device import CLOSE, DEVICE, DTYPES, error, noise

E4M3 = torch.float8_e4m3fn


def rows_of(count: int, inputs: int) -> tuple[Narrow, Tensor]:
    """And what they stand for."""
    narrow = Narrow(*quantise(torch.randn(count, inputs, generator=noise(count))))
    return Narrow(*(tensor.to(DEVICE) for tensor in narrow)), dequantise(*narrow, torch.float32)


def weight_of(inputs: int, *outputs: int) -> tuple[ScaledWeight, Tensor]:
    """Blocks of very different sizes, and what they stand for."""
    pairs = [quantise_weight(torch.randn(count, inputs, generator=noise(count + i))) for i, count in enumerate(outputs)]
    pairs = [(values, scales * (1 + torch.arange(scales.numel()).view(scales.shape))) for values, scales in pairs]
    values, scales, tile = joined(pairs)
    return ScaledWeight(values.to(DEVICE), scales.to(DEVICE), tile), torch.cat([dequantise_weight(*pair) for pair in pairs])


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(1, 128, (64,)), (3, 640, (128, 64, 64)), (65, 256, (256, 128)), (64, 1536, (128,))]
)
@pytest.mark.parametrize("busy", [1, 6])
def test_equals_the_product_of_what_both_stand_for(
    rows: int, inputs: int, outputs: tuple[int, ...], busy: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "multiprocessors", lambda device: busy)
    (narrow, x), (weight, wide) = rows_of(rows, inputs), weight_of(inputs, *outputs)
    found = product(narrow, weight)
    assert len(found.sums) == splits_for(-(-rows // 64) * (sum(outputs) // weight.tile), inputs // 128, busy)
    assert error(found.rounded(torch.float32), x @ wide.T) < CLOSE[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_product_that_is_not_split_is_rounded(dtype: torch.dtype) -> None:
    (narrow, x), (weight, wide) = rows_of(5, 256), weight_of(256, 192)
    found = rounded_product(narrow, weight, dtype)
    assert found.dtype == dtype
    assert error(found, x @ wide.T) < CLOSE[dtype]


def test_splits_of_which_the_last_has_no_blocks_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "splits_for", lambda *arguments: 4)
    (narrow, x), (weight, wide) = rows_of(2, 640), weight_of(640, 128)
    found = product(narrow, weight)
    assert not found.sums[3].any()
    assert error(found.rounded(torch.float32), x @ wide.T) < CLOSE[torch.float32]


def test_no_rows_are_no_rows() -> None:
    (narrow, _), (weight, _) = rows_of(0, 128), weight_of(128, 128)
    assert product(narrow, weight).sums.shape[1:] == (0, 128)


def test_a_norm_adds_up_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "multiprocessors", lambda device: 6)
    (narrow, _), (weight, _) = rows_of(3, 1024), weight_of(1024, 128, 256)
    parts = product(narrow, weight).columns(128, 256)
    assert len(parts.sums) > 1
    for dtype in DTYPES:
        gain = torch.rand(256, generator=noise(1)).to(dtype).to(DEVICE)
        residual, update = (torch.randn(3, 256, generator=noise(seed)).to(dtype).to(DEVICE) for seed in (2, 3))
        alone = add_norm_quantise(None, None, gain, 1e-5, product=parts)
        right = rms_norm(parts.rounded(dtype), gain, 1e-5)
        assert error(alone.hidden, right) < CLOSE[dtype]
        assert alone.values is not None
        assert alone.exponents is not None
        assert torch.equal(alone.values.view(torch.uint8), quantise(alone.hidden.cpu())[0].to(DEVICE).view(torch.uint8))
        added = add_norm_quantise(residual, update[None], gain, 1e-5, product=parts, scales=None)
        assert error(added.residual, (residual + parts.rounded(dtype)) + update) < CLOSE[dtype]
        assert error(added.hidden, rms_norm(added.residual, gain, 1e-5)) < CLOSE[dtype]


@pytest.mark.parametrize("cached", [torch.float16, E4M3], ids=str)
def test_keys_and_values_are_added_up_where_they_are_written(cached: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "multiprocessors", lambda device: 6)
    (narrow, _), (weight, _) = rows_of(2, 1024), weight_of(1024, 128, 64, 64)
    together = product(narrow, weight)
    assert len(together.sums) > 1
    k, v = together.columns(128, 64), together.columns(192, 64)
    q = torch.randn(2, 2, 64, generator=noise(1)).half().to(DEVICE)
    cos, sin = rotary_table(torch.tensor([3, 70], device=DEVICE), 64, 1e4)
    found, right = (torch.zeros(4, 128, dtype=cached, device=DEVICE) for _ in range(2))
    slots = torch.tensor([2, 0], dtype=torch.int32, device=DEVICE)
    rotate_and_write(q.clone(), k, v, cos, sin, slots, found)
    rotate_and_write(q.clone(), k.rounded(q.dtype), v.rounded(q.dtype), cos, sin, slots, right)
    assert torch.equal(found.view(torch.uint8), right.view(torch.uint8))
    assert error(found[2, :64].float(), rotate(k.rounded(q.dtype), cos, sin)[0].float()) < (0.05 if cached == E4M3 else 1e-3)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(20))
def test_random_shapes(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    monkeypatch.setattr(linear, "multiprocessors", lambda device: rng.randrange(1, 20))
    outputs = [64 * rng.randrange(1, 5) for _ in range(rng.randrange(1, 4))]
    (narrow, x), (weight, wide) = (
        rows_of(rng.randrange(1, 150), inputs := 128 * rng.randrange(1, 20)),
        weight_of(inputs, *outputs),
    )
    assert error(product(narrow, weight).rounded(torch.float32), x @ wide.T) < CLOSE[torch.float32]


def test_what_it_cannot_do_is_refused() -> None:
    (narrow, _), (weight, _) = rows_of(2, 256), weight_of(256, 128)
    with pytest.raises(ValueError, match="X a multiple of 128"):
        product(narrow, weight_of(128, 128)[0])
    with pytest.raises(ValueError, match="exponents must be"):
        product(narrow._replace(exponents=narrow.exponents[:, :1]), weight)
    with pytest.raises(ValueError, match="scales must be"):
        product(narrow, weight._replace(scales=weight.scales.half()))
    with pytest.raises(ValueError, match="outputs must be multiples of 64, got 96"):
        joined([quantise_weight(torch.zeros(96, 128))])
    parts = product(narrow, weight)
    gain = torch.ones(128, device=DEVICE)
    with pytest.raises(ValueError, match=r"a product must be float32 \[S, N, 128\]"):
        add_norm_quantise(None, None, gain, 1e-5, product=parts.columns(0, 64))
    with pytest.raises(ValueError, match="a residual or a product is needed"):
        add_norm_quantise(None, None, gain, 1e-5)
    with pytest.raises(ValueError, match="a product must be"):
        add_norm_quantise(torch.zeros(3, 128, device=DEVICE), None, gain, 1e-5, product=parts)
