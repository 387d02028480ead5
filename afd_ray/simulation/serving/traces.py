"""Requests to come: drawn from a seed, a few seconds at a time, so that a day of them takes no memory."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

BIN_S = 10.0
DAY_S = 86_400.0


class Arrival(NamedTuple):
    """One request: when it comes, the tokens of its prompt, and those of its answer."""

    at_s: float
    prompt: int
    output: int


class Synthetic(NamedTuple):
    """What a drawn trace is made of. Lengths are log-normal."""

    rate: float = 1.0
    """Requests a second, in the mean."""
    duration_s: float = 3600.0
    prompt: float = 512.0
    """Tokens, mean."""
    output: float = 128.0
    spread: float = 0.5
    """Standard deviation of both lengths, in means."""
    swing: float = 0.0
    """Of the rate over a day: 0.5 is from half to one and a half times the mean; least at the start."""
    burst: float = 1.0
    """How many times the rate a burst has."""
    burst_s: float = 120.0
    """How long a burst lasts, in the mean."""
    calm_s: float = 1200.0
    """From one burst to the next, in the mean."""
    drift: float = 1.0
    """How many times as long prompts are in the end as at the start."""
    output_drift: float = 1.0
    """So for answers: with them grows the context that each of their tokens is computed over."""
    longest: float = 32_768
    """Tokens of a prompt, and of an answer."""


KINDS: Mapping[str, Mapping[str, float]] = {
    "poisson": {},
    "bursty": {"burst": 4.0},
    "diurnal": {"duration_s": DAY_S, "swing": 0.7},
    "drift": {"drift": 4.0},
    "day": {"duration_s": DAY_S, "swing": 0.7, "burst": 2.5, "drift": 2.0},
}
"""The named kinds: what differs from `Synthetic`'s defaults."""


LEAST: Mapping[str, float] = {"prompt": 1, "output": 1, "spread": 0, "swing": 0, "longest": 1}
"""The others are more than 0."""
MOST: Mapping[str, float] = {"rate": 1e6, "swing": 1}
UNBOUNDED = 1e12


def parse_synthetic(text: str) -> Synthetic:
    """From `kind` or `kind:key=value,key=value`; raises ValueError in one line."""
    kind, _, settings = text.partition(":")
    if kind not in KINDS:
        raise ValueError(f"trace: {kind} is no file and no kind of trace, kinds are {', '.join(KINDS)}")
    values: dict[str, float] = dict(KINDS[kind])
    given: set[str] = set()
    for setting in filter(None, settings.split(",")):
        key, _, value = setting.partition("=")
        if key not in Synthetic._fields:
            raise ValueError(f"trace: {key} is not known, {kind} takes {', '.join(Synthetic._fields)}")
        if key in given:
            raise ValueError(f"trace: {key} is given twice, in {text}")
        given.add(key)
        values[key] = _bounded(key, value)
    return Synthetic(**values)


def _bounded(key: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"trace: {key} must be a number, got {text!r}") from None
    least, most = LEAST.get(key), MOST.get(key, UNBOUNDED)
    if not (value > 0 if least is None else value >= least) or not value <= most:
        bounds = "more than 0" if least is None else f"at least {least:g}"
        raise ValueError(f"trace: {key} must be {bounds} and at most {most:g}, got {text}")
    return value


def draw(trace: Synthetic, seed: int) -> Iterator[Arrival]:
    """The arrivals in order of time; the same for the same seed."""
    random = np.random.default_rng(seed)
    factor = _bursts(trace, random)
    calm_share = 1 + (trace.burst - 1) * trace.burst_s / (trace.burst_s + trace.calm_s)
    for start_s in np.arange(0.0, trace.duration_s, BIN_S):
        width_s = min(BIN_S, trace.duration_s - start_s)
        daily = 1 - trace.swing * math.cos(2 * math.pi * start_s / DAY_S)
        rate = trace.rate * daily * factor(start_s) / calm_share
        count = int(random.poisson(rate * width_s))
        times = np.sort(random.uniform(start_s, start_s + width_s, count))
        done = start_s / trace.duration_s
        prompts = _lengths(trace.prompt * _drifted(trace.drift, done), trace, count, random)
        outputs = _lengths(trace.output * _drifted(trace.output_drift, done), trace, count, random)
        yield from map(Arrival, times.tolist(), prompts.tolist(), outputs.tolist())


def _bursts(trace: Synthetic, random: np.random.Generator) -> Callable[[float], float]:
    """By how much the rate is multiplied, asked for times that only go up."""
    if trace.burst == 1:
        return lambda at_s: 1.0
    state = {"bursting": False, "until_s": float(random.exponential(trace.calm_s))}

    def factor(at_s: float) -> float:
        while at_s >= state["until_s"]:
            state["bursting"] = not state["bursting"]
            state["until_s"] += float(random.exponential(trace.burst_s if state["bursting"] else trace.calm_s))
        return trace.burst if state["bursting"] else 1.0

    return factor


def _drifted(times: float, done: float) -> float:
    """By what a length that becomes `times` as long is multiplied when a share `done` of the trace is over; its mean is unchanged."""
    return (1 + (times - 1) * done) / ((1 + times) / 2)


def _lengths(mean: float, trace: Synthetic, count: int, random: np.random.Generator) -> "np.ndarray":
    if trace.spread == 0:
        return np.full(count, min(max(1, round(mean)), int(trace.longest)))
    variance = math.log(1 + trace.spread**2)
    drawn = random.lognormal(math.log(mean) - variance / 2, math.sqrt(variance), count)
    return np.clip(np.rint(drawn), 1, trace.longest).astype(np.int64)
