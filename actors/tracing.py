"""Watching a running step loop: its next steps, and what it calls."""

import asyncio
import sys
import time
from types import FrameType
from typing import Any

from afd_ray.engine.loop import StepLoop

POLL_S = 0.02


async def trace_steps(loop: StepLoop, stage: str, count: int, timeout_s: float, enough: asyncio.Event) -> list[list[Any]]:
    """Record until `stage` has run `count` more times, `enough` is set or the time is over; gives the events as lists."""
    loop.recorder.start_trace()
    await _passed(loop, stage, count, timeout_s, enough)
    return [list(event) for event in loop.recorder.take_trace()]


async def count_calls(loop: StepLoop, stage: str, count: int, timeout_s: float, package: str = "ray") -> dict[str, int]:
    """Function calls on the step loop's thread until `stage` has run `count` more times: all of them, and those into `package`."""
    counter = CallCounter(package)
    await asyncio.wrap_future(loop.call(lambda: sys.setprofile(counter)))
    await _passed(loop, stage, count, timeout_s, asyncio.Event())
    await asyncio.wrap_future(loop.call(lambda: sys.setprofile(None)))
    return {"calls": counter.calls, f"{package}_calls": counter.into_package}


class CallCounter:
    """A profile function: counts the calls that Python and built-in functions get."""

    def __init__(self, package: str) -> None:
        self.calls = self.into_package = 0
        self._package = package

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            self._count(frame.f_globals.get("__name__"))
        elif event == "c_call":
            self._count(getattr(argument, "__module__", None))

    def _count(self, module: object) -> None:
        self.calls += 1
        self.into_package += isinstance(module, str) and module.partition(".")[0] == self._package


async def _passed(loop: StepLoop, stage: str, count: int, timeout_s: float, enough: asyncio.Event) -> None:
    target = loop.recorder.runs(stage) + count
    deadline_s = time.monotonic() + timeout_s
    while loop.recorder.runs(stage) < target and time.monotonic() < deadline_s and not enough.is_set():
        await asyncio.sleep(POLL_S)
