"""What the step loops measure: busy time by stage, and a trace of chosen steps."""

import time
from collections.abc import Iterable
from typing import Any, NamedTuple

from afd_ray.histogram import Histogram


class StageEvent(NamedTuple):
    """One stage of one micro-batch; times are this host's monotonic clock."""

    stage: str
    slot: int
    layer: int
    step: int
    rows: int
    start_ns: int
    end_ns: int
    peer: int = -1
    """Group rank at the other end, for transfers."""


class Recorder:
    """Counts one loop's stages. Written by the loop's thread alone; readers take snapshots."""

    def __init__(self) -> None:
        self._stages_us: dict[str, Histogram] = {}
        self._events: list[StageEvent] | None = None

    def record(self, stage: str, slot: int, layer: int, step: int, rows: int, start_ns: int, end_ns: int, peer: int = -1) -> None:
        """As StageEvent. In the hot path: an event is made only while tracing."""
        durations_us = self._stages_us.get(stage)
        if durations_us is None:
            durations_us = self._stages_us[stage] = Histogram()
        durations_us.add((end_ns - start_ns) / 1000)
        if self._events is not None:
            self._events.append(StageEvent(stage, slot, layer, step, rows, start_ns, end_ns, peer))

    def start_trace(self) -> None:
        self._events = []

    def take_trace(self) -> list[StageEvent]:
        """The events since `start_trace`; ends the trace."""
        events, self._events = self._events, None
        return events or []

    def runs(self, stage: str) -> int:
        """How often it has run."""
        durations_us = self._stages_us.get(stage)
        return durations_us.count if durations_us else 0

    def stages_us(self) -> dict[str, Histogram]:
        """The durations of every stage that has run, since the start."""
        return {stage: durations_us.copy() for stage, durations_us in self._stages_us.copy().items()}


def quantiles_ms(values: Iterable[float]) -> dict[str, float] | None:
    """p50, p95 and p99 by nearest rank; None without values."""
    ordered = sorted(values)
    if not ordered:
        return None
    return {f"p{q}": round(ordered[min(len(ordered) - 1, len(ordered) * q // 100)], 3) for q in (50, 95, 99)}


def clock_offset_ns() -> int:
    """What to add to this host's monotonic clock to get wall-clock time."""
    return time.time_ns() - time.monotonic_ns()


class Overlap(NamedTuple):
    """How busy the stages were at the same time."""

    figure: float
    """Busy time of all actors over wall time: 1 is one after the other, the number of actors is all at once."""
    busy: tuple[float, ...]
    """Share of the wall time that each actor was busy."""


def overlap(actors: Iterable[Iterable[StageEvent]], stages: tuple[str, ...] = ("attention", "head", "ffn")) -> Overlap | None:
    """Over the window in which every actor was traced, waiting left out; None when there is none. One clock for all events."""
    spans = [[(e.start_ns, e.end_ns) for e in events if e.stage in stages] for events in actors]
    if not spans or not all(spans):
        return None
    start = max(min(s for s, _ in actor) for actor in spans)
    end = min(max(e for _, e in actor) for actor in spans)
    if end <= start:
        return None
    busy = tuple(sum(max(0, min(e, end) - max(s, start)) for s, e in actor) / (end - start) for actor in spans)
    return Overlap(round(sum(busy), 3), tuple(round(share, 3) for share in busy))


def on_one_clock(actor: dict[str, Any]) -> list[StageEvent]:
    """One actor's traced events in wall-clock time: {"offset_ns", "events": [StageEvent as list, ...]}."""
    offset_ns = actor["offset_ns"]
    events = (StageEvent(*raw) for raw in actor["events"])
    return [e._replace(start_ns=e.start_ns + offset_ns, end_ns=e.end_ns + offset_ns) for e in events]


def chrome_trace(actors: list[dict[str, Any]]) -> dict[str, Any]:
    """Chrome/Perfetto trace JSON of several actors: [{"name", "offset_ns", "events": [StageEvent as list, ...]}].

    One process a actor, one thread a micro-batch slot; time in microseconds from the first event.
    """
    rows = [(pid, event, event.start_ns) for pid, actor in enumerate(actors) for event in on_one_clock(actor)]
    origin = min((start for _, _, start in rows), default=0)
    names: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": actor["name"]}}
        for pid, actor in enumerate(actors)
    ]
    lanes = sorted({(pid, *_lane(event)) for pid, event, _ in rows})
    names += [{"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": name}} for pid, tid, name in lanes]
    return {
        "traceEvents": names + [_complete_event(pid, event, start - origin) for pid, event, start in rows],
        "displayTimeUnit": "ms",
    }


def _lane(event: StageEvent) -> tuple[int, str]:
    """(thread id, name): stages and arrivals of each micro-batch apart, waiting on its own."""
    if event.stage.endswith("_wait"):
        return 0, "waiting"
    arriving = event.stage in ("a2f", "f2a")
    return 1 + event.slot * 2 + arriving, f"micro-batch {event.slot}" + (" arriving" if arriving else "")


def _complete_event(pid: int, event: StageEvent, start_ns: int) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": f"{event.stage} L{event.layer}" if event.stage in ("attention", "ffn", "a2f", "f2a") else event.stage,
        "cat": event.stage,
        "pid": pid,
        "tid": _lane(event)[0],
        "ts": start_ns / 1000,
        "dur": (event.end_ns - event.start_ns) / 1000,
        "args": {"slot": event.slot, "layer": event.layer, "step": event.step, "rows": event.rows, "peer": event.peer},
    }
