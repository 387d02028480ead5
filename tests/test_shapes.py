"""Model shapes: what their sizes add up to, and what a token moves and computes in each kind of layer."""

import pytest
from pydantic import ValidationError

from afd_ray.planning import catalogue
from afd_ray.planning.shapes import Grouped, Linear, ModelShape

PARAMETERS_B = {
    "step3": 316.3,
    "deepseek-v3": 671,
    "kimi-k2": 1026,
    "qwen3-235b": 235,
    "qwen3-32b": 32.8,
    "llama4-maverick": 400.7,
    "minimax-m1": 456,
    "ernie-4.5": 299.5,
    "pangu-pro-moe": 72,
}
"""As published for the text parts, in 1e9."""


def test_the_catalogue_holds_these_models() -> None:
    assert set(catalogue.models()) == set(PARAMETERS_B)


@pytest.mark.parametrize("name", PARAMETERS_B)
def test_layers_add_up_to_the_published_parameters(name: str) -> None:
    shape = catalogue.model(name)
    total = shape.linear_parameters + shape.ffn_parameters + 2 * shape.vocab_size * shape.hidden_size
    assert total / 1e9 == pytest.approx(PARAMETERS_B[name], rel=0.002)


def test_step3_caches_512_bytes_a_token_and_layer_and_does_128_flops_for_each() -> None:
    shape = catalogue.model("step3")
    assert shape.held_bytes(1) == 31_232
    assert shape.attention_flops(1000) / shape.moved_bytes(1000) == 128
    assert shape.with_cache_bytes(2).held_bytes(1) == 62_464


def test_a_window_bounds_cache_and_work() -> None:
    layer = Grouped(layers=1, heads=4, kv_heads=2, head_dim=8, window=100, cache_bytes=1)
    assert layer.held_bytes(50) * 2 == layer.held_bytes(100) == layer.held_bytes(5000)
    assert layer.flops(5000) == layer.flops(100)


def test_a_linear_layers_state_is_read_and_written_whatever_the_context() -> None:
    layer = Linear(layers=1, heads=2, head_dim=4, cache_bytes=4)
    assert layer.held_bytes(1) == layer.held_bytes(10_000) == 2 * 16 * 4
    assert layer.moved_bytes(1) == 2 * layer.held_bytes(1)


def test_another_cache_precision_leaves_a_linear_layers_state() -> None:
    changed = catalogue.model("minimax-m1").with_cache_bytes(1)
    assert [group.cache_bytes for group in changed.attention] == [1, 4]


def test_halves_with_different_layer_counts_are_refused() -> None:
    raw = catalogue.read("models.yaml")["qwen3-32b"]
    with pytest.raises(ValidationError, match="64 attention layers but 63 FFN layers"):
        ModelShape.model_validate(raw | {"ffn": [{"kind": "dense", "layers": 63, "width": 8}]})
