"""The virtual clock, what processes there are, and the links between them."""

import heapq
from collections.abc import Callable
from random import Random
from typing import Any

from afd_ray.membership.steps import Deadlines

DEADLINES = Deadlines(
    settle_s=0.05,
    provide_s=3.0,
    load_s=2.0,
    prepare_s=1.0,
    connect_s=1.5,
    reconnect_s=1.5,
    move_out_s=1.0,
    drain_s=1.0,
    switch_s=1.0,
    retire_s=1.0,
    resume_s=1.0,
    discard_s=1.0,
    fence_s=8.0,
    backoff_s=0.3,
    most_backoff_s=2.0,
)
"""Seconds of virtual time. Steps take long and control calls too, so that few events make an eventful life."""
CONNECT_TIMEOUT_S = 1.0
"""A member's own, so that it can name the edge before the coordinator gives up."""
HOLD_S = 2.5
"""After so long without an answer a drained member goes on by itself."""
HELD_S = 0.6
"""At a step boundary it waits no longer than this for the word to switch."""
DETECT_S = 0.5
"""A silent process is lost after this long."""


class Violation(Exception):
    """Something happened that must never happen."""


class Process:
    """Something that can be killed, stopped for a while, and reached by messages."""

    __slots__ = ("alive", "backlog", "name", "paused", "paused_at", "world")

    def __init__(self, world: "World", name: str) -> None:
        self.world, self.name = world, name
        self.alive, self.paused = True, False
        self.paused_at = 0.0
        self.backlog: list[tuple[Callable[..., None], tuple[Any, ...]]] = []

    def run(self, action: Callable[..., None], *args: Any) -> None:
        """Do it in this process: now, when it goes on, or never."""
        if not self.alive:
            return
        if self.paused:
            self.backlog.append((action, args))
        else:
            action(*args)

    def after(self, delay_s: float, action: Callable[..., None], *args: Any) -> None:
        self.world.after(delay_s, self.run, action, *args)

    def pause(self) -> None:
        if self.alive and not self.paused:
            self.paused, self.paused_at = True, self.world.now

    def go_on(self) -> None:
        if self.alive and self.paused:
            self.paused = False
            backlog, self.backlog = self.backlog, []
            for action, args in backlog:
                self.run(action, *args)


class World:
    """One seed's run: time, chance, and what goes between processes."""

    def __init__(self, seed: int, *, tracing: bool = False) -> None:
        self.now = 0.0
        self.random = Random(seed)
        self.events = 0
        self.tracing = tracing
        self.trace: list[str] = []
        self.faulty = True
        """Whether calls may fail and be slow; False once the storm is over."""
        self._queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._cut: dict[tuple[str, str], tuple[bool, int]] = {}

    def after(self, delay_s: float, action: Callable[..., None], *args: Any) -> None:
        self.events += 1
        heapq.heappush(self._queue, (self.now + delay_s, self.events, action, args))

    def step(self) -> bool:
        """Let the next thing happen; False: nothing is left to happen."""
        if not self._queue:
            return False
        self.now, _, action, args = heapq.heappop(self._queue)
        action(*args)
        return True

    def note(self, line: str) -> None:
        """For the trace; callers ask `tracing` first where making the line costs something."""
        if self.tracing:
            self.trace.append(f"{self.now:9.4f}  {line}")

    def delay(self, low_s: float, high_s: float) -> float:
        return low_s + (high_s - low_s) * self.random.random()

    # --- links between two processes ------------------------------------------------------------------------------------------

    def link(self, one: str, other: str) -> int:
        """The number of the connection that these two can have now, -1 while they are cut off: it changes with every cut."""
        if not self._cut:
            return 0
        is_cut, count = self._cut.get((one, other) if one < other else (other, one), (False, 0))
        return -1 if is_cut else count

    def cut(self, one: str, other: str) -> None:
        pair = (one, other) if one < other else (other, one)
        self._cut[pair] = (True, self._cut.get(pair, (False, 0))[1])

    def heal(self, one: str, other: str) -> None:
        pair = (one, other) if one < other else (other, one)
        was_cut, count = self._cut.get(pair, (False, 0))
        if was_cut:
            self._cut[pair] = (False, count + 1)

    def heal_all(self) -> None:
        for one, other in list(self._cut):
            self.heal(one, other)
