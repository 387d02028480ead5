"""The end-to-end benchmark without a GPU: what it serves, compares and times."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from afd_ray.engine.compute import Compute
from afd_ray.engine.gpu.compute import GPUCompute
from afd_ray.kernels.gpu.capture import eagerly
from benchmarks._random_model import random_model
from benchmarks.gpu_end_to_end import TINY, captured_rate, compared, main, prompts_of, rate_of
from benchmarks.pair.serving import Answered, Served, ServingAttention, ServingFFN, Side
from benchmarks.peers.plain_graphs import CapturedBatch
from tests.gpu_cluster import HERE, WIDE


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_says_that_there_is_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert capsys.readouterr() == ("", "no CUDA GPU here\n")


def test_two_processes_on_a_cpu_make_the_reference_s_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cpu"]) == 0
    *_, line = capsys.readouterr().out.splitlines()
    assert line.startswith("| step3-tiny | float32 | 3 | 8 + 6 | ")
    assert "| 0.0e+00 | 100.0% |" in line


class Interpreted(Side):
    """By the GPU's kernels."""

    def _compute(self) -> Compute:
        narrow = dict.fromkeys(
            ("quantise_experts", "quantise_dense", "quantise_projections", "quantise_rows"), self.served.narrow
        )
        return GPUCompute(HERE, **narrow, capture=lambda: eagerly)


class InterpretedAttention(Interpreted, ServingAttention):
    pass


class InterpretedFFN(Interpreted, ServingFFN):
    pass


@pytest.mark.parametrize("narrow", [True, pytest.param(False, marks=pytest.mark.full)])
def test_the_gpu_s_halves_make_them_too(narrow: bool) -> None:
    case = TINY._replace(config=WIDE, requests=2, prompt=5, answer=3)
    prompts, served = prompts_of(case), Served(WIDE, HERE.type, narrow, 2, 8, micro_batches=1, block_size=4, rows=8)
    answered = answer(served, prompts, case.answer)
    assert [len(tokens) for tokens in answered.tokens] == [3, 3]
    off, _ = compared(random_model(WIDE, HERE, narrow=narrow), prompts, answered.tokens, HERE)
    assert off < (0.05 if narrow else 1e-3)


def answer(served: Served, prompts: list[list[int]], max_tokens: int) -> Answered:
    sides = InterpretedAttention(served), InterpretedFFN(served)
    endpoints = {side.rank: side.open() for side in sides}
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda side: side.connect(endpoints), sides))
        over = pool.submit(sides[1].run)
        answered = sides[0].run(prompts, max_tokens)
        over.result(30)
    for side in sides:
        side.leave()
    return answered


def test_the_peer_s_tokens_are_the_reference_s() -> None:
    model, prompts = random_model(TINY.config, torch.device("cpu"), narrow=False), torch.tensor(prompts_of(TINY))
    with torch.inference_mode():
        batch = CapturedBatch(model, prompts, 6, eagerly)
        batch.prefill()
        found = [batch.tokens.tolist()]
        for _ in range(5):
            batch.decode()
            found.append(batch.tokens.tolist())
        assert captured_rate(model, prompts.tolist(), 2, torch.device("cpu")) > 0
    assert [list(tokens) for tokens in zip(*found, strict=True)] == [model.generate_greedy(p.tolist(), 6) for p in prompts]


def test_a_token_that_is_not_the_likeliest_is_told_by_how_far() -> None:
    model, prompts = random_model(TINY.config, torch.device("cpu"), narrow=False), prompts_of(TINY)
    answers = [model.generate_greedy(prompt, 4) for prompt in prompts]
    with torch.inference_mode():
        assert compared(model, prompts, answers, torch.device("cpu")) == (0.0, 1.0)
        answers[1][3] = (answers[1][3] + 1) % TINY.config.vocab_size
        off, same = compared(model, prompts, answers, torch.device("cpu"))
    assert off > 0.1
    assert same == pytest.approx(11 / 12)


def test_decoding_counts_from_the_last_first_token() -> None:
    rate = rate_of([[1.0, 2.0, 2.5, 3.0], [2.0, 2.5, 3.0, 4.0]])
    assert rate.decoding == pytest.approx(5 / 2)
    assert rate.whole == pytest.approx(8 / 4)
    assert rate.ms_a_token == pytest.approx(2 / 3 * 1e3)


def test_weights_are_the_same_in_every_process_and_e4m3_ones_about_as_large() -> None:
    ours, theirs = (dict(random_model(WIDE, HERE, narrow=False).named_parameters()) for _ in range(2))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    narrow = random_model(WIDE, HERE, narrow=True).attention.layer(0).self_attn.wq
    wide = random_model(WIDE, HERE, narrow=False).attention.layer(0).self_attn.wq
    x = torch.randn(8, WIDE.share_q_dim, generator=torch.Generator().manual_seed(0)).to(HERE)
    assert narrow(x).std() / wide(x).std() == pytest.approx(1, abs=0.1)
