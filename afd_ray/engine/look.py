"""A look at what a step loop has measured since its start, from any thread: nothing here waits for the loop."""

import time

from afd_ray.engine.attention import AttentionLoop
from afd_ray.engine.ffn import FFNLoop
from afd_ray.measured import Measured, MeasuredFFN


def look_at_attention(loop: AttentionLoop) -> Measured:
    now_s, scheduler, clocks, flights = time.monotonic(), loop.scheduler, loop.clocks, loop.flights
    return Measured(
        since_s=loop.started_s,
        at_s=now_s,
        arrivals=clocks.arrivals,
        prompt_tokens=loop.prompt_tokens,
        output_tokens=clocks.output_tokens,
        completions=clocks.completions,
        late=clocks.late,
        preemptions=scheduler.preemptions,
        steps=loop.steps,
        tpot_ms=clocks.tpot_ms.copy(),
        ttft_ms=clocks.ttft_ms.copy(),
        queue_wait_ms=clocks.queue_wait_ms.copy(),
        tokens_per_step=clocks.tokens_per_step.copy(),
        running=scheduler.running,
        waiting=scheduler.waiting,
        oldest_waiting_s=clocks.oldest_waiting_s(now_s),
        context_tokens=scheduler.context_tokens,
        kv_used=scheduler.kv_used,
        kv_total=scheduler.kv_total,
        flights=flights,
        stages=loop.recorder.stages_us(),
    )


def look_at_ffn(loop: FFNLoop) -> MeasuredFFN:
    return MeasuredFFN(loop.started_s, time.monotonic(), loop.rows, loop.steps, loop.recorder.stages_us())
