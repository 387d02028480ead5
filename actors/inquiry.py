"""What the controller is asked about its actors: traces, calls, integrity, memory, and the metrics of ingress replicas."""

from typing import Any

import ray

from actors.roster import ask, trace_all
from actors.transition import Transition
from afd_ray.telemetry import chrome_trace, on_one_clock, overlap

TRACE_TIMEOUT_S = 20.0
ANSWER_TIMEOUT_S = 30.0


class Inquiry:
    """Nothing here changes the cluster."""

    def __init__(self, transition: Transition) -> None:
        self._transition = transition
        self._metrics: dict[str, Any] = {}

    @property
    def _epoch_number(self) -> int:
        roster = self._transition.roster
        return roster.number if roster else 0

    @ray.method
    async def trace(self, steps: int) -> dict[str, Any]:
        """The next `steps` steps of every actor as Chrome trace JSON, with the overlap figure in `otherData`."""
        coordinator, hands = self._transition.coordinator, self._transition.hands
        if coordinator.broken or not hands:
            raise ValueError(
                f"a trace needs every actor at work, but the cluster is {coordinator.state}: {coordinator.broken or 'no actor'}"
            )
        actors = await trace_all(hands, steps, TRACE_TIMEOUT_S)
        found = overlap(on_one_clock(actor) for actor in actors)
        return chrome_trace(actors) | {
            "otherData": {
                "epoch": self._epoch_number,
                "overlap": found.figure if found else None,
                "busy": dict(zip((hand.name for hand in hands), found.busy, strict=True)) if found else None,
            }
        }

    @ray.method
    async def attention_handles(self) -> list[Any]:
        """The attention actors, for benchmarks that drive the engine directly."""
        return [hand.handle for hand in self._transition.hands if hand.role == "attention"]

    @ray.method
    async def count_ray_calls(self, steps: int) -> dict[str, dict[str, int]]:
        """Function calls by each actor's step loop over the next `steps` steps: all of them, and those into Ray."""
        hands = self._transition.hands
        counts = await ask(hands, "count_ray_calls", steps, TRACE_TIMEOUT_S, timeout_s=TRACE_TIMEOUT_S + 10)
        return {hand.name: count for hand, count in zip(hands, counts, strict=True)}

    @ray.method
    async def exchange_metrics(self, replica: str, snapshot: Any) -> dict[str, Any]:
        """Keep an ingress replica's metrics, and give those of the others: a scrape of one replica speaks for all."""
        self._metrics[replica] = snapshot
        return {other: kept for other, kept in self._metrics.items() if other != replica}

    @ray.method
    async def check_integrity(self) -> list[str]:
        """What is wrong with any attention actor's KV blocks or streams, a line each."""
        hands = [hand for hand in self._transition.hands if hand.role == "attention"]
        answers = await ask(hands, "check_integrity", timeout_s=ANSWER_TIMEOUT_S)
        return [f"{hand.name}: {line}" for hand, lines in zip(hands, answers, strict=True) for line in lines]

    @ray.method
    async def resident_bytes(self) -> dict[str, dict[str, int]]:
        """Memory by actor."""
        hands = self._transition.hands
        answers = await ask(hands, "resident_bytes", timeout_s=ANSWER_TIMEOUT_S)
        return {hand.name: answer for hand, answer in zip(hands, answers, strict=True)}
