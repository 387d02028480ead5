"""Experts in e4m3, in plain torch."""

import pytest
import torch

from afd_ray.handoff.quantise import dequantise, quantise
from afd_ray.kernels.quantised import QuantisedExperts, dequantise_weight, quantise_weight, quantised
from afd_ray.models.step3 import Experts


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain(experts: int = 3, hidden: int = 256, inner: int = 128) -> Experts:
    layer = Experts(experts, hidden, inner)
    for seed, parameter in enumerate(layer.parameters()):
        parameter.data = noise(*parameter.shape, seed=seed) / parameter.shape[2] ** 0.5
    return layer.requires_grad_(False)


def test_each_block_has_a_scale_that_makes_its_largest_448() -> None:
    weight = noise(256, 384) * torch.tensor([1e-3, 1.0, 50.0]).repeat_interleave(128)
    values, scales = quantise_weight(weight)
    assert (values.dtype, scales.dtype, scales.shape) == (torch.float8_e4m3fn, torch.float32, (2, 3))
    for row in range(2):
        for column in range(3):
            part = slice(row * 128, row * 128 + 128), slice(column * 128, column * 128 + 128)
            peak = weight[part].abs().max()
            assert scales[row, column] == pytest.approx(peak / 448)
            assert values[part].float().abs().max() == 448
            assert ((dequantise_weight(values, scales)[part] - weight[part]).abs() <= peak / 28 + 1e-12).all()
    assert ((dequantise_weight(values, scales) - weight).norm() / weight.norm()) < 0.03


def test_a_block_of_zeros_stays_one() -> None:
    values, scales = quantise_weight(torch.zeros(128, 128, dtype=torch.bfloat16))
    assert scales.isfinite().all()
    assert not dequantise_weight(values, scales).any()


def test_experts_are_those_of_their_rounded_weights_over_rounded_rows() -> None:
    layer = plain()
    narrow = quantised(layer)
    wide = plain()
    wide.load_state_dict(
        {
            f"{name}_proj": torch.stack([dequantise_weight(*pair) for pair in zip(*narrow.pair(name), strict=True)])
            for name in ("gate", "up", "down")
        }
    )
    x, local, weights = noise(6, 256), torch.tensor([[0, 2], [1, -1], [2, 0], [1, 2], [-1, -1], [0, 1]]), noise(6, 2).abs()
    found, right = narrow(x, local, weights), wide(dequantise(*quantise(x), torch.float32), local, weights)
    assert not found[4].any()
    assert (found - right).norm() / right.norm() < 0.05, "what lies between the products is rounded too"
    assert (found - right).norm() > 0
    assert narrow(x.bfloat16(), local, weights.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(("hidden", "inner"), [(192, 128), (128, 64)])
def test_widths_that_have_no_whole_blocks_are_refused(hidden: int, inner: int) -> None:
    with pytest.raises(ValueError, match=rf"^ffn\.expert_dtype: fp8 needs .* multiples of 128, got {hidden} and {inner}$"):
        quantised(plain(hidden=hidden, inner=inner))


def test_a_layer_may_hold_no_expert() -> None:
    assert isinstance(quantised(plain(experts=0)), QuantisedExperts)
