"""The whole-step benchmark without a GPU: what it builds and checks, at sizes for the interpreter."""

from dataclasses import replace

import pytest
import torch

from afd_ray.engine.gpu.whole_step import WholePassage
from afd_ray.kernels.gpu.capture import Run, eagerly
from benchmarks import gpu_decode_step
from benchmarks.gpu_decode_step import CHECKED, Case, again, begun, chunks_of, difference, halves_of, kv_bytes, repeat, steps_of
from tests.gpu_cluster import WIDE
from tests.triton_device import DEVICE

CASE = Case("tiny", replace(WIDE, num_hidden_layers=7), False, 3, 70)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_says_that_there_is_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_decode_step.main([]) == 2
    assert capsys.readouterr() == ("", "no CUDA GPU here\n")


@torch.inference_mode()
@pytest.mark.parametrize("narrow", [False, True])
def test_the_graph_gives_what_its_layers_give(narrow: bool) -> None:
    torch.manual_seed(0)
    case = CASE._replace(narrow=narrow)
    halves = halves_of(case, torch.device(DEVICE))
    assert difference(halves, chunks_of(case), eagerly) < 1e-3


@torch.inference_mode()
def test_layers_share_weights_and_cache_and_are_one_launch() -> None:
    launched: list[int] = []

    def counted(run: Run) -> Run:
        return lambda: launched.append(1) or run()  # type: ignore[func-returns-value]

    halves = halves_of(CASE, torch.device(DEVICE))
    assert len({id(layer) for layer in halves.ffn.layers}) == 1
    assert len(halves.ffn.layers) == CHECKED
    repeat(halves, 7)
    assert len(halves.attention.layers) == halves.cache.layers == len(halves.cache.blocks) == 7
    assert halves.cache.blocks.untyped_storage().nbytes() == (3 * 2 + 1) * 64 * 2 * 64 * 4, "pages of one layer, and a spare one"
    steps = steps_of(halves, CASE.rows, counted)
    begun(steps, chunks_of(CASE)).launch()
    assert launched == [1, 1]


@torch.inference_mode()
def test_what_is_profiled_is_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    torch.manual_seed(0)
    steps: list[WholePassage] = []
    monkeypatch.setattr(gpu_decode_step, "begun", lambda *arguments: steps.append(begun(*arguments)) or steps[-1])
    run, logits = again(CASE, torch.device(DEVICE)), steps[0].logits()
    steps[0]._static.residual.zero_()
    run()
    assert torch.equal(steps[0].logits(), logits)


def test_the_bound_reads_weights_by_their_size_and_keys_and_values_once() -> None:
    assert kv_bytes(gpu_decode_step.STEP_3) == 64 * 8192 * 1024
    wide, narrow = (halves_of(CASE._replace(narrow=narrow), torch.device(DEVICE)).weight_bytes for narrow in (False, True))
    experts = 3 * CASE.config.hidden_size * (4 * CASE.config.moe_intermediate_size + CASE.config.share_expert_dim)
    assert wide > 4 * experts
    assert narrow - experts < (wide - 4 * experts) / 2
