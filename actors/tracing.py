"""Recording the next steps of a running step loop."""

import asyncio
import time
from typing import Any

from afd_ray.telemetry import Recorder

POLL_S = 0.02


async def trace_steps(recorder: Recorder, stage: str, count: int, timeout_s: float) -> list[list[Any]]:
    """Record until `stage` has run `count` more times or the time is over; gives the events as lists."""
    target = recorder.count.get(stage, 0) + count
    deadline_s = time.monotonic() + timeout_s
    recorder.start_trace()
    while recorder.count.get(stage, 0) < target and time.monotonic() < deadline_s:
        await asyncio.sleep(POLL_S)
    return [list(event) for event in recorder.take_trace()]
