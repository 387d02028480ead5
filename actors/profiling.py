"""Drives a live cluster through loads of known shape, and looks at what it measures meanwhile."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from itertools import chain
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


class Profiler:
    """Measures one cluster, whose numbers of actors stay."""

    def __init__(self, subject: Subject) -> None:
        """Raises RuntimeError, one line, when it has no stages to measure."""
        self._subject, self._drawn = subject, random.Random(0)
        began = subject.measured()
        self._facts = facts = Facts(**began["facts"])
        self._epoch = began["epoch"]
        if not facts.ffn:
            raise RuntimeError("a colocated cluster has no stages apart to measure")
        self._points = Points(facts)
        self.trials = list(trials(facts, self._steps()))
        """Of a round."""

    def round(self) -> Iterator[None]:
        """Every trial once; something is yielded before each. Raises RuntimeError, one line, when the cluster is resized or repaired."""
        for trial in self.trials:
            yield
            looks = run_trial(self._subject, trial, self._facts, self._drawn)
            if any(look.epoch != self._epoch for look in looks):
                raise RuntimeError(
                    "the cluster was resized meanwhile: a profile is of one shape (autoscaling.policy fixed keeps it)"
                )
            self._points.add(trial, span_of(trial, looks))

    def dump(self, about: dict[str, Any]) -> dict[str, Any]:
        """The profile (`simulation.profile`) by all rounds so far, as JSON values; raises RuntimeError, one line, when nothing could be measured."""
        if not self._points:
            raise RuntimeError("nothing was measured: the cluster served other requests all the while")
        return self._points.dump(about | {"attention": self._facts.attention, "ffn": self._facts.ffn})

    def _steps(self) -> int:
        """How many tokens make a trial long enough."""
        facts = self._facts
        least, most = (min(steps, facts.context_limit // 2) for steps in STEPS)
        pilot = next(trials(facts, least), None)
        if pilot is None:
            return least
        began_s = time.perf_counter()
        run_trial(self._subject, pilot, facts, self._drawn)
        return max(least, min(most, round(TRIAL_S * least / (time.perf_counter() - began_s))))


def profile(
    subject: Subject,
    about: dict[str, Any],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    rounds: int = ROUNDS,
) -> dict[str, Any]:
    """The profile of a cluster, every trial run in each of `rounds`; raises as `Profiler` does."""
    profiler = Profiler(subject)
    total = len(profiler.trials) * rounds
    for done, _ in enumerate(chain.from_iterable(profiler.round() for _ in range(rounds))):
        on_progress(done, total)
    on_progress(total, total)
    return profiler.dump(about)


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
