"""A storm's account for people and for files."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.chaos.run import Result
from benchmarks.chaos.schedule import CALM
from benchmarks.chaos.stalls import spread
from benchmarks.chaos.storm import Struck

ASKED_S = {"kill ffn": 0.5, "kill attention": 1.5}
"""Stall of the slowest answer, p50 over deaths of an otherwise healthy cluster."""
STALL_HEADER = """\
| fault | when | faults | noticed after, p50 | p95 | stall of the slowest answer, p50 | p95 | max | of all answers, p50 | whole again, p50 | asked to retry |
|---|---|---|---|---|---|---|---|---|---|---|"""


def markdown(result: Result) -> str:
    calm = spread(result.calm_gaps_s)
    lines = [
        f"{result.kills} kills, {len(result.struck)} faults; {result.answered} whole answers, {result.tokens} tokens compared.",
        f"Not excused: {dict(Counter(mishap.kind for mishap in result.unexcused)) or 'none'}. Left behind: {'; '.join(result.left) or 'nothing'}.",
        f"Gaps between tokens before the first fault, s: {calm}.",
        "",
        STALL_HEADER,
        *(stall_line(name, when, of_one) for (name, when), of_one in grouped(result.struck).items()),
    ]
    return "\n".join(lines)


def grouped(struck: Iterable[Struck]) -> dict[tuple[str, str], list[Struck]]:
    """By what happened to whom, and whether anything else was going on."""
    groups: dict[tuple[str, str], list[Struck]] = {}
    for one in sorted(struck, key=lambda one: (one.fault.how, one.fault.victim, one.fault.moment not in CALM)):
        when = "serving" if one.fault.moment in CALM else "during a change"
        groups.setdefault((f"{one.fault.how} {one.fault.victim}", when), []).append(one)
    return groups


def stall_line(name: str, when: str, struck: list[Struck]) -> str:
    def of(values: Callable[[Struck], Iterable[float]]) -> dict[str, float]:
        return spread(value for one in struck for value in values(one))

    noticed = of(lambda one: [one.detected_s] if one.detected_s is not None else [])
    slowest = of(lambda one: [max(one.stalls_s)] if one.stalls_s else [])
    every, whole = of(lambda one: one.stalls_s), of(lambda one: [one.whole_s])
    told = sum(mishap.kind == "retryable" for one in struck for mishap in one.mishaps)
    cells = [
        name,
        when,
        len(struck),
        *(noticed.get(p, "-") for p in ("p50", "p95")),
        *(slowest.get(p, "-") for p in ("p50", "p95", "max")),
        every.get("p50", "-"),
        whole.get("p50", "-"),
        told,
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def figures(result: Result) -> dict[str, Any]:
    """For the JSON line."""
    faults = [
        one.fault._asdict()
        | {
            "in_time": one.in_time,
            "detected_s": one.detected_s,
            "slowest_s": max(one.stalls_s, default=None),
            "whole_s": one.whole_s,
        }
        for one in result.struck
    ]
    return {
        "kills": result.kills,
        "good": result.good,
        "answered": result.answered,
        "tokens": result.tokens,
        "mishaps": dict(Counter(mishap.kind for mishap in result.mishaps)),
        "unexcused": [mishap._asdict() for mishap in result.unexcused[:20]],
        "left": result.left,
        "end": result.end,
        "calm_gaps_s": spread(result.calm_gaps_s),
        "faults": faults,
    }
