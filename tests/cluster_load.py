"""Clients of a live cluster that ask again and again, and compare every answer with the undisturbed one."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from actors.cluster import Cluster, ClusterError
from afd_ray.request import SamplingParams


class Answers(NamedTuple):
    """What is asked, and what must come of it."""

    prompts: Sequence[list[int]]
    params: Sequence[SamplingParams]
    tokens: Sequence[list[int]]


class Load:
    """All of them at once, round after round."""

    def __init__(self, cluster: Cluster, answers: Answers) -> None:
        self.wrong: list[str] = []
        self.rounds = 0
        self._cluster, self._answers = cluster, answers
        self._over = threading.Event()
        self._round_over = threading.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def await_rounds(self, more: int) -> None:
        """Until so many rounds have begun and ended from now on."""
        with self._round_over:
            enough = self.rounds + more + 1
            assert self._round_over.wait_for(lambda: self.rounds >= enough or bool(self.wrong), 120)

    def _run(self) -> None:
        prompts, params, expected = self._answers
        while not self._over.is_set():
            try:
                answers = self._cluster.generate(prompts, params, timeout_s=120)
                differ = [i for i, answer in enumerate(answers) if list(answer.token_ids) != expected[i]]
                self.wrong += [f"round {self.rounds}: request {i} has other tokens" for i in differ]
            except (ClusterError, TimeoutError) as error:
                self.wrong.append(f"round {self.rounds}: {error}")
            with self._round_over:
                self.rounds += 1
                self._round_over.notify_all()


@contextmanager
def load(cluster: Cluster, answers: Answers) -> Iterator[Load]:
    """Going on while the block runs; at its end every answer was right, and nothing is left of the requests."""
    running = Load(cluster, answers)
    try:
        yield running
        running.await_rounds(1)
    finally:
        running.stop()
    assert running.wrong == []
    assert cluster.check_integrity() == []
