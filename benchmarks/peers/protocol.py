"""What is said between a benchmark and an engine's process: JSON lines. Standard library alone, which every environment has."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Job:
    """Continue all prompts at once, greedily, by exactly `max_tokens` tokens each."""

    prompts: list[list[int]]
    """Token ids."""
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Answer:
    times_s: list[list[float]]
    """When each token of each prompt had arrived, seconds since the job began."""


class EngineError(RuntimeError):
    """The engine cannot run, or has ended; the message is one line."""


def encode(value: Job | Answer) -> str:
    return json.dumps(asdict(value)) + "\n"


def decode(line: str) -> dict[str, Any]:
    """Raises EngineError for the end of the stream, or with what the engine said in place of an answer."""
    if not line:
        raise EngineError("the engine has ended, see its output")
    said: dict[str, Any] = json.loads(line)
    if "refused" in said:
        raise EngineError(said["refused"])
    return said


class Pipe:
    """The engine's side: jobs from standard input, answers to what was standard output. What the engine prints goes to stderr."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def serve(self, generate: Callable[[Job], Answer]) -> None:
        """Say that the engine is ready, then answer jobs until the input ends."""
        self._say('{"ready": true}\n')
        for line in sys.stdin:
            self._say(encode(generate(Job(**json.loads(line)))))

    def refuse(self, reason: str) -> None:
        """The engine cannot run here; `reason` is one line."""
        self._say(json.dumps({"refused": reason}) + "\n")

    def _say(self, line: str) -> None:
        self._answers.write(line)
        self._answers.flush()
