"""The GPU benchmarks where there is no GPU."""

from types import ModuleType

import pytest
import torch

from benchmarks import gpu_attention, gpu_experts

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


@pytest.mark.parametrize("benchmark", [gpu_attention, gpu_experts])
def test_say_that_there_is_none(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main([]) == 2
    assert capsys.readouterr() == ("", "no CUDA GPU here\n")
