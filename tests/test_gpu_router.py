"""The router kernel chooses what the model's router chooses."""

import random

import pytest
import torch
from torch import Tensor

from afd_ray.kernels.gpu.router import route
from afd_ray.models import step3
from tests.triton_device import DEVICE, DTYPES, noise


def distinct(rows: int, experts: int, seed: int = 0) -> Tensor:
    """Logits without equals in a row, so that the choice is one; a float16 holds them exactly."""
    generator = noise(seed)
    order = [torch.randperm(experts, generator=generator) for _ in range(rows)]
    return torch.stack(order).float() / 32 if order else torch.empty(0, experts)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "experts", "top_k", "normalise"), [(1, 1, 1, False), (5, 48, 3, True), (9, 100, 6, False)])
def test_chooses_what_the_reference_chooses(dtype: torch.dtype, rows: int, experts: int, top_k: int, normalise: bool) -> None:
    logits = distinct(rows, experts).to(dtype)
    ids, weights = route(logits.to(DEVICE), top_k, normalise)
    expected_ids, expected_weights = step3.route(logits, top_k, normalise)
    assert ids.tolist() == expected_ids.tolist()
    torch.testing.assert_close(weights.cpu(), expected_weights, rtol=1e-5, atol=1e-7)


def test_of_equals_the_lower_id_goes_first() -> None:
    assert route(torch.zeros(2, 5, device=DEVICE), 3, False)[0].tolist() == [[0, 1, 2]] * 2


def test_experts_whose_share_underflows_are_still_chosen_once() -> None:
    logits = torch.tensor([[300.0, -300.0, -301.0]], device=DEVICE)
    ids, weights = route(logits, 3, False)
    assert sorted(ids[0].tolist()) == [0, 1, 2]
    assert weights[0].tolist() == [1.0, 0.0, 0.0]


def test_weights_in_the_rows_dtype() -> None:
    logits = distinct(3, 48)
    weights = route(logits.to(DEVICE), 3, False, torch.float16)[1]
    assert torch.allclose(weights.cpu(), step3.route(logits, 3, False)[1].half(), atol=1e-4)


def test_no_rows_are_no_rows() -> None:
    ids, weights = route(torch.zeros(0, 48, device=DEVICE), 3, False)
    assert ids.shape == weights.shape == (0, 3)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(20))
def test_random_shapes(seed: int) -> None:
    rng = random.Random(seed)
    experts = rng.randrange(1, 300)
    logits, top_k, normalise = (
        distinct(rng.randrange(1, 30), experts, seed),
        rng.randrange(1, min(experts, 9) + 1),
        rng.random() < 0.5,
    )
    ids, weights = route(logits.to(DEVICE), top_k, normalise)
    expected_ids, expected_weights = step3.route(logits, top_k, normalise)
    assert ids.tolist() == expected_ids.tolist()
    torch.testing.assert_close(weights.cpu(), expected_weights, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("logits", "top_k", "message"),
    [
        (torch.zeros(2), 1, r"\[N, E\]"),
        (torch.zeros(2, 2000), 1, "1 to 1024"),
        (torch.zeros(4, 2).T, 1, "contiguous"),
        (torch.zeros(2, 4).long(), 1, "no kernel"),
        (torch.zeros(2, 4), 5, "from 1 to 4"),
        (torch.zeros(2, 4), 0, "from 1 to 4"),
    ],
)
def test_what_it_cannot_do_is_refused(logits: Tensor, top_k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        route(logits, top_k, False)
