"""Drives a live cluster through loads of known shape, and looks at what it measures meanwhile."""

import random
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from actors.cluster import Cluster
from actors.commands.admin import ask_url
from afd_ray.measured import Measured
from afd_ray.request import SamplingParams
from afd_ray.simulation.serving.profiling import Facts, Look, Points, Trial, span_of, trials

STEPS = (48, 256)
"""Tokens of each request of a trial, at least and at most."""
TRIAL_S = 1.2
"""So long a trial should last at least, that it is looked at several times."""
ROUNDS = 3
"""How often each trial is run: some are disturbed."""
LOOK_S = 0.3
"""From one look to the next. Each takes some milliseconds in every process of the cluster, which is a part of what is measured where cores are few."""
TRIAL_TIMEOUT_S = 300.0
Prompts = list[list[int]]


class Subject(Protocol):
    """A cluster that is measured."""

    def measured(self) -> dict[str, Any]:
        """As `survey.measured` gives it."""
        ...

    def generate(self, prompts: Prompts, max_tokens: int) -> None:
        """All of them at once, each for exactly `max_tokens`; returns when they are over."""
        ...


class Started:
    """A cluster of this process."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def measured(self) -> dict[str, Any]:
        return self._cluster.measured()

    def generate(self, prompts: Prompts, max_tokens: int) -> None:
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        self._cluster.generate(prompts, params, timeout_s=TRIAL_TIMEOUT_S)


class Served:
    """A running server. Nobody else should ask it for anything meanwhile."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self._url, self._key = url, api_key

    def measured(self) -> dict[str, Any]:
        return ask_url(self._url, "/admin/measured", None, self._key, 10.0)

    def generate(self, prompts: Prompts, max_tokens: int) -> None:
        body = {"prompt": prompts, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        ask_url(self._url, "/v1/completions", body, self._key, TRIAL_TIMEOUT_S)


def profile(
    subject: Subject,
    about: dict[str, Any],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    rounds: int = ROUNDS,
) -> dict[str, Any]:
    """The profile of a cluster (`simulation.profile`), as JSON values, every trial run in each of `rounds`; raises RuntimeError, one line, when nothing could be measured."""
    facts = Facts(**subject.measured()["facts"])
    if not facts.ffn:
        raise RuntimeError("a colocated cluster has no stages apart to measure")
    drawn, points = random.Random(0), Points(facts)
    planned = list(trials(facts, _steps(subject, facts, drawn))) * rounds
    for done, trial in enumerate(planned):
        on_progress(done, len(planned))
        points.add(trial, span_of(trial, run_trial(subject, trial, facts, drawn)))
    on_progress(len(planned), len(planned))
    if not points:
        raise RuntimeError("nothing was measured: the cluster served other requests, or was resized, all the while")
    return points.dump(about | {"attention": facts.attention, "ffn": facts.ffn})


def _steps(subject: Subject, facts: Facts, drawn: random.Random) -> int:
    """How many tokens make a trial long enough."""
    least, most = (min(steps, facts.context_limit // 2) for steps in STEPS)
    pilot = next(trials(facts, least), None)
    if pilot is None:
        return least
    began_s = time.perf_counter()
    run_trial(subject, pilot, facts, drawn)
    return max(least, min(most, round(TRIAL_S * least / (time.perf_counter() - began_s))))


def run_trial(subject: Subject, trial: Trial, facts: Facts, drawn: random.Random) -> list[Look]:
    """Looks before, while and after the requests of a trial are served; raises what `generate` raises."""
    prompts = [[drawn.randrange(facts.vocab_size) for _ in range(trial.prompt)] for _ in range(trial.requests)]
    looks, over, failed = [_look(subject)], threading.Event(), list[Exception]()

    def serve() -> None:
        try:
            subject.generate(prompts, trial.output)
        except Exception as error:
            failed.append(error)
        finally:
            over.set()

    threading.Thread(target=serve, name="trial", daemon=True).start()
    while not over.wait(LOOK_S):
        looks.append(_look(subject))
    if failed:
        raise failed[0]
    return [*looks, _look(subject)]


def _look(subject: Subject) -> Look:
    answer = subject.measured()
    return Look(answer["epoch"], {name: Measured.load(dumped) for name, dumped in answer["attention"].items()})
