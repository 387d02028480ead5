"""When requests came, began, and had their last tokens: the latencies that follow from it, and how many there were."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from afd_ray.histogram import Histogram
from afd_ray.request import TokenOutput


class Targets(NamedTuple):
    """What a request is late beyond, in milliseconds."""

    ttft_ms: float
    tpot_ms: float
    """Of its tokens on average."""


@dataclass(slots=True)
class _Clock:
    since_s: float | None
    """When it came, or its last token went; None: it came with tokens from elsewhere, and has had none here."""
    begun: bool = False
    """Whether it has had its first token."""
    ttft_s: float = 0.0
    """Zero where that was elsewhere."""
    gaps_s: float = 0.0
    """Of its tokens here, each to its next."""
    gaps: int = 0


class RequestClocks:
    """Measures the requests of one attention rank, since its start; belongs to the step loop's thread, others take copies."""

    def __init__(self, targets: Targets | None = None) -> None:
        """`targets`: None where no request is late."""
        self.targets = targets
        self.ttft_ms, self.tpot_ms, self.queue_wait_ms, self.tokens_per_step = (Histogram() for _ in range(4))
        self.arrivals = self.output_tokens = self.completions = self.late = 0
        self._clocks: dict[str, _Clock] = {}
        self._waiting: dict[str, float] = {}
        """When those came that nothing was scheduled of yet; what moved in has waited elsewhere."""

    def start(self, request_id: str, now_s: float, *, continued: bool = False) -> None:
        """`continued`: it had tokens elsewhere, so that its first one here says nothing of either."""
        self._clocks[request_id] = _Clock(None if continued else now_s, begun=continued)
        if not continued:
            self.arrivals += 1
            self._waiting[request_id] = now_s

    def schedule(self, request_ids: Iterable[str], now_s: float) -> None:
        """Their first rows are computed from now on, for the first time or again."""
        for request_id in request_ids:
            came_s = self._waiting.pop(request_id, None)
            if came_s is not None:
                self.queue_wait_ms.add((now_s - came_s) * 1000)

    def forget(self, request_id: str) -> None:
        self._clocks.pop(request_id, None)
        self._waiting.pop(request_id, None)

    def clear(self) -> None:
        self._clocks.clear()
        self._waiting.clear()

    def oldest_waiting_s(self, now_s: float) -> float | None:
        """How long the one has waited that waits longest; None: nothing waits. May be called by another thread."""
        came_s = list(self._waiting.values())
        return now_s - min(came_s) if came_s else None

    def note(self, outputs: Sequence[TokenOutput], now_s: float) -> None:
        """One micro-batch's tokens go out now."""
        since_s = Counter(last_s for output in outputs if (last_s := self._note(output, now_s)) is not None)
        for last_s, times in since_s.items():  # mostly one: those of a micro-batch go together
            self.tpot_ms.add((now_s - last_s) * 1000, times)
        tokens = sum(output.token_id is not None for output in outputs)
        if tokens:
            self.output_tokens += tokens
            self.tokens_per_step.add(tokens)

    def _note(self, output: TokenOutput, now_s: float) -> float | None:
        """When the token before this one went; None where there is no such pair."""
        clock = self._clocks.get(output.request_id)
        if clock is None:
            return None
        last_s = None
        if output.token_id is not None:
            if clock.begun:
                last_s = clock.since_s
                clock.gaps += 1
                clock.gaps_s += now_s - last_s if last_s is not None else 0.0
            elif clock.since_s is not None:
                clock.ttft_s = now_s - clock.since_s
                self.ttft_ms.add(clock.ttft_s * 1000)
            clock.since_s, clock.begun = now_s, True
        if output.finish_reason is not None:
            self.completions += 1
            self.late += self._is_late(clock)
            self.forget(output.request_id)
        return last_s

    def _is_late(self, clock: _Clock) -> bool:
        targets = self.targets
        if targets is None:
            return False
        return clock.ttft_s * 1000 > targets.ttft_ms or clock.gaps_s * 1000 > targets.tpot_ms * clock.gaps
