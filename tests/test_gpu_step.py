"""What the GPU step benchmarks compute and check, at sizes for the interpreter."""

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from afd_ray.kernels.gpu.capture import eagerly
from afd_ray.kernels.gpu.halves import GPUAttentionLayer, gpu_ffn
from afd_ray.models.presets import PRESETS
from benchmarks import gpu_ffn_step
from benchmarks._gpu import KernelSums, Limits, Run, device_spans, replayed_us
from benchmarks.gpu_step import bound_us, difference, expected, layer_of, narrowed, run, step_of, turn_of
from tests.triton_device import DEVICE

TINY = replace(PRESETS["step3-tiny"], num_hidden_layers=1, moe_layers=frozenset({0}))
NARROW = replace(TINY, hidden_size=256, share_q_dim=128, head_dim=64)


def test_the_layer_by_the_kernels_equals_the_model_s_layer() -> None:
    torch.manual_seed(0)
    layer, step = layer_of(TINY, torch.device(DEVICE)), step_of(TINY, 3, 70, torch.device(DEVICE))
    found, right = run(GPUAttentionLayer(layer), step), expected(layer, step)
    assert difference(found, right) < 1e-3
    assert found.experts.tolist() == right.experts.tolist()


def test_so_it_does_with_projections_in_e4m3() -> None:
    torch.manual_seed(4)
    wide, step = layer_of(NARROW, torch.device(DEVICE)), step_of(NARROW, 3, 70, torch.device(DEVICE))
    layer = narrowed(wide)
    found, right = run(GPUAttentionLayer(layer), step), expected(layer, step)
    assert difference(found, right) < 1e-2
    assert difference(found, expected(wide, step)) > difference(found, right)


def test_the_bound_counts_weights_by_their_size_and_products_by_their_dtype() -> None:
    wide = layer_of(replace(NARROW, dtype=torch.bfloat16), torch.device(DEVICE))
    limits = Limits(1e12, {torch.bfloat16: 1e12, torch.float8_e4m3fn: 2e12})
    slow = limits._replace(bytes_per_s=1e6)
    weights = sum(parameter.numel() for parameter in wide.parameters() if parameter.dim() == 2)
    gate = NARROW.moe_num_experts * NARROW.hidden_size
    attention = 4 * 3 * 70 * NARROW.num_attention_heads * NARROW.head_dim
    assert bound_us(NARROW, wide, 3, 70, limits) == pytest.approx((6 * weights + attention) / 1e6)
    assert bound_us(NARROW, narrowed(wide), 3, 70, limits) == pytest.approx((3 * (weights - gate) + 6 * gate + attention) / 1e6)
    saved = bound_us(NARROW, wide, 3, 70, slow) - bound_us(NARROW, narrowed(wide), 3, 70, slow)
    assert saved == pytest.approx(weights - gate, rel=0.01), "less the scales"


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


def test_so_it_does_in_e4m3() -> None:
    torch.manual_seed(2)
    device = torch.device(DEVICE)
    config = replace(NARROW, moe_intermediate_size=1024, share_expert_dim=512)
    half, routed = gpu_ffn_step.half_of(config, device), gpu_ffn_step.rows_of(config, 5, device, narrow=True)
    plain = half.layers[0]
    ours = gpu_ffn(half, device, quantise=True, dense=True)
    assert gpu_ffn_step.difference(plain, routed, ours(0, routed)) < 1e-2
    replayed = gpu_ffn_step.fed_by_graphs(ours, 5, eagerly, narrow=True)
    assert gpu_ffn_step.difference(plain, routed, replayed(0, gpu_ffn_step.on_the_host(routed))) < 1e-2


def told(kernels_us: list[float], replays: int) -> Iterator[SimpleNamespace]:
    """As the profiler tells of replays, each behind a fill of 50 us, in no order: host's calls and the device's kernels."""
    for replay in reversed(range(replays)):
        at_us = 1000.0 * replay
        for index, us in enumerate([50.0, *kernels_us]):
            span = SimpleNamespace(start=at_us + 100 * index, elapsed_us=lambda us=us: us)
            yield SimpleNamespace(name=f"kernel {index}", device_type=DeviceType.CUDA, time_range=span)
        launch = SimpleNamespace(start=at_us, elapsed_us=lambda: 7.0)
        yield SimpleNamespace(name="cudaGraphLaunch", device_type=DeviceType.CPU, time_range=launch)


def test_kernels_of_a_replay_are_added_up_without_what_emptied_the_cache() -> None:
    spans = device_spans(told([3.0, 5.5], 3))
    assert replayed_us(spans, 3) == 8.5
    slower = [*spans[:-1], spans[-1]._replace(us=90.0)]
    assert replayed_us(slower, 3) == 8.5, "the median of the replays"


@pytest.mark.parametrize("lacking", [slice(0, 0), slice(0, 8), slice(0, 3)], ids=["nothing", "an event", "all but one replay"])
def test_a_profile_that_lacks_something_is_no_sum(lacking: slice) -> None:
    with pytest.raises(RuntimeError, match=r"not of the same in each of 3 replays"):
        replayed_us(device_spans(told([3.0, 5.5], 3))[lacking], 3)


def test_a_kernel_that_is_another_in_one_replay_is_no_sum() -> None:
    spans = device_spans(told([3.0, 5.5], 3))
    spans[4] = spans[4]._replace(name="another")
    with pytest.raises(RuntimeError, match="not of the same"):
        replayed_us(spans, 3)


def test_captured_times_stand_beside_the_sums_of_their_kernels() -> None:
    sums, prepared = KernelSums("rows"), []

    def prepare(rows: int) -> Run:
        prepared.append(rows)
        return lambda: rows

    for rows in (2, 4):
        sums.add(str(rows), 10.5 * rows, lambda rows=rows: prepare(rows))
    head, *lines = (line.text for line in sums.lines(lambda run: 10.0 * run()))
    assert head == "\n| rows | captured, us | kernels, us | captured / kernels |\n|---|---|---|---|"
    assert lines == ["| 2 | 21.0 | 20.0 | 1.050 |", "| 4 | 42.0 | 40.0 | 1.050 |"]
    assert prepared == [2, 4]


def test_without_a_profiler_there_are_no_sums_and_why_is_told_once() -> None:
    sums, tried = KernelSums("rows"), []

    def fail(run: Run) -> float:
        tried.append(run)
        raise RuntimeError("CUPTI_ERROR_INSUFFICIENT_PRIVILEGES\nmore")

    for rows in ("2", "4"):
        sums.add(rows, 21.0, lambda: lambda: None)
    _, *lines, reason = (line.text for line in sums.lines(fail))
    assert lines == ["| 2 | 21.0 | n/a | n/a |", "| 4 | 21.0 | n/a | n/a |"]
    assert reason == "\nNo sums of kernels: RuntimeError: CUPTI_ERROR_INSUFFICIENT_PRIVILEGES"
    assert len(tried) == 1
