"""Drives a live cluster through loads of known shape, and looks at what it measures meanwhile."""

import random
import threading
from collections.abc import Callable
from typing import Any, Protocol

from actors.cluster import Cluster
from actors.commands.admin import ask_url
from afd_ray.measured import Measured
from afd_ray.request import SamplingParams
from afd_ray.simulation.serving.profiling import Facts, Look, Points, Trial, span_of, trials

STEPS = 48
"""Tokens of each request of a trial."""
LOOK_S = 0.1
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
    subject: Subject, about: dict[str, Any], on_progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Any]:
    """The profile of a cluster (`simulation.profile`), as JSON values; raises RuntimeError, one line, when nothing could be measured."""
    facts = Facts(**subject.measured()["facts"])
    if not facts.ffn:
        raise RuntimeError("a colocated cluster has no stages apart to measure")
    drawn, points, planned = random.Random(0), Points(facts), list(trials(facts, STEPS))
    for done, trial in enumerate(planned):
        on_progress(done, len(planned))
        points.add(span_of(trial, run_trial(subject, trial, facts, drawn)))
    on_progress(len(planned), len(planned))
    if not points:
        raise RuntimeError("nothing was measured: the cluster served other requests, or was resized, all the while")
    return points.dump(about | {"attention": facts.attention, "ffn": facts.ffn})


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
