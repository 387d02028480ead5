"""What measuring costs the step loops: CPU time of everything that is recorded for one micro-batch, as a share of the loop's own for it.

    python -m benchmarks.telemetry --model DIR [--requests 32] [--context 32] [--tokens 64]

The engine runs in this process (threads over the loopback mesh). CPU time, since wall time on a busy machine would flatter the share.
"""

import argparse
import json
import random
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

from afd_ray.engine.local import LocalCluster
from afd_ray.engine.request_clocks import RequestClocks
from afd_ray.engine.sequence import Chunk, MicroBatch, Sequence
from afd_ray.measured import Flights
from afd_ray.membership.epoch import Epoch
from afd_ray.models.checkpoint import Checkpoint, load_attention, load_ffn
from afd_ray.request import Request, SamplingParams, TokenOutput
from afd_ray.telemetry import Recorder
from benchmarks._machine import hardware

TURNS = 20_000


def mean_us(work: Callable[[], object]) -> float:
    """CPU time of one call."""
    for _ in range(TURNS // 10):
        work()
    started_s = time.thread_time()
    for _ in range(TURNS):
        work()
    return 1e6 * (time.thread_time() - started_s) / TURNS


def record_us() -> float:
    """Of one stage, without a trace; durations differ from call to call."""
    recorder, drawn = Recorder(), random.Random(0)
    ends_ns = [drawn.randrange(50_000, 5_000_000) for _ in range(1000)]
    return mean_us(lambda: [recorder.record("attention", 0, 3, 7, 32, 0, end_ns) for end_ns in ends_ns[:100]]) / 100


def batch_us(rows: int) -> float:
    """Of one decoding micro-batch: its tokens' latencies, who begins, and the sums over flights."""
    requests = [Request(f"request-{i}", (1,) * 8, SamplingParams()) for i in range(rows)]
    batch = MicroBatch(0, tuple(Chunk(Sequence(request), 8, 1, True) for request in requests))
    clocks, flights, outputs = RequestClocks(), Flights(), [TokenOutput(request.id, 7) for request in requests]
    for request in requests:
        clocks.start(request.id, time.monotonic())

    def measure() -> object:
        clocks.schedule((chunk.sequence.id for chunk in batch.chunks if not chunk.start), 0.0)
        clocks.note(outputs, time.monotonic())
        return flights.plus(Flights(1, rows, 9 * rows, 1.0, 1.0, 2, 3.0)), batch.prompt_tokens

    return mean_us(measure)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)  # so that the loop's thread does all of its work
    checkpoint = Checkpoint.open(args.model)
    drawn = random.Random(0)
    params = SamplingParams(max_tokens=args.tokens, temperature=0.0, ignore_eos=True)
    ids = range(1, checkpoint.config.vocab_size)
    requests = [Request(f"r{i}", tuple(drawn.choices(ids, k=args.context)), params) for i in range(args.requests)]
    epoch = Epoch(1, 1, 1, 1, args.micro_batches)
    with LocalCluster(load_attention(checkpoint), lambda shard: load_ffn(checkpoint, shard), epoch) as local:
        local.generate(requests[:1])
        before = recorded(local)
        local.generate(requests)
        after = recorded(local)
    steps, records, spent_s = (late - early for late, early in zip(after, before, strict=True))
    records_a_step, step_us = records / steps, 1e6 * spent_s / steps
    rows = args.requests / args.micro_batches
    a_record_us, a_batch_us = record_us(), batch_us(round(rows))
    return {
        "rows": rows,
        "step_us": round(step_us),
        "records_a_step": round(records_a_step, 1),
        "record_us": round(a_record_us, 2),
        "batch_us": round(a_batch_us, 1),
        "share": round((records_a_step * a_record_us + a_batch_us) / step_us, 5),
    }


def recorded(local: LocalCluster) -> tuple[int, int, float]:
    """Of the attention loop, which records the most: micro-batches, records, seconds of its thread on the CPU."""
    (loop,) = local.attention
    records = sum(us.count for us in loop.recorder.stages_us().values())
    return loop.flights.count, records, loop.call(time.thread_time).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--context", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--micro-batches", type=int, default=2)
    args = parser.parse_args()
    asked = {name: getattr(args, name) for name in ("requests", "context", "tokens", "micro_batches")}
    print(
        json.dumps({"date": date.today().isoformat(), "hardware": hardware(), "model": args.model.name, **asked, **measure(args)})
    )


if __name__ == "__main__":
    main()
