"""How long stages last on a device that the host runs ahead of: marks in its stream, read once they have been passed.

Marks lie between what is launched, never in a captured graph. Nothing here waits for the device.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from afd_ray.engine.stage_costs import FlightTimes
from afd_ray.handoff.device.streams import Clock, TimedMark

WAITED_US = 20.0
"""A stream that stood at a wait for less may have found there what it waited for: when that came is not known then."""

Record = Callable[[str, int, int, int, int, int, int], None]
"""As `Recorder.record`, without a peer."""


class StreamMarks:
    """What the marks of all micro-batches of one stream share."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.freed: TimedMark | None = None
        """The end of its newest stage."""


class _Marked:
    """One stage, as it is ordered."""

    def __init__(self, freed: TimedMark | None, due: TimedMark | None, begun: TimedMark, busy_us: int) -> None:
        self.freed, self.due, self.begun = freed, due, begun
        self.busy_us = busy_us
        """Of the FFN before it; 0: not known."""
        self.sent: TimedMark | None = None
        self.sent_at: int | None = None
        self.ended = begun


class Stage(NamedTuple):
    """One attention stage by the device's clock."""

    busy_us: float
    waited_us: float
    """For which the stream stood still before it, since the stage before it in the stream; 0 before the first layer, which waits for nothing."""
    ago_us: float
    """From its end to that of the head."""


class FlightMarks:
    """Of one micro-batch at its attention rank: a stage for each layer, then the head."""

    def __init__(self, stream: StreamMarks) -> None:
        """The first layer begins, with what comes before it."""
        self._stream = stream
        self._due: TimedMark | None = None
        self._marked = [_Marked(stream.freed, None, stream.clock(), 0)]

    def due(self, begun: int) -> None:
        """The stream is about to wait for what the FFN returns. `begun`: as many micro-batches have been begun by now."""
        self._due = self._stream.clock() if self._marked[-1].sent_at == begun else None

    def begin(self, busy_us: Sequence[int]) -> None:
        """The next stage, behind the wait. `busy_us`: what each part of what came says of its FFN stage."""
        known = max(busy_us) if all(busy_us) else 0
        self._marked.append(_Marked(self._stream.freed, self._due, self._stream.clock(), known))

    def send(self, begun: int | None) -> None:
        """The rows have been ordered on their way. `begun`: as for `due`; None: other micro-batches are in flight."""
        if begun is not None:
            self._marked[-1].sent, self._marked[-1].sent_at = self._stream.clock(), begun

    def end(self) -> None:
        """The stage's last order has been given."""
        self._stream.freed = self._marked[-1].ended = self._stream.clock()

    def stages(self) -> list[Stage]:
        """Once all marks have been passed."""
        head = self._marked[-1].ended
        return [
            Stage(
                marked.ended.since_us(marked.begun),
                marked.begun.since_us(marked.freed) if layer and marked.freed is not None else 0.0,
                head.since_us(marked.ended),
            )
            for layer, marked in enumerate(self._marked)
        ]

    def tell_of_ffn(self, times: FlightTimes, *, alone: bool) -> bool:
        """What is known of the FFN and of the way there; False, and nothing, unless the FFN's part of every layer is. `alone`: it serves no other rank.

        Rows may lie at the FFN until it has done with others or others have come, for how long nobody measures. So a round trip tells of the transfer only
        if no other micro-batch of this rank was in flight during it, of no more than its most if other ranks are there; and only if the stream stood
        waiting when it ended.
        """
        returned = self._marked[1:]
        if not all(after.busy_us for after in returned):
            return False
        for before, after in zip(self._marked, returned, strict=False):
            times.fed(after.busy_us)
            if after.due is None or before.sent is None or after.begun.since_us(after.due) < WAITED_US:
                continue
            transfer_us = max(0.0, after.begun.since_us(before.sent) - after.busy_us)
            if alone:
                times.crossed(transfer_us)
            else:
                times.crossed_within(transfer_us)
        return True


class _Ordered(NamedTuple):
    """One FFN stage whose end has not been seen yet."""

    freed: TimedMark | None
    begun: TimedMark
    ended: TimedMark
    ordered_ns: int
    slot: int
    layer: int
    step: int
    rows: int


class FFNMarks:
    """The stages of one FFN rank."""

    def __init__(self, clock: Clock, record: Record) -> None:
        """`record` is told of stages and waits, late: once they are known."""
        self._clock, self._record = clock, record
        self._freed: TimedMark | None = None
        self._begun: TimedMark | None = None
        self._ordered: deque[_Ordered] = deque()
        self._known_us: dict[tuple[int, int], int] = {}
        self._seen: tuple[TimedMark, int] | None = None

    def begin(self) -> None:
        """A stage, behind the waits for its rows."""
        self._begun = self._clock()

    def end(self, slot: int, layer: int, step: int, rows: int, now_ns: int) -> None:
        """Of the stage that began last."""
        assert self._begun is not None
        ended = self._clock()
        self._ordered.append(_Ordered(self._freed, self._begun, ended, now_ns, slot, layer, step, rows))
        self._freed = ended

    def look(self, now_ns: int) -> None:
        """Learn from what has been passed."""
        while self._ordered and self._ordered[0].ended.passed():
            stage = self._ordered.popleft()
            busy_us = stage.ended.since_us(stage.begun)
            self._known_us[stage.layer, stage.rows.bit_length()] = max(1, round(busy_us))
            end_ns = self._placed_ns(stage.ended, stage.ordered_ns, now_ns)
            start_ns = end_ns - round(busy_us * 1000)
            if stage.layer and stage.freed is not None:
                waited_us = stage.begun.since_us(stage.freed)
                self._record("ffn_wait", 0, 0, 0, 0, start_ns - round(waited_us * 1000), start_ns)
            self._record("ffn", stage.slot, stage.layer, stage.step, stage.rows, start_ns, end_ns)

    def busy_us(self, layer: int, rows: int) -> int:
        """What the newest stage of this layer took that is known of the same power of two of rows; 0: none is."""
        return self._known_us.get((layer, rows.bit_length()), 0)

    def _placed_ns(self, mark: TimedMark, ordered_ns: int, seen_ns: int) -> int:
        """When it was passed by the host's clock: as far behind the last one as the device says, after it was ordered and before it was seen."""
        placed_ns = seen_ns
        if self._seen is not None:
            last, last_ns = self._seen
            placed_ns = max(ordered_ns, min(seen_ns, last_ns + round(mark.since_us(last) * 1000)))
        self._seen = mark, placed_ns
        return placed_ns
