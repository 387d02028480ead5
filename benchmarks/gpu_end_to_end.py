"""How many tokens a second do an attention and an FFN process make together on one GPU, and are they the right ones?

Two processes, each with its half, its step loop and its graphs as an actor of that role has them, meet over shared memory as actors on one host do;
Ray, which only starts and watches actors, is left out. `step3-92m` in float32 and in bfloat16, and four layers of Step-3 at full size in e4m3 (weights and rows
towards the FFN; keys and values in bfloat16), random weights. The tokens are checked against the reference: each must be the likeliest, or nearly,
after those before it ("off" is how far below the likeliest its logit lay at most, in standard deviations of the logits). Beside it plain torch with a
captured decode step, on the same GPU, alone, in bfloat16 where the model is in e4m3. Tokens/s and the time of a token are of the decoding after the last prompt;
prompts and all are in the last column.
"""

import argparse
import gc
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from afd_ray.kernels.gpu.capture import CUDAGraphs, eagerly
from afd_ray.models.config import ModelConfig
from afd_ray.models.presets import PRESETS
from afd_ray.models.step3 import Step3Model
from benchmarks._gpu import ABSENT
from benchmarks._random_model import random_model
from benchmarks.pair.processes import Worker
from benchmarks.pair.serving import Answered, Served, ServingAttention, ServingFFN
from benchmarks.peers.plain_graphs import CapturedBatch

SLICE = replace(PRESETS["step3"], num_hidden_layers=4, moe_layers=frozenset({1, 2, 3}))
CHECKED = 4
"""Requests whose every token the reference looks at."""
COLUMNS = (
    "| model | weights | requests | prompt + answer | tokens/s | ms a token | plain torch, captured: tokens/s | ours / its "
    "| off | the reference's likeliest | with prompts, tokens/s |"
)


class Case(NamedTuple):
    name: str
    config: ModelConfig
    narrow: bool
    requests: int
    prompt: int
    answer: int
    tolerance: float
    """Of "off"."""


CASES = {
    "step3-92m": Case("step3-92m", replace(PRESETS["step3-92m"], dtype=torch.float32), False, 64, 128, 128, 1e-2),
    "step3-92m-bf16": Case("step3-92m", PRESETS["step3-92m"], False, 64, 128, 128, 0.5),
    "step3-slice": Case("4 layers of Step-3", SLICE, True, 64, 512, 64, 0.5),
}
TINY = Case("step3-tiny", PRESETS["step3-tiny"], False, 3, 8, 6, 1e-3)
"""For machines without a GPU: that all of it runs."""


class Rate(NamedTuple):
    """Tokens a second."""

    decoding: float
    whole: float
    ms_a_token: float


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer tokens")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a tiny model, to try the benchmark itself"
    )
    parser.add_argument("--model", choices=tuple(CASES), action="append", help="default: all")
    parser.add_argument("--micro-batches", type=int, choices=(1, 2, 3, 4), default=2)
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print(ABSENT, file=sys.stderr)
        return 2
    cases = [TINY] if args.device == "cpu" else [CASES[name] for name in args.model or CASES]
    rule = "|".join("---" for _ in COLUMNS.split("|")[1:-1])
    machine = torch.cuda.get_device_name() if args.device == "cuda" else "a CPU, which says nothing of speed"
    print(f"{time.strftime('%Y-%m-%d')}, {machine}, torch {torch.__version__}\n\n{COLUMNS}\n|{rule}|")
    is_right = True
    for case in cases:
        line, right = measure(shortened(case) if args.quick else case, torch.device(args.device), args.micro_batches)
        print(line, flush=True)
        is_right &= right
    return 0 if is_right else 1


def shortened(case: Case) -> Case:
    return case._replace(requests=min(case.requests, 16), prompt=min(case.prompt, 64), answer=min(case.answer, 32))


@torch.inference_mode()
def measure(case: Case, device: torch.device, micro_batches: int) -> tuple[str, bool]:
    """One part after the other, each with the device to itself."""
    prompts = prompts_of(case)
    answered = serve(case, prompts, device.type, micro_batches)
    ours = rate_of(answered.times_s)
    off, same = compared(random_model(case.config, device, narrow=case.narrow), prompts, answered.tokens, device)
    _emptied(device)
    theirs = captured_rate(random_model(case.config, device, narrow=False), prompts, case.answer, device)
    _emptied(device)
    figures = f"{ours.decoding:.0f} | {ours.ms_a_token:.2f} | {theirs:.0f} | {ours.decoding / theirs:.2f}"
    sizes = f"{case.requests} | {case.prompt} + {case.answer}"
    weights = "e4m3" if case.narrow else str(case.config.dtype).removeprefix("torch.")
    text = f"| {case.name} | {weights} | {sizes} | {figures} | {off:.1e} | {same:.1%} | {ours.whole:.0f} |"
    return text, off <= case.tolerance and all(len(tokens) == case.answer for tokens in answered.tokens)


def prompts_of(case: Case) -> list[list[int]]:
    rng = random.Random(0)
    return [rng.choices(range(case.config.vocab_size), k=case.prompt) for _ in range(case.requests)]


def serve(case: Case, prompts: list[list[int]], device: str, micro_batches: int) -> Answered:
    """By two processes; a first short run, so that nothing is loaded in the timed one."""
    served = Served(case.config, device, case.narrow, case.requests, case.prompt + case.answer, micro_batches)
    workers = [Worker(role, served) for role in (ServingAttention, ServingFFN)]
    try:
        for worker in workers:
            worker.result()
        for max_tokens in (2, case.answer):
            answered = _together(workers, prompts, max_tokens)
        return answered
    finally:
        for worker in workers:
            worker.close()


def _together(workers: list[Worker], prompts: list[list[int]], max_tokens: int) -> Answered:
    endpoints = dict(enumerate(_each(workers, "open", (), ())))
    _each(workers, "connect", (endpoints,), (endpoints,))
    answered, _ = _each(workers, "run", (prompts, max_tokens), ())
    _each(workers, "leave", (), ())
    assert isinstance(answered, Answered)
    return answered


def _each(workers: list[Worker], method: str, *arguments: tuple[object, ...]) -> list[object]:
    for worker, own in zip(workers, arguments, strict=True):
        worker.start(method, *own)
    return [worker.result() for worker in workers]


def rate_of(times_s: list[list[float]]) -> Rate:
    """Decoding: from when every request has its first token."""
    every = sorted(at for times in times_s for at in times)
    begun_s = max(times[0] for times in times_s)
    after = sum(at > begun_s for at in every)
    decoding_s = every[-1] - begun_s
    steps = max(len(times) for times in times_s) - 1
    return Rate(after / decoding_s, len(every) / every[-1], decoding_s / max(1, min(steps, after)) * 1e3)


def compared(model: Step3Model, prompts: list[list[int]], answers: list[list[int]], device: torch.device) -> tuple[float, float]:
    """(how far below the likeliest a token's logit lies at most, in standard deviations; share of tokens that are the likeliest)."""
    worst, same = 0.0, []
    for prompt, answer in list(zip(prompts, answers, strict=True))[:CHECKED]:
        logits = model(torch.tensor([*prompt, *answer[:-1]], device=device))[len(prompt) - 1 :].float()  # [answer, V]
        chosen = logits.gather(1, torch.tensor(answer, device=device)[:, None])[:, 0]
        off = (logits.amax(1) - chosen) / logits.std(1)
        worst = max(worst, off.max().item())
        same += (off == 0).tolist()
    return worst, sum(same) / len(same)


def captured_rate(model: Step3Model, prompts: list[list[int]], max_tokens: int, device: torch.device) -> float:
    capture = CUDAGraphs(device) if device.type == "cuda" else eagerly
    batch = CapturedBatch(model, torch.tensor(prompts, device=device), max_tokens, capture)
    batch.prefill()
    _finished(batch.tokens)
    started_s = time.perf_counter()
    for _ in range(max_tokens - 1):
        batch.decode()
        _finished(batch.tokens)
    return len(prompts) * (max_tokens - 1) / (time.perf_counter() - started_s)


def _finished(tokens: Tensor) -> list[int]:
    """On the host, as a server needs them: waits for the device."""
    found: list[int] = tokens.tolist()
    return found


def _emptied(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
