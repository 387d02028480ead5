"""The GPU benchmarks where there is no GPU."""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from afd_ray.handoff.device.nccl import Library
from afd_ray.handoff.device.streams import Device
from afd_ray.planning.measured import AttentionTime, FfnTime, Measured
from benchmarks import _gpu, gpu_attention, gpu_experts, gpu_ffn_step, gpu_handoff, gpu_step
from benchmarks._gpu import Limits, Line, times_of
from benchmarks._gpu_peers import Peers, cells, padded_by_expert
from tests.device_group import Pipes
from tests.host_device import HostDevice

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


@pytest.mark.parametrize("benchmark", [gpu_attention, gpu_experts, gpu_ffn_step, gpu_handoff, gpu_step])
def test_say_that_there_is_none(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main([]) == 2
    assert capsys.readouterr() == ("", "no CUDA GPU here\n")


def test_only_right_results_become_times_for_the_planner() -> None:
    attention = AttentionTime(rows=64, context=8192, cache_bytes=2, part="core", us=200)
    ffn = FfnTime(rows=2048, ranks=16, part="routed", us=150)
    lines = [Line("", True, attention), Line("", False, attention), Line("", True, ffn), Line("", True, None)]
    measured = times_of(lines, "NVIDIA H100 80GB HBM3", "a test")
    assert (measured.attention, measured.ffn, measured.accelerator_name) == ((attention,), (ffn,), "h100")


def test_what_is_measured_stays_whatever_ends_the_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = AttentionTime(rows=64, context=8192, cache_bytes=2, part="core", us=200)

    def lines(args: argparse.Namespace, limits: Limits) -> Iterator[Line]:
        yield Line("", True, attention)
        raise SystemError("the driver gave up")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(_gpu, "measure_limits", lambda: Limits(3e12, {torch.bfloat16: 8e14}))
    with pytest.raises(SystemError):
        _gpu.answer(argparse.ArgumentParser(), ["--json", str(tmp_path / "times")], "| a |", lines)
    assert Measured.model_validate_json((tmp_path / "times").read_text()).attention == (attention,)


def test_a_peer_that_cannot_be_had_is_left_out_and_why_is_told_once() -> None:
    peers, tries = Peers(), []

    def prepare() -> Callable[[], object]:
        tries.append(1)
        raise ModuleNotFoundError("No module named 'fa3'\nmore")

    assert [peers.times_us({"FA3": prepare}), peers.times_us({"FA3": prepare})] == [{"FA3": None}, {"FA3": None}]
    assert tries == [1]
    assert [line.text for line in peers.notes()] == ["\nFA3 is left out: ModuleNotFoundError: No module named 'fa3'"]


def test_the_quickest_peer_counts() -> None:
    assert cells({"one": 30.0, "two": None, "three": 20.0}, ours_us=10.0) == "30 | - | 20 | 2.00"
    assert cells({"one": None}, ours_us=10.0) == "- | -"


def test_the_hand_off_is_timed_beside_the_bare_mechanism() -> None:
    """Between two processes, on a device of threads: what it says there is no time, but every row arrives."""
    tools = gpu_handoff.Tools(HostDevice, host_library)
    with gpu_handoff.other_process(tools) as pipe:
        found = {name: gpu_handoff.timed(name, tools, pipe, rounds=3) for name in gpu_handoff.WAYS}
    assert [name for name, timed in found.items() if not timed.is_right] == []
    told = gpu_handoff.line("ipc", 1.5, gpu_handoff.Timed(10.0, True), gpu_handoff.Timed(11.0, True), gpu_handoff.mps_state())
    assert told == "| ipc | off | 1.5 | 10.0 | 11.0 | 1.10 |"


def host_library(device: Device) -> Library:
    return Pipes()


def test_assignments_are_padded_expert_by_expert() -> None:
    places, groups = padded_by_expert(torch.tensor([[2, 0], [0, 5], [1, 0]]), experts=3, alignment=2)
    assert places.tolist() == [1, 2, 5, 0, 4, 0, 0, 0]
    assert groups.tolist() == [0, 0, 0, -1, 1, -1, 2, -1]
