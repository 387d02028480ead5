"""The grouped products equal the model's experts, in e4m3 those of dequantised weights and rows."""

import random
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from afd_ray.handoff.quantise import BLOCK, dequantise, quantise
from afd_ray.kernels.gpu.expert_gemm import Experts, feed_every_row, feed_forward
from afd_ray.models import step3
from tests.triton_device import CLOSE, DEVICE, DTYPES, error, noise


class Shape(NamedTuple):
    rows: int
    experts: int = 3
    top_k: int = 2
    hidden: int = 128
    inner: int = 64


class Layer(NamedTuple):
    """Experts and rows in float32, or what a narrower dtype holds of them."""

    experts: Experts
    x: Tensor
    ids: Tensor
    weights: Tensor


def layer(shape: Shape, seed: int = 0) -> Layer:
    generator = noise(seed)
    count, hidden, inner = shape.experts, shape.hidden, shape.inner
    gate, up, down = (
        torch.randn(count, *size, generator=generator) / size[1] ** 0.5
        for size in ((inner, hidden), (inner, hidden), (hidden, inner))
    )
    x = torch.randn(shape.rows, hidden, generator=generator)
    ids = torch.rand(shape.rows, count, generator=generator).argsort(1)[:, : shape.top_k].contiguous()
    return Layer(Experts(gate, up, down), x, ids, torch.rand(shape.rows, shape.top_k, generator=generator))


def as_held(given: Layer, dtype: torch.dtype) -> Layer:
    weights = (tensor.to(dtype) for tensor in given.experts[:3])
    return Layer(Experts(*weights), given.x.to(dtype), given.ids, given.weights.to(dtype))


def expected(held: Layer) -> Tensor:
    gate, up, down = held.experts[:3]
    experts = step3.Experts(len(gate), gate.shape[2], gate.shape[1])
    experts.load_state_dict({"gate_proj": gate.float(), "up_proj": up.float(), "down_proj": down.float()})
    with torch.inference_mode():
        result: Tensor = experts(held.x.float(), held.ids, held.weights.float())
    return result


def found(held: Layer, first_id: int = 0, exponents: Tensor | None = None) -> Tensor:
    experts = Experts(*(None if tensor is None else tensor.to(DEVICE) for tensor in held.experts))
    exponents = None if exponents is None else exponents.to(DEVICE)
    x, ids, weights = (tensor.to(DEVICE) for tensor in held[1:])
    return feed_forward(experts, x, ids, weights, first_id=first_id, exponents=exponents)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [Shape(1), Shape(40, experts=5, top_k=1, inner=192), Shape(9, top_k=3, hidden=192)])
def test_equals_the_model_s_experts(dtype: torch.dtype, shape: Shape) -> None:
    held = as_held(layer(shape), dtype)
    assert error(found(held), expected(held)) < CLOSE[dtype]


@pytest.mark.parametrize("rows", [64, 65])
def test_rows_that_just_fill_a_tile_or_do_not(rows: int) -> None:
    """All on one expert."""
    held = as_held(layer(Shape(rows, experts=2, top_k=1)), torch.float16)
    held = held._replace(ids=torch.ones_like(held.ids))
    assert error(found(held), expected(held)) < CLOSE[torch.float16]


def test_rows_that_chose_nobody_here_get_zeros() -> None:
    held = as_held(layer(Shape(6)), torch.float32)
    ids = held.ids + 4
    ids[1:] = 9
    part = found(held._replace(ids=ids), first_id=4)
    assert error(part[:1], expected(held)[:1]) < CLOSE[torch.float32]
    assert not part[1:].any()


def test_two_holders_parts_add_up_to_the_whole() -> None:
    whole = as_held(layer(Shape(30, experts=5)), torch.float32)
    parts = [
        found(whole._replace(experts=Experts(*(tensor[held] for tensor in whole.experts[:3]))), first_id=held.start)
        for held in (slice(0, 2), slice(2, 5))
    ]
    assert error(parts[0] + parts[1], expected(whole)) < CLOSE[torch.float32]


def test_no_rows_are_no_rows() -> None:
    assert found(as_held(layer(Shape(0)), torch.float16)).shape == (0, 128)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("rows", [1, 64, 70])
def test_an_expert_that_takes_every_row(dtype: torch.dtype, rows: int) -> None:
    """And adds to what others gave."""
    given = layer(Shape(rows, experts=1, top_k=1, hidden=256, inner=256))
    given = given._replace(weights=torch.ones_like(given.weights))
    if dtype == torch.float8_e4m3fn:
        held, exponents, given = in_e4m3(given)
        right = expected_in_e4m3(given)
    else:
        held, exponents = as_held(given, dtype), None
        right = expected(held)
    experts = Experts(*(None if tensor is None else tensor.to(DEVICE) for tensor in held.experts))
    ours = feed_every_row(experts, held.x.to(DEVICE), exponents=None if exponents is None else exponents.to(DEVICE))
    assert error(ours, right) < CLOSE[dtype]
    again = feed_every_row(
        experts, held.x.to(DEVICE), exponents=None if exponents is None else exponents.to(DEVICE), total=ours.clone()
    )
    assert error(again, 2 * right) < CLOSE[dtype]


def test_every_row_goes_to_one_expert_alone() -> None:
    given = layer(Shape(3))
    with pytest.raises(ValueError, match="one expert takes every row"):
        feed_every_row(given.experts, given.x)
    with pytest.raises(ValueError, match="total must be float32"):
        feed_forward(*given, total=torch.zeros(3, 1))


def in_e4m3(given: Layer) -> tuple[Layer, Tensor, Layer]:
    """Rows by the wire's rule and weights in blocks of 128 x 128; the exponents of the rows; and what both stand for."""
    values, exponents = quantise(given.x)
    narrow, scales, wide = zip(*(_blocks(weight) for weight in given.experts[:3]), strict=True)
    held = given._replace(experts=Experts(*narrow, *scales), x=values)
    return held, exponents, given._replace(experts=Experts(*wide), x=dequantise(values, exponents, torch.float32))


def _blocks(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    blocks = weight.unflatten(1, (-1, BLOCK)).unflatten(3, (-1, BLOCK))  # [E, J, 128, B, 128]
    scales = blocks.abs().amax((2, 4)) / 448
    values = (blocks / scales[:, :, None, :, None]).to(torch.float8_e4m3fn)
    wide = values.float() * scales[:, :, None, :, None]
    return values.view(weight.shape), scales, wide.view(weight.shape)


def expected_in_e4m3(given: Layer) -> Tensor:
    """With what SwiGLU gives rounded as the rows are."""
    total = torch.zeros_like(given.x)
    gate, up, down = given.experts[:3]
    for expert in range(len(gate)):
        rows, slots = (given.ids == expert).nonzero(as_tuple=True)
        gated = F.silu(F.linear(given.x[rows], gate[expert])) * F.linear(given.x[rows], up[expert])
        y = F.linear(dequantise(*quantise(gated), torch.float32), down[expert])
        total.index_add_(0, rows, y * given.weights[rows, slots, None])
    return total


@pytest.mark.parametrize(
    "shape", [Shape(1, inner=128), Shape(70, hidden=256, inner=256), Shape(20, experts=6, top_k=3, inner=256)]
)
def test_e4m3_equals_the_experts_of_what_it_stands_for(shape: Shape) -> None:
    held, exponents, given = in_e4m3(layer(shape))
    assert error(found(held, exponents=exponents), expected_in_e4m3(given)) < CLOSE[torch.float8_e4m3fn]


@pytest.mark.filterwarnings(
    "ignore:overflow encountered in exp"
)  # of gates far below zero, which are then nothing, as they should be
def test_each_block_of_weights_has_its_own_scale() -> None:
    given = layer(Shape(8, hidden=256, inner=256))
    given.experts.gate[1, 128:, :128] *= 50
    given.experts.down[2, :128, 128:] *= 50
    held, exponents, wide = in_e4m3(given)
    assert error(found(held, exponents=exponents), expected_in_e4m3(wide)) < CLOSE[torch.float8_e4m3fn]


@pytest.mark.full
@pytest.mark.parametrize("seed", range(20))
def test_random_shapes(seed: int) -> None:
    rng = random.Random(seed)
    experts = rng.randrange(1, 9)
    hidden, inner = (128 * rng.randrange(1, 4) for _ in range(2))
    given = layer(Shape(rng.randrange(1, 200), experts, rng.randrange(1, experts + 1), hidden, inner), seed)
    dtype = rng.choice([*DTYPES, torch.float8_e4m3fn])
    if dtype == torch.float8_e4m3fn:
        held, exponents, wide = in_e4m3(given)
        assert error(found(held, exponents=exponents), expected_in_e4m3(wide)) < CLOSE[dtype]
    else:
        held = as_held(given, dtype)
        assert error(found(held), expected(held)) < CLOSE[dtype]


def refused(dtype: torch.dtype, hidden: int = 128, inner: int = 128) -> dict[str, object]:
    gate, down = torch.zeros(2, inner, hidden, dtype=dtype), torch.zeros(2, hidden, inner, dtype=dtype)
    x, ids = torch.zeros(4, hidden, dtype=dtype), torch.zeros(4, 2, dtype=torch.int64)
    return {"experts": Experts(gate, gate, down), "x": x, "ids": ids, "weights": torch.zeros(4, 2)}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (refused(torch.float32) | {"x": torch.zeros(4, 64)}, r"x must be \[N, 128\]"),
        (refused(torch.float32) | {"ids": torch.zeros(4, 3, dtype=torch.int64)}, r"\[4, K\]"),
        (refused(torch.float32) | {"experts": Experts(*torch.zeros(3, 2, 64, 128))}, r"down \[E, H, I\]"),
        (refused(torch.float32) | {"x": torch.zeros(4, 128).half()}, "no kernel"),
        (refused(torch.float32) | {"weights": torch.zeros(2, 4).T}, "contiguous"),
        (refused(torch.float32, hidden=96), "multiples of 64"),
        (refused(torch.float8_e4m3fn, inner=64), "multiples of 128"),
        (refused(torch.float32) | {"exponents": torch.zeros(4, 1, dtype=torch.uint8)}, "only e4m3 has scales"),
        (refused(torch.float8_e4m3fn), "exponents must be"),
    ],
)
def test_what_it_cannot_do_is_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        feed_forward(**given)
