"""What can be seen of an actor with a step loop: its steps, its calls, its memory."""

import asyncio
import logging
from abc import ABC, abstractmethod
from typing import Any

import ray

from actors.aside import aside
from actors.memory import resident_bytes
from actors.ray_metrics import RayMetrics
from actors.tracing import count_calls, trace_steps
from afd_ray.engine.loop import StepLoop
from afd_ray.lookback import PERIOD_S, Lookback
from afd_ray.measured import Measured, MeasuredFFN
from afd_ray.metrics import Sample
from afd_ray.models.step3 import AttentionHalf, FFNHalf

logger = logging.getLogger(__name__)


class Observed(ABC):
    """Control methods run on the actor's event loop."""

    def __init__(self) -> None:
        self._traced_enough = asyncio.Event()
        self._lookback: Lookback[Any] | None = None
        self._turning: asyncio.Task[None] | None = None

    @abstractmethod
    def _identity(self) -> dict[str, Any]:
        """Where this actor runs."""

    @abstractmethod
    def _ready_loop(self) -> StepLoop:
        """The step loop of the loaded model; RuntimeError before `load`."""

    @abstractmethod
    def _ready_half(self) -> AttentionHalf | FFNHalf:
        """The half of the model that is served; RuntimeError before `load`."""

    @abstractmethod
    def _stages(self, steps: int) -> tuple[str, int]:
        """The stage that counts steps, and how often it runs in that many."""

    @abstractmethod
    def _look(self) -> Measured | MeasuredFFN:
        """What the step loop has measured since its start."""

    @abstractmethod
    def _samples(self) -> list[Sample]:
        """What this actor exports now."""

    def _start_measuring(self) -> None:
        """Once the model is loaded."""
        self._lookback = Lookback[Any](self._look)
        self._turning = asyncio.get_running_loop().create_task(self._turn())

    def _stop_measuring(self) -> None:
        if self._turning is not None:
            self._turning.cancel()

    async def _turn(self) -> None:
        """On the event loop, so that the step loop is not held up."""
        exported = RayMetrics() if ray.is_initialized() else None
        while True:
            await asyncio.sleep(PERIOD_S)
            self._ready_lookback().turn()
            try:
                if exported is not None:
                    exported.publish(self._samples())
            except Exception:  # whatever Ray's metrics run into, measuring goes on
                logger.exception("metrics are not exported through Ray any more")
                exported = None

    def _ready_lookback(self) -> Lookback[Any]:
        """RuntimeError before `load`."""
        if self._lookback is None:
            raise RuntimeError("nothing is measured before the model is loaded")
        return self._lookback

    def _measured(self) -> dict[str, Any]:
        """For the status: sums since the start, and of the last minute."""
        return {"measured": self._look().dump(), "recent": self._ready_lookback().recent().dump()}

    def _held(self) -> "list[AttentionHalf | FFNHalf]":
        """Everything of the model in this process."""
        return [self._ready_half()]

    @ray.method
    async def trace(self, steps: int, timeout_s: float) -> dict[str, Any]:
        """The stage events of the next `steps` micro-batches, or of those that came within the timeout or until `end_trace`."""
        self._traced_enough.clear()
        events = await trace_steps(self._ready_loop(), *self._stages(steps), timeout_s, self._traced_enough)
        return self._identity() | {"events": events}

    @ray.method
    async def end_trace(self) -> None:
        """Let a trace under way end with what it has."""
        self._traced_enough.set()

    @ray.method
    async def count_ray_calls(self, steps: int, timeout_s: float) -> dict[str, int]:
        """Calls on the step loop's thread over the next `steps` micro-batches, and how many of them go into Ray."""
        return await count_calls(self._ready_loop(), *self._stages(steps), timeout_s)

    @ray.method
    async def resident_bytes(self) -> dict[str, int]:
        """Memory: resident set of the process, and the weights held."""
        return await aside(resident_bytes, self._held())
