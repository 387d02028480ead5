"""Which faults come, and when: a pure function of a seed."""

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

Victim = Literal["attention", "ffn", "controller", "ingress", "proxy", "serve_controller"]
"""Whose process: of the cluster's own actors, or of Ray Serve's (`ingress` is a replica)."""
How = Literal["kill", "pause"]
"""SIGKILL; or SIGSTOP and, later, SIGCONT."""
Moment = Literal["serving", "prefill", "provide", "load", "prepare", "connect", "drain", "switch", "retire", "recovery"]
"""`serving`: any time, so mostly in the middle of a layer. `prefill`: as long prompts arrive. `recovery`: while another loss is repaired.
The others: in that phase of a resize."""

WEIGHTS: Mapping[Victim, float] = {
    "attention": 0.35,
    "ffn": 0.35,
    "controller": 0.12,
    "ingress": 0.10,
    "proxy": 0.05,
    "serve_controller": 0.03,
}
CALM: tuple[Moment, ...] = ("serving", "serving", "serving", "prefill")
CHANGING: tuple[Moment, ...] = ("provide", "load", "prepare", "connect", "drain", "switch", "retire", "recovery")
CALM_SHARE = 0.5
LONGEST_PAUSE_S = 4.0
LONGEST_REST_S = 1.0


class Shape(NamedTuple):
    """What a resize asks for."""

    attention: int
    ffn: int
    tensor_parallel: int


SHAPES = (Shape(1, 2, 1), Shape(3, 2, 1), Shape(2, 1, 1), Shape(2, 2, 2), Shape(2, 3, 1))


class Fault(NamedTuple):
    victim: Victim
    how: How
    moment: Moment
    rest_s: float
    """From the time when all is well, or the phase has begun, to the fault."""
    pick: float
    """0 to 1: which of several processes."""
    pause_s: float
    """For a pause: how long."""
    shape: Shape
    """Where to, of a resize that is in progress."""


def faults(
    seed: int, kills: int, pauses: int = 0, victims: Sequence[Victim] = tuple(WEIGHTS), calm_share: float = CALM_SHARE
) -> Iterator[Fault]:
    """So many of each way, in random order; every victim once before any comes by its weight, so that a short run sees most of them.

    `calm_share`: of all faults, those that come while nothing else is going on.
    """
    rng = random.Random(f"chaos {seed}")
    ways: list[How] = ["kill"] * kills + ["pause"] * pauses
    rng.shuffle(ways)
    victims, moments = _dealt(rng, len(ways), victims), _moments(rng, len(ways), calm_share)
    for how, victim, moment in zip(ways, victims, moments, strict=True):
        quick = moment not in ("serving", "prefill")
        rest_s = rng.uniform(0.0, 0.02 if quick else LONGEST_REST_S)
        yield Fault(victim, how, moment, rest_s, rng.random(), rng.uniform(0.2, LONGEST_PAUSE_S), rng.choice(SHAPES))


def _dealt(rng: random.Random, count: int, victims: Sequence[Victim]) -> list[Victim]:
    first = list(victims)
    rng.shuffle(first)
    drawn = rng.choices(victims, [WEIGHTS[victim] for victim in victims], k=max(0, count - len(first)))
    return [*first, *drawn][:count]


def _moments(rng: random.Random, count: int, calm_share: float) -> list[Moment]:
    return [rng.choice(CALM if rng.random() < calm_share else CHANGING) for _ in range(count)]
