"""What both step loops share: a thread of their own, reached from others through `call` alone, that outlives the epochs it serves in."""

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple, TypeVar

import torch

from afd_ray.handoff.device.streams import Clock
from afd_ray.handoff.mesh import Mesh
from afd_ray.handoff.message import Header, LinkError
from afd_ray.membership.epoch import Epoch
from afd_ray.telemetry import Recorder, clock_offset_ns

T = TypeVar("T")
OnLost = Callable[[int, str], None]
"""Called with the number of the epoch that was lost, and why."""


class Wire(NamedTuple):
    """What a member sends and receives through, in one epoch."""

    mesh: Mesh
    epoch: Epoch
    rank: int
    """Group rank."""
    dtype: torch.dtype
    """Of the hidden rows from attention to FFN; `rows.partial_dtype` gives that of the way back."""


class StepLoop(ABC):
    """The frame of a step loop: one thread that serves in one epoch after the other, until `stop`.

    Without an epoch - before the first, or once a link of the last one broke - it is *unlinked*: it runs nothing, keeps what it
    has, and does what it is told, until `switch` gives it another.
    """

    def __init__(self, arrival: str, waiting: str) -> None:
        self.recorder = Recorder()
        self.started_s = time.monotonic()
        self.on_lost: OnLost | None = None
        """Called on the loop's thread when a link breaks; None: `run` raises the LinkError."""
        self.pause_ms: float | None = None
        """Of the last switch: from when nothing was in flight any more, or the old epoch was lost, until the new one was entered."""
        self._arrival, self._waiting = arrival, waiting
        self._commands: deque[Callable[[], None]] = deque()
        self._commanded = threading.Event()
        self._offset_ns = clock_offset_ns()
        self._wire: Wire | None = None
        self._clock: Clock | None = None
        """The epoch's device's, which then tells how long stages and waits last, not the host's."""
        self._running = self._over = False
        self._idle_since_ns: int | None = None
        self._looked_ns = 0
        """When this loop last looked for messages: what it takes now may have come at any time since."""
        self._free_ns = 0
        """When the last stage ended. One that is due begins then, or when it came to be due, so that what the loop does in between is a part of it."""

    @property
    def wire(self) -> Wire:
        """This epoch's; raises RuntimeError while unlinked."""
        if self._wire is None:
            raise RuntimeError("the step loop has no epoch")
        return self._wire

    @property
    def epoch_number(self) -> int | None:
        """Of the epoch served in; None while unlinked."""
        wire = self._wire
        return None if wire is None else wire.epoch.number

    def call(self, function: Callable[[], T]) -> "Future[T]":
        """Run `function` on the loop's thread between two stages; its result or exception comes through the future.

        RuntimeError once the loop is over. A future that is cancelled in time is not run.
        """
        future: Future[T] = Future()
        if self._over:
            future.set_exception(RuntimeError("the step loop is over"))
            return future

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except Exception as error:  # handed to the caller, who asked for it
                future.set_exception(error)

        self._commands.append(run)
        wire = self._wire  # after the append: a loop that loses or enters an epoch meanwhile looks at its commands then
        if wire is None:
            self._commanded.set()
        else:
            wire.mesh.wake()
        return future

    def stop(self) -> "Future[None]":
        """End `run` between two stages."""
        return self.call(self._stop)

    def switch(self, wire: Wire) -> "Future[float]":
        """Serve in another epoch from now on; what is in flight is taken back. Gives `pause_ms`."""
        return self.call(lambda: self._switch(wire))

    def leave(self) -> "Future[None]":
        """Be unlinked from now on, by choice: what is in flight is taken back, `on_lost` is not called."""
        return self.call(self._leave)

    def abandon(self) -> list[str]:
        """Once `run` has ended: take in what was still asked of it, forget every request; gives their ids."""
        self._over = True
        self._take_commands()
        return []

    @torch.inference_mode()
    def run(self, wire: Wire | None = None) -> None:
        """Serve, in this epoch to begin with if one is given, until `stop`. Whatever fails but a link ends it."""
        self._running = True
        try:
            if wire is not None:
                self._switch(wire)
            while self._running:
                if self._wire is None:
                    self._await_command()
                else:
                    self._serve()
        finally:
            self._running = False

    def _serve(self) -> None:
        """Until stopped or unlinked."""
        try:
            while self._running:
                told = self._take_commands()
                if self._wire is None:
                    return
                progressed = self._receive() or told
                self._looked_ns = time.monotonic_ns()
                if self._running and not self._run_stage() and not progressed:
                    self._wait()
        except LinkError as error:
            if self.on_lost is None:
                raise
            self._lose(str(error), self.on_lost)

    def _lose(self, reason: str, on_lost: OnLost) -> None:
        """Abandon the epoch at once: its other members learn of it by their links to this one."""
        wire, self._wire = self.wire, None
        if self._idle_since_ns is None:
            self._idle_since_ns = time.monotonic_ns()
        wire.mesh.close()
        self._take_back()
        on_lost(wire.epoch.number, reason)

    def _leave(self) -> None:
        self._wire = None
        self._take_back()

    def _await_command(self) -> None:
        while not self._commands:
            self._commanded.wait()
            self._commanded.clear()
        self._take_commands()

    def _switch(self, wire: Wire) -> float:
        if not self._running:
            raise RuntimeError("the step loop is over")
        since_ns = self._idle_since_ns or time.monotonic_ns()
        self._wire = None  # unlinked, should it fail half way
        self._take_back()
        self._clock = wire.mesh.clock
        self._enter(wire)
        self._wire = wire
        self._looked_ns = time.monotonic_ns()
        self._idle_since_ns = None
        self.pause_ms = (self._looked_ns - since_ns) / 1e6
        return self.pause_ms

    def _wait(self) -> None:
        """Until a message or a command comes; time spent with work under way is recorded as waiting, unless a device tells of that."""
        started_ns = time.monotonic_ns()
        under_way = self._under_way()
        self.wire.mesh.wait(None, under_way)
        self._looked_ns = time.monotonic_ns()
        if under_way and self._clock is None:
            self._record(self._waiting, 0, 0, 0, 0, started_ns)

    @abstractmethod
    def _enter(self, wire: Wire) -> None:
        """Begin an epoch."""

    @abstractmethod
    def _take_back(self) -> None:
        """Forget what is under way in the epoch that ends, and touch none of its buffers again; harmless when there is nothing."""

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
        self.recorder.record(stage, slot, layer, step, rows, started_ns, time.monotonic_ns())

    def _record_arrival(self, header: Header) -> None:
        now_ns = time.monotonic_ns()
        # Hosts' clocks differ: a message can seem to arrive before it was sent.
        sent_ns = min(header.sent_ns - self._offset_ns, now_ns)
        self.recorder.record(self._arrival, header.slot, header.layer, header.step, header.rows, sent_ns, now_ns, header.source)

    def _wall_ns(self) -> int:
        return time.monotonic_ns() + self._offset_ns
