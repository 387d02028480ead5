"""The GPU benchmarks where there is no GPU."""

from types import ModuleType

import pytest
import torch

from afd_ray.planning.measured import AttentionTime, FfnTime
from benchmarks import gpu_attention, gpu_experts, gpu_step
from benchmarks._gpu import Line, times_of

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


@pytest.mark.parametrize("benchmark", [gpu_attention, gpu_experts, gpu_step])
def test_say_that_there_is_none(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main([]) == 2
    assert capsys.readouterr() == ("", "no CUDA GPU here\n")


def test_only_right_results_become_times_for_the_planner() -> None:
    attention = AttentionTime(rows=64, context=8192, cache_bytes=2, part="core", us=200)
    ffn = FfnTime(rows=2048, ranks=16, part="routed", us=150)
    lines = [Line("", True, attention), Line("", False, attention), Line("", True, ffn), Line("", True, None)]
    measured = times_of(lines, "NVIDIA H100 80GB HBM3", "a test")
    assert (measured.attention, measured.ffn, measured.accelerator_name) == ((attention,), (ffn,), "h100")
