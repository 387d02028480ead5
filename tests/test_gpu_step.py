"""The attention layer of the GPU benchmark equals the model's own, at sizes for the interpreter."""

from dataclasses import replace

import torch

from afd_ray.models.presets import PRESETS
from benchmarks.gpu_step import difference, expected, layer_of, run, step_of
from tests.triton_device import DEVICE

TINY = replace(PRESETS["step3-tiny"], num_hidden_layers=1, moe_layers=frozenset({0}))


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
