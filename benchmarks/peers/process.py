"""An engine's process, seen from a benchmark."""

import os
import subprocess
from typing import NamedTuple

from benchmarks.peers.environments import ROOT
from benchmarks.peers.protocol import Answer, Job, decode, encode

STOP_TIMEOUT_S = 60.0


class Launch(NamedTuple):
    """How an engine is started."""

    command: list[str]
    environment: dict[str, str]
    """In addition to the benchmark's own."""


class Engine:
    """A started engine: a job in, an answer out, one at a time."""

    def __init__(self, launch: Launch) -> None:
        self._process = subprocess.Popen(
            launch.command,
            cwd=ROOT,
            env={**os.environ, **launch.environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._jobs, self._answers = self._process.stdin, self._process.stdout

    def await_ready(self) -> None:
        """Raises EngineError (one line) when the engine refuses or ends."""
        decode(self._answers.readline())

    def generate(self, job: Job) -> Answer:
        """Raises EngineError (one line) when the engine ends."""
        self._jobs.write(encode(job))
        self._jobs.flush()
        return Answer(**decode(self._answers.readline()))

    def close(self) -> None:
        """The end of its input ends it."""
        self._jobs.close()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._answers.close()
