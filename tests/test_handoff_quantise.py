"""Rows in 8 bits: equal to a loop over single elements in exact arithmetic."""

import math

import pytest
import torch
from torch import Tensor

from afd_ray.handoff.quantise import BLOCK, LARGEST, dequantise, quantise

E4M3 = sorted({code.item() for code in torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()})
"""Every e4m3 number that is not negative; the place of a number is its code."""


def nearest(magnitude: float) -> float:
    """The e4m3 number next to a magnitude up to 448, of two equally near ones that with the even code."""
    return min(enumerate(E4M3), key=lambda known: (abs(known[1] - magnitude), known[0] % 2))[1]


def naive(rows: Tensor) -> tuple[list[list[float]], list[list[int]]]:
    """Values and exponents, an element at a time in float64."""
    values, exponents = [], []
    for row in rows.double().tolist():
        row_values, row_exponents = [], []
        for start in range(0, len(row), BLOCK):
            block = row[start : start + BLOCK]
            exponent = 1
            while max(abs(x) for x in block) > math.ldexp(LARGEST, exponent - 127):
                exponent += 1
            row_exponents.append(exponent)
            row_values += [math.copysign(nearest(abs(math.ldexp(x, 127 - exponent))), x) for x in block]
        values.append(row_values)
        exponents.append(row_exponents)
    return values, exponents


def magnitudes(count: int, columns: int) -> Tensor:
    """Rows whose blocks differ in size by many powers of two."""
    generator = torch.Generator().manual_seed(3)
    spread = torch.randint(-60, 60, (count, columns), generator=generator) // 4
    return torch.randn(count, columns, generator=generator) * torch.exp2(spread.float())


@pytest.mark.parametrize("columns", [1, 127, 128, 129, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_to_a_loop_over_elements(columns: int, dtype: torch.dtype) -> None:
    rows = magnitudes(5, columns).to(dtype)
    values, exponents = quantise(rows)
    assert (values.dtype, values.shape, exponents.dtype) == (torch.float8_e4m3fn, rows.shape, torch.uint8)
    expected_values, expected_exponents = naive(rows)
    assert exponents.tolist() == expected_exponents
    assert values.double().tolist() == expected_values


@pytest.mark.parametrize(("peak", "exponent"), [(448.0, 0), (448.00003, 1), (224.0, -1), (256.0, 0), (1.0, -8), (1.75, -8)])
def test_the_scale_is_the_smallest_power_of_two_that_brings_a_block_within_range(peak: float, exponent: int) -> None:
    rows = torch.zeros(1, BLOCK)
    rows[0, 7] = peak
    assert int(quantise(rows)[1]) - 127 == exponent


def test_back_again_within_a_sixteenth() -> None:
    rows = torch.randn(7, 300, generator=torch.Generator().manual_seed(4))
    back = dequantise(*quantise(rows), torch.float32)
    assert torch.all((back - rows).abs() <= rows.abs() / 16 + rows.abs().amax() * 2.0**-18)


def test_what_e4m3_holds_comes_back_exactly() -> None:
    rows = torch.tensor([[*E4M3, *(-value for value in E4M3)]])
    assert torch.equal(dequantise(*quantise(rows), torch.bfloat16), rows.bfloat16())


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-39])
def test_blocks_of_nothing_and_of_subnormals_have_the_smallest_scale(value: float) -> None:
    rows = torch.full((2, 130), value)
    values, exponents = quantise(rows)
    assert exponents.tolist() == [[1, 1]] * 2
    assert (dequantise(values, exponents, torch.float32) - rows).abs().max() <= max(value / 16, 2.0**-136)


def test_large_numbers_stay_finite() -> None:
    rows = torch.full((1, 4), 1.9 * 2.0**127)
    assert dequantise(*quantise(rows), torch.float32).isfinite().all()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_stays_so_in_its_place_alone(value: float) -> None:
    rows = torch.ones(2, 2 * BLOCK)
    rows[0, 5] = value
    back = dequantise(*quantise(rows), torch.float32)
    assert (~back.isfinite()).nonzero().tolist() == [[0, 5]]
    assert torch.all(back[0, BLOCK:] == 1.0)
    assert torch.all(back[1] == 1.0)


def test_no_rows_are_no_rows() -> None:
    values, exponents = quantise(torch.zeros(0, 300))
    assert (values.shape, exponents.shape) == ((0, 300), (0, 3))
    assert dequantise(values, exponents, torch.float32).shape == (0, 300)
