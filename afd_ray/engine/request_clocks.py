"""When requests came and when their last tokens went: time to first token, and time between tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

from afd_ray.request import TokenOutput
from afd_ray.telemetry import LatencyWindow


@dataclass(slots=True)
class _Clock:
    since_s: float | None
    """When it came, or its last token went; None: it came with tokens from elsewhere, and has had none here."""
    begun: bool = False
    """Whether it has had its first token."""


class RequestClocks:
    """Measures TTFT and TPOT of the requests of one attention rank, in ms."""

    def __init__(self) -> None:
        self.ttft, self.tpot = LatencyWindow(), LatencyWindow()
        self._clocks: dict[str, _Clock] = {}

    def start(self, request_id: str, now_s: float, *, continued: bool = False) -> None:
        """`continued`: it had tokens elsewhere, so that its first one here says nothing of either."""
        self._clocks[request_id] = _Clock(None if continued else now_s, begun=continued)

    def forget(self, request_id: str) -> None:
        self._clocks.pop(request_id, None)

    def clear(self) -> None:
        self._clocks.clear()

    def note(self, outputs: Sequence[TokenOutput], now_s: float) -> None:
        """These tokens go out now."""
        for output in outputs:
            clock = self._clocks.get(output.request_id)
            if clock is None:
                continue
            if output.token_id is not None:
                if clock.since_s is not None:
                    (self.tpot if clock.begun else self.ttft).add((now_s - clock.since_s) * 1000, now_s)
                clock.since_s, clock.begun = now_s, True
            if output.finish_reason is not None:
                del self._clocks[output.request_id]
