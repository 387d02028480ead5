"""What both step loops share: a thread of their own, reached from others through `call` alone."""

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple, TypeVar

import torch

from afd_ray.handoff.mesh import Mesh
from afd_ray.handoff.message import Header
from afd_ray.membership.epoch import Epoch
from afd_ray.telemetry import Recorder, StageEvent, clock_offset_ns

T = TypeVar("T")


class Wire(NamedTuple):
    """What a member sends and receives through, in one epoch."""

    mesh: Mesh
    epoch: Epoch
    rank: int
    """Group rank."""
    dtype: torch.dtype
    """Of the hidden rows from attention to FFN; `rows.partial_dtype` gives that of the way back."""


class StepLoop(ABC):
    """The frame of a step loop: `run(wire)` serves one epoch until `stop`."""

    def __init__(self, arrival: str, waiting: str) -> None:
        self.recorder = Recorder()
        self._arrival, self._waiting = arrival, waiting
        self._commands: deque[Callable[[], None]] = deque()
        self._offset_ns = clock_offset_ns()
        self._wire: Wire | None = None
        self._running = False
        self._looked_ns = 0
        """When this loop last looked for messages: what it takes now may have come at any time since."""

    @property
    def wire(self) -> Wire:
        """This epoch's; raises RuntimeError before the first."""
        if self._wire is None:
            raise RuntimeError("the step loop has no epoch yet")
        return self._wire

    def call(self, function: Callable[[], T]) -> "Future[T]":
        """Run `function` on the loop's thread between two stages; its result or exception comes through the future."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except Exception as error:  # handed to the caller, who asked for it
                future.set_exception(error)

        self._commands.append(run)
        if self._wire is not None:
            self._wire.mesh.wake()
        return future

    def stop(self) -> "Future[None]":
        """End `run` between two stages."""
        return self.call(self._stop)

    @torch.inference_mode()
    def run(self, wire: Wire) -> None:
        """Serve in this epoch until `stop`; raises LinkError when a peer is lost."""
        self._wire = wire
        self._running = True
        self._looked_ns = time.monotonic_ns()
        self._enter(wire)
        while self._running:
            progressed = self._take_commands() | self._receive()
            self._looked_ns = time.monotonic_ns()
            if self._running and not self._run_stage() and not progressed:
                self._wait()

    def _wait(self) -> None:
        """Until a message or a command comes; time spent with work under way is recorded as waiting."""
        started_ns = time.monotonic_ns()
        under_way = self._under_way()
        self.wire.mesh.wait(None, under_way)
        self._looked_ns = time.monotonic_ns()
        if under_way:
            self._record(self._waiting, 0, 0, 0, 0, started_ns)

    @abstractmethod
    def _enter(self, wire: Wire) -> None:
        """Begin an epoch."""

    @abstractmethod
    def _receive(self) -> bool:
        """Take in every message that has arrived; False when there was none."""

    @abstractmethod
    def _run_stage(self) -> bool:
        """Run one stage; False when none can."""

    @abstractmethod
    def _under_way(self) -> bool:
        """Whether a message is due."""

    def _stop(self) -> None:
        self._running = False

    def _take_commands(self) -> bool:
        took = bool(self._commands)
        while self._commands:
            self._commands.popleft()()
        return took

    def _record(self, stage: str, slot: int, layer: int, step: int, rows: int, started_ns: int) -> None:
        self.recorder.record(StageEvent(stage, slot, layer, step, rows, started_ns, time.monotonic_ns()))

    def _record_arrival(self, header: Header) -> None:
        now_ns = time.monotonic_ns()
        # Hosts' clocks differ: a message can seem to arrive before it was sent.
        sent_ns = min(header.sent_ns - self._offset_ns, now_ns)
        event = StageEvent(self._arrival, header.slot, header.layer, header.step, header.rows, sent_ns, now_ns, header.source)
        self.recorder.record(event)

    def _wall_ns(self) -> int:
        return time.monotonic_ns() + self._offset_ns
