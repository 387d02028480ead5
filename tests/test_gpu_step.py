"""What the GPU step benchmarks compute and check, at sizes for the interpreter."""

from dataclasses import replace

import torch

from afd_ray.kernels.gpu.capture import eagerly
from afd_ray.kernels.gpu.halves import GPUAttentionLayer, gpu_ffn
from afd_ray.models.presets import PRESETS
from benchmarks import gpu_ffn_step
from benchmarks.gpu_step import difference, expected, layer_of, run, step_of, turn_of
from tests.triton_device import DEVICE

TINY = replace(PRESETS["step3-tiny"], num_hidden_layers=1, moe_layers=frozenset({0}))


def test_the_layer_by_the_kernels_equals_the_model_s_layer() -> None:
    torch.manual_seed(0)
    layer, step = layer_of(TINY, torch.device(DEVICE)), step_of(TINY, 3, 70, torch.device(DEVICE))
    found, right = run(GPUAttentionLayer(layer), step), expected(layer, step)
    assert difference(found, right) < 1e-3
    assert found.experts.tolist() == right.experts.tolist()


def test_a_row_s_own_key_and_value_are_written_before_they_are_read() -> None:
    torch.manual_seed(1)
    layer, step = layer_of(TINY, torch.device(DEVICE)), step_of(TINY, 2, 65, torch.device(DEVICE))
    step.blocks.flatten(0, 1)[step.rows.slots.long()] = float("nan")
    assert run(GPUAttentionLayer(layer), step).hidden.isfinite().all()


def test_a_turn_by_its_graph_gives_what_the_layer_gives() -> None:
    torch.manual_seed(3)
    layer, step = layer_of(TINY, torch.device(DEVICE)), step_of(TINY, 3, 70, torch.device(DEVICE))
    ours = GPUAttentionLayer(layer)
    step = step._replace(returned=step.returned._replace(sums=torch.zeros_like(step.returned.sums)))
    found = turn_of(TINY, ours, step, eagerly)()
    assert found.hidden.shape == (3, TINY.hidden_size)
    assert found.hidden.isfinite().all()


def test_the_ffn_layer_by_the_kernels_equals_the_model_s_layer() -> None:
    torch.manual_seed(2)
    device = torch.device(DEVICE)
    config = replace(TINY, moe_intermediate_size=512, share_expert_dim=512)
    half, routed = gpu_ffn_step.half_of(config, device), gpu_ffn_step.rows_of(config, 5, device)
    plain = half.layers[0]
    ours = gpu_ffn(half, device)
    assert gpu_ffn_step.difference(plain, routed, ours(0, routed)) < 1e-5
    assert gpu_ffn_step.difference(plain, routed, gpu_ffn_step.fed_by_graphs(ours, 5, eagerly)(0, routed)) < 1e-5
