"""What is measured of a simulated cluster: the last minute for the policy, the whole run for the report."""

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from afd_ray.autoscaling.observing import quantiles_of
from afd_ray.autoscaling.values import Quantiles, Stages
from afd_ray.histogram import Histogram
from afd_ray.simulation.serving.jobs import Job
from afd_ray.simulation.serving.rounds import PS_PER_S

WINDOW_S = 60.0
PS_PER_MS = PS_PER_S // 1000
MOST_POINTS = 2000


@dataclass(slots=True)
class Tally:
    """Counts and latencies of some time."""

    arrivals: int = 0
    prompt_tokens: int = 0
    rejected: int = 0
    tokens: int = 0
    completions: int = 0
    within: int = 0
    """Requests that met both targets."""
    ttft_ms: Histogram = field(default_factory=Histogram)
    tpot_ms: Histogram = field(default_factory=Histogram)
    """From token to token."""
    request_tpot_ms: Histogram = field(default_factory=Histogram)
    """Mean over a request's tokens after the first."""


class Point(NamedTuple):
    """One moment of a run, for plots; None: nothing to measure."""

    at_s: float
    attention: int
    ffn: int
    requests: int
    waiting: int
    arrivals_s: float
    tpot_p95_ms: float | None
    ttft_p95_ms: float | None


class Measures:
    """Is told what happens (`cluster.Log`)."""

    def __init__(self, tpot_target_ms: float, ttft_target_ms: float, period_s: float) -> None:
        self.whole, self.recent = Tally(), Tally()
        self.queued = 0
        """Requests without a token yet."""
        self._tpot_ps, self._ttft_ps = tpot_target_ms * PS_PER_MS, ttft_target_ms * PS_PER_MS
        self._period_s = period_s
        self._window: deque[Tally] = deque(maxlen=max(1, round(WINDOW_S / period_s)))
        self.rounds = 0
        """Since the start."""
        self._attention_ps = self._ffn_ps = self._round_ps = self._rounds = 0

    def came(self, prompt: int) -> None:
        self.queued += 1
        for tally in (self.whole, self.recent):
            tally.arrivals += 1
            tally.prompt_tokens += prompt

    def refused(self) -> None:
        for tally in (self.whole, self.recent):
            tally.arrivals += 1
            tally.rejected += 1

    def passed(self, rounds: int, duration_ps: int, attention_ps: int, ffn_ps: int) -> None:
        self.rounds += rounds
        self._rounds += rounds
        self._round_ps += duration_ps
        self._attention_ps += attention_ps * rounds
        self._ffn_ps += ffn_ps * rounds

    def decoded(self, tokens: int, gap_ps: float) -> None:
        self.whole.tokens += tokens
        self.recent.tokens += tokens
        if tokens:
            self.recent.tpot_ms.add(gap_ps / PS_PER_MS, tokens)

    def first_token(self, job: Job, at_ps: int) -> None:
        self.queued -= 1
        self.whole.tokens += 1
        self.recent.tokens += 1
        self.recent.ttft_ms.add((at_ps - job.arrived_ps) / PS_PER_MS)

    def finished(self, job: Job, at_ps: int) -> None:
        assert job.first_ps is not None
        gaps = job.produced - 1
        tpot_ps = (at_ps - job.first_ps) / gaps if gaps else 0.0
        within = job.first_ps - job.arrived_ps <= self._ttft_ps and tpot_ps <= self._tpot_ps
        for tally in (self.whole, self.recent):
            tally.completions += 1
            tally.within += within
        if gaps:
            self.whole.request_tpot_ms.add(tpot_ps / PS_PER_MS)

    def stages(self, layers: int, micro_batches: int) -> Stages | None:
        """Since the last `turn`; None when nothing ran."""
        if not self._rounds:
            return None
        attention, ffn, whole = (ps / self._rounds / layers * 1e-6 for ps in (self._attention_ps, self._ffn_ps, self._round_ps))
        return Stages(
            attention=attention,
            ffn=ffn,
            transfer=max(0.0, whole - attention - ffn) if micro_batches == 1 else 0.0,
            attention_wait=max(0.0, whole - micro_batches * attention),
            ffn_wait=max(0.0, whole - micro_batches * ffn),
        )

    def latencies(self) -> tuple[Quantiles | None, Quantiles | None]:
        """TPOT and TTFT over the last minute."""
        tallies = (*self._window, self.recent)
        return quantiles_of(tally.tpot_ms for tally in tallies), quantiles_of(tally.ttft_ms for tally in tallies)

    def turn(self) -> Tally:
        """What was counted since the last turn; counting starts anew."""
        past, self.recent = self.recent, Tally()
        self.whole.tpot_ms.merge(past.tpot_ms)
        self.whole.ttft_ms.merge(past.ttft_ms)
        self._window.append(past)
        self._attention_ps = self._ffn_ps = self._round_ps = self._rounds = 0
        return past


class Course:
    """How a run went over time, in at most MOST_POINTS points: when there are more, every other one is dropped."""

    def __init__(self) -> None:
        self.points: list[Point] = []
        self._every, self._seen = 1, 0

    def add(self, point: Point) -> None:
        self._seen += 1
        if self._seen % self._every:
            return
        self.points.append(point)
        if len(self.points) > MOST_POINTS:
            self.points = self.points[1::2]
            self._every *= 2
