"""The norm kernel equals the model's norm and the wire's e4m3."""

import math
import random

import pytest
import torch
from torch import Tensor

from afd_ray.handoff.quantise import BLOCK, quantise
from afd_ray.kernels.gpu.norm_quantise import Normalised, add_norm_quantise
from afd_ray.models.step3 import rms_norm
from tests.triton_device import CLOSE, DEVICE, DTYPES, error, noise

EPSILON = 1e-5
E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


class Inputs:
    """Rows, updates and a weight."""

    def __init__(self, rows: int, width: int, updates: int | None, dtype: torch.dtype, seed: int = 0) -> None:
        generator = noise(seed)
        self.residual = torch.randn(rows, width, generator=generator).to(dtype)
        self.updates = None if updates is None else torch.randn(updates, rows, width, generator=generator).to(dtype)
        self.weight = torch.randn(width, generator=generator).to(dtype)

    def expected(self) -> tuple[Tensor, Tensor]:
        total = self.residual
        for update in self.updates if self.updates is not None else ():
            total = total + update
        return total, rms_norm(total, self.weight, EPSILON)

    def found(self, scales: str | None = "block") -> Normalised:
        updates = None if self.updates is None else self.updates.to(DEVICE)
        return add_norm_quantise(self.residual.to(DEVICE), updates, self.weight.to(DEVICE), EPSILON, scales=scales)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width", "updates"), [(1, 1, 1), (3, 128, None), (3, 129, 2), (2, 300, 3), (2, 7168, 2)])
def test_sum_and_norm_equal_the_model_s(dtype: torch.dtype, rows: int, width: int, updates: int | None) -> None:
    inputs = Inputs(rows, width, updates, dtype)
    total, hidden = inputs.expected()
    found = inputs.found()
    assert torch.equal(found.residual.cpu(), total)
    assert found.hidden.dtype == dtype
    assert error(found.hidden, hidden) < CLOSE[dtype]


@pytest.mark.parametrize(
    ("dtype", "width"),
    [
        (torch.float32, 1),
        (torch.float32, 127),
        (torch.float32, 128),
        (torch.float16, 129),
        (torch.bfloat16, 300),
        (torch.bfloat16, 7168),
    ],
    ids=str,
)
def test_e4m3_of_blocks_is_the_wire_s(dtype: torch.dtype, width: int) -> None:
    found = Inputs(3, width, 1, dtype).found()
    values, exponents = quantise(found.hidden.cpu())
    assert found.values is not None
    assert found.exponents is not None
    assert found.exponents.tolist() == exponents.tolist()
    assert torch.equal(found.values.cpu().float(), values.float())


@pytest.mark.parametrize("width", [127, 300, 7168])
def test_a_row_s_scale_is_the_largest_of_its_blocks(width: int) -> None:
    found = Inputs(3, width, 1, torch.float32).found("row")
    exponents = quantise(found.hidden.cpu())[1].amax(1, keepdim=True)
    assert found.values is not None
    assert found.exponents is not None
    assert found.exponents.tolist() == exponents.tolist()
    scaled = found.hidden.cpu() * torch.exp2(127.0 - exponents.int())
    assert torch.equal(found.values.cpu().float(), scaled.to(torch.float8_e4m3fn).float())


def test_what_e4m3_holds_is_kept_exactly() -> None:
    """Rows of one magnitude have a norm of 1 but for epsilon: times a weight of e4m3 numbers, they come out as these.

    A power of two of them: a GPU's division by any other number may be off by a bit, which doubles a scale.
    """
    weight = E4M3.nan_to_num(0.0)
    found = add_norm_quantise(torch.full((2, len(weight)), 256.0, device=DEVICE), None, weight.to(DEVICE), 0.0)
    assert found.values is not None
    assert found.exponents is not None
    scales = torch.exp2(found.exponents.cpu().float() - 127).repeat_interleave(BLOCK, 1)[:, : len(weight)]
    assert torch.equal(found.values.cpu().float() * scales, weight.expand(2, -1))


def test_without_updates_the_residual_is_given_back() -> None:
    inputs = Inputs(2, 40, None, torch.float32)
    residual = inputs.residual.to(DEVICE)
    assert add_norm_quantise(residual, None, inputs.weight.to(DEVICE), EPSILON).residual is residual


def test_partial_rows_are_added_in_the_order_of_their_places() -> None:
    """As ranks return them: some rows from each, in the order in which they came."""
    inputs = Inputs(4, 300, None, torch.bfloat16)
    partials = torch.randn(5, 300, generator=noise(1)).to(torch.bfloat16)
    places = torch.tensor([[4, -1, 0, -1], [2, 1, -1, -1], [0, 3, -1, -1]], dtype=torch.int32)
    expected = inputs.residual.clone()
    for of_rows in places:
        for row, place in enumerate(of_rows.tolist()):
            if place >= 0:
                expected[row] += partials[place]
    found = add_norm_quantise(
        inputs.residual.to(DEVICE), partials.to(DEVICE), inputs.weight.to(DEVICE), EPSILON, places=places.to(DEVICE)
    )
    assert torch.equal(found.residual.cpu(), expected)
    assert error(found.hidden, rms_norm(expected, inputs.weight, EPSILON)) < CLOSE[torch.bfloat16]


@pytest.mark.parametrize(
    ("updates", "places", "message"),
    [
        (None, torch.zeros(1, 2, dtype=torch.int32), "without updates"),
        (torch.zeros(3, 4), torch.zeros(1, 3, dtype=torch.int32), r"places \[U, 2\]"),
        (torch.zeros(3, 4), torch.zeros(1, 2, dtype=torch.int64), "int32"),
    ],
)
def test_places_that_fit_no_rows_are_refused(updates: Tensor | None, places: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        add_norm_quantise(torch.zeros(2, 4), updates, torch.zeros(4), EPSILON, places=places)


def test_without_e4m3() -> None:
    found = Inputs(2, 40, 1, torch.float32).found(None)
    assert (found.values, found.exponents) == (None, None)


def test_a_row_of_zeros_is_zeros_of_the_smallest_scale() -> None:
    found = add_norm_quantise(torch.zeros(1, 130, device=DEVICE), None, torch.ones(130, device=DEVICE), EPSILON)
    assert found.values is not None
    assert found.exponents is not None
    assert found.exponents.tolist() == [[1, 1]]
    assert not found.values.float().any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in which the interpreter computes
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_finite_spoils_its_row_alone(value: float) -> None:
    inputs = Inputs(2, 200, None, torch.float32)
    inputs.residual[0, 5] = value
    found = inputs.found()
    assert found.values is not None
    assert not found.values[0].float().isfinite().all()
    assert found.values[1].float().isfinite().all()


def test_no_rows_are_no_rows() -> None:
    found = Inputs(0, 300, 2, torch.float32).found()
    assert [None if part is None else list(part.shape) for part in found] == [[0, 300], [0, 300], [0, 300], [0, 3]]


@pytest.mark.full
@pytest.mark.parametrize("seed", range(20))
def test_random_shapes(seed: int) -> None:
    rng = random.Random(seed)
    dtype = rng.choice(DTYPES)
    inputs = Inputs(rng.randrange(1, 9), rng.randrange(1, 9000), rng.choice([None, 1, 2, 5]), dtype, seed)
    found, (total, hidden) = inputs.found(), inputs.expected()
    assert torch.equal(found.residual.cpu(), total)
    assert error(found.hidden, hidden) < CLOSE[dtype]


@pytest.mark.parametrize(
    ("residual", "updates", "weight", "scales", "message"),
    [
        (torch.zeros(2, 4), None, torch.zeros(5), "block", r"weight \[H\]"),
        (torch.zeros(2, 20000), None, torch.zeros(20000), "block", "16384"),
        (torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(4), "block", r"updates must be \[U, 2, 4\]"),
        (torch.zeros(2, 4), torch.zeros(1, 2, 4).half(), torch.zeros(4), "block", "no kernel"),
        (torch.zeros(2, 4).double(), None, torch.zeros(4).double(), "block", "no kernel"),
        (torch.zeros(4, 2).T, None, torch.zeros(4), "block", "contiguous"),
        (torch.zeros(2, 4), None, torch.zeros(4), "tensor", "block, row or None"),
    ],
)
def test_what_it_cannot_do_is_refused(
    residual: Tensor, updates: Tensor | None, weight: Tensor, scales: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        add_norm_quantise(residual, updates, weight, EPSILON, scales=scales)
