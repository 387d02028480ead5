"""A trace sent to a live cluster, every request at its time, and what clients saw."""

import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from actors.cluster import Cluster, Generation
from afd_ray.request import SamplingParams
from afd_ray.simulation.serving import Arrival, Outcome

MOST_STREAMS = 400
ALLOWED = {"tpot_p50": 0.10, "tpot_p95": 0.20, "tokens_s": 0.05}
"""How far simulated figures may be from live ones."""


class Figures(NamedTuple):
    """What clients saw, or would have."""

    tpot_p50: float
    """ms, of a request's mean over its tokens after the first."""
    tpot_p95: float
    ttft_p50: float
    tokens_s: float
    """From the first arrival to the last token."""

    @classmethod
    def of(cls, outcome: Outcome, first_s: float) -> "Figures":
        """Of a simulation whose first request comes at `first_s`."""
        summary, seconds = outcome.summary(), outcome.duration_s - first_s
        tpot, ttft = summary["tpot_ms"], summary["ttft_ms"]
        return cls(tpot["p50"], tpot["p95"], ttft["p50"], outcome.tally.tokens / seconds)


def deviations(simulated: Figures, live: Figures) -> dict[str, float]:
    """Of each figure that is judged, as a share of the live one."""
    return {name: getattr(simulated, name) / getattr(live, name) - 1 for name in ALLOWED}


def within(simulated: Figures, live: Figures) -> bool:
    """Whether all of them are as near as is asked."""
    return all(abs(share) <= ALLOWED[name] for name, share in deviations(simulated, live).items())


def replay(cluster: Cluster, arrivals: Sequence[Arrival]) -> Figures:
    """Every request at its time, each with a prompt of its own: alike, they would all choose the same experts, and take less time in the FFN."""
    drawn, vocab_size = random.Random(0), cluster.measured()["facts"]["vocab_size"]
    prompts = [[drawn.randrange(vocab_size) for _ in range(arrival.prompt)] for arrival in arrivals]
    began_s = time.perf_counter()

    def serve(arrival: Arrival, prompt: list[int]) -> tuple[float, Generation]:
        time.sleep(max(0.0, arrival.at_s - (time.perf_counter() - began_s)))
        submitted_s = time.perf_counter() - began_s
        params = SamplingParams(max_tokens=arrival.output, temperature=0.0, ignore_eos=True)
        (answer,) = cluster.generate([prompt], params)
        return submitted_s, answer

    with ThreadPoolExecutor(MOST_STREAMS) as streams:
        answers = list(streams.map(serve, arrivals, prompts))
    ended_s = max(at_s + answer.times_s[-1] for at_s, answer in answers)
    tokens = sum(len(answer.times_s) for _, answer in answers)
    means_ms = sorted(1000 * (t[-1] - t[0]) / (len(t) - 1) for _, a in answers if len(t := a.times_s) > 1)
    firsts_ms = sorted(1000 * answer.times_s[0] for _, answer in answers)
    return Figures(at(means_ms, 0.5), at(means_ms, 0.95), at(firsts_ms, 0.5), tokens / (ended_s - arrivals[0].at_s))


def at(ordered: Sequence[float], share: float) -> float:
    """By nearest rank."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]
