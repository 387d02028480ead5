"""The attention layer of the GPU benchmark equals the model's own, at sizes for the interpreter."""

import torch

from afd_ray.models.config import ModelConfig
from benchmarks.gpu_step import difference, expected, layer_of, run, step_of
from tests.triton_device import DEVICE

TINY = ModelConfig(
    num_hidden_layers=1,
    hidden_size=96,
    num_attention_heads=4,
    head_dim=16,
    share_q_dim=32,
    moe_layers=frozenset({0}),
    moe_num_experts=6,
    moe_top_k=2,
    moe_intermediate_size=32,
    share_expert_dim=32,
    intermediate_size=64,
    vocab_size=64,
    max_position_embedding=512,
    dtype=torch.float32,
)


def test_the_layer_by_the_kernels_equals_the_model_s_layer() -> None:
    torch.manual_seed(0)
    layer, step = layer_of(TINY, torch.device(DEVICE)), step_of(TINY, 3, 70, torch.device(DEVICE))
    found, right = run(layer, step, splits=1), expected(layer, step)
    assert difference(found, right) < 1e-3
    assert found.experts.tolist() == right.experts.tolist()


def test_a_row_s_own_key_and_value_are_written_before_they_are_read() -> None:
    torch.manual_seed(1)
    layer, step = layer_of(TINY, torch.device(DEVICE)), step_of(TINY, 2, 65, torch.device(DEVICE))
    step.blocks.flatten(0, 2)[step.slots.long()] = float("nan")
    assert run(layer, step, splits=1).hidden.isfinite().all()
