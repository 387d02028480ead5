"""Controller: a Ray actor that brings the cluster up, knows its state, and is asked by ingress and command line."""

import asyncio
import logging
import secrets
import time
from collections.abc import Sequence
from typing import Any

import ray

from actors.bringup import Bringup, Shape
from actors.roster import Hand, ask, trace_all
from actors.status import cluster_status
from afd_ray.config import Config, model_directory
from afd_ray.models.checkpoint import Checkpoint
from afd_ray.telemetry import chrome_trace, on_one_clock, overlap

logger = logging.getLogger(__name__)

NAME = "afd-controller"
NAMESPACE = "afd"
TRACE_TIMEOUT_S = 20.0


class Controller:
    """The cluster's one owner of actors and placement groups. The data plane goes on without it."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._secret = secrets.token_bytes(32)
        self._checkpoint = Checkpoint.open(model_directory(config.model))
        self._bringup = Bringup(config, self._checkpoint, self._secret)
        self._state = "starting"
        self._changed = asyncio.Condition()
        self._watches: list[asyncio.Task[None]] = []
        self._metrics: dict[str, Any] = {}

    @ray.method
    async def start(self) -> None:
        """Reserve, start, load, connect, warm up; at once when that is done. Raises in one line, with nothing left behind."""
        if self._bringup.epoch is None:
            await self._form(Shape.of(self._config))

    @ray.method
    async def progress(self) -> str:
        """What the bring-up is doing now, in a few words."""
        return await self._bringup.progress()

    @ray.method
    async def reshape(self, attention: int, tensor_parallel: int, expert_parallel: int, micro_batches: int | None = None) -> None:
        """Form a new epoch of another shape once nothing is in progress; actors are reused, started and stopped as needed."""
        if self._config.ffn.colocated:
            if tensor_parallel * expert_parallel != 1:
                raise ValueError(f"a colocated cluster has no FFN ranks to cut, got {tensor_parallel} x {expert_parallel}")
            expert_parallel = 0
        await self._wait_idle()
        await self._form(Shape(attention, tensor_parallel, expert_parallel, micro_batches))

    @ray.method
    async def rebalance(self) -> dict[str, Any]:
        """Form a new epoch of the same shape once nothing is in progress, its experts placed by how often each was chosen in this one."""
        await self._wait_idle()
        loads, shape = await self._expert_loads(), self._bringup.shape
        if shape is None or not any(loads):
            raise ValueError("no expert was chosen in this epoch yet, so there is nothing to place them by: send requests first")
        await self._form(shape, loads)
        epoch = self._bringup.epoch
        return {"epoch": self._bringup.epoch_number, "experts": epoch.experts if epoch else ()}

    @ray.method
    async def ingress_view(self) -> dict[str, Any]:
        """What an ingress replica needs: the model, the secret, and where the attention actors listen."""
        model = self._checkpoint.config
        limit = self._config.model.max_context or model.max_position_embedding
        return {
            "state": self._state,
            "epoch": self._bringup.epoch_number,
            "secret": self._secret,
            "model": {
                "name": self._config.model.served_name,
                "directory": str(self._checkpoint.directory),
                "max_context": min(limit, model.max_position_embedding),
                "vocab_size": model.vocab_size,
            },
            "attention": [
                {"id": hand.name, "address": hand.identity["address"]}
                for hand in self._bringup.attention
                if hand.state == "running"
            ],
        }

    @ray.method
    async def changed(self, epoch: int, state: str) -> tuple[int, str]:
        """Return (epoch, state) as soon as they differ from these."""
        async with self._changed:
            await self._changed.wait_for(lambda: (self._bringup.epoch_number, self._state) != (epoch, state))
        return self._bringup.epoch_number, self._state

    @ray.method
    async def status(self) -> dict[str, Any]:
        """The whole cluster, as `afd-ray status --json` prints it."""
        return await cluster_status(self._config, self._state, self._bringup)

    @ray.method
    async def scale(self, attention: int | None = None, ffn: int | None = None) -> dict[str, Any]:
        """Not built yet: raises ValueError."""
        raise ValueError("scaling a running cluster is not supported yet: set attention.replicas and ffn.* and start again")

    @ray.method
    async def trace(self, steps: int) -> dict[str, Any]:
        """The next `steps` steps of every actor as Chrome trace JSON, with the overlap figure in `otherData`."""
        dead = [hand.name for hand in self._bringup.hands if hand.state != "running"]
        if dead or not self._bringup.hands:
            raise ValueError(
                f"a trace needs every actor at work, but the cluster is {self._state}: {', '.join(dead) or 'no actor'}"
            )
        hands = self._bringup.hands
        actors = await trace_all(hands, steps, TRACE_TIMEOUT_S)
        found = overlap(on_one_clock(actor) for actor in actors)
        return chrome_trace(actors) | {
            "otherData": {
                "epoch": self._bringup.epoch_number,
                "overlap": found.figure if found else None,
                "busy": dict(zip((hand.name for hand in hands), found.busy, strict=True)) if found else None,
            }
        }

    @ray.method
    async def attention_handles(self) -> list[Any]:
        """The attention actors, for benchmarks that drive the engine directly."""
        return [hand.handle for hand in self._bringup.attention]

    @ray.method
    async def count_ray_calls(self, steps: int) -> dict[str, dict[str, int]]:
        """Function calls by each actor's step loop over the next `steps` steps: all of them, and those into Ray."""
        hands = self._bringup.hands
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
        answers = await ask(self._bringup.attention, "check_integrity", timeout_s=30)
        return [f"{hand.name}: {line}" for hand, lines in zip(self._bringup.attention, answers, strict=True) for line in lines]

    @ray.method
    async def resident_bytes(self) -> dict[str, dict[str, int]]:
        """Memory by actor."""
        answers = await ask(self._bringup.hands, "resident_bytes", timeout_s=30)
        return {hand.name: answer for hand, answer in zip(self._bringup.hands, answers, strict=True)}

    @ray.method
    async def shutdown(self) -> None:
        """Stop every actor and give all placement groups back."""
        await self._set_state("stopping")
        self._unwatch()
        await self._bringup.dissolve()

    async def _form(self, shape: Shape, loads: Sequence[int] = ()) -> None:
        self._unwatch()
        await self._set_state("starting")
        try:
            await self._bringup.form(shape, loads)
        except BaseException:
            await self._bringup.dissolve()
            raise
        number = self._bringup.epoch_number
        self._watches = [asyncio.create_task(self._watch(hand, number)) for hand in self._bringup.hands]
        await self._set_state("ready")

    async def _watch(self, hand: Hand, number: int) -> None:
        """Wait for this actor's end: Ray tells of a dead process, the actor itself of a failed step loop."""
        try:
            reason = await hand.handle.lost.remote(number)
        except ray.exceptions.RayError as error:
            reason = str(error).splitlines()[0]
        logger.error("%s is lost: %s", hand.name, reason)
        hand.fail(reason)
        await self._set_state("degraded")

    def _unwatch(self) -> None:
        for task in self._watches:
            task.cancel()
        self._watches = []

    async def _set_state(self, state: str) -> None:
        async with self._changed:
            self._state = state
            self._changed.notify_all()

    async def _expert_loads(self) -> list[int]:
        """How often each expert was chosen in this epoch, by all attention ranks."""
        answers = await ask(self._bringup.attention, "status", timeout_s=30)
        return [sum(counts) for counts in zip(*(answer["expert_loads"] for answer in answers), strict=True)]

    async def _wait_idle(self, timeout_s: float = 60.0) -> None:
        deadline_s = time.monotonic() + timeout_s
        while True:
            answers = await ask(self._bringup.attention, "status", timeout_s=30)
            if not any(answer["running"] + answer["waiting"] for answer in answers):
                return
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"requests are still in progress after {timeout_s:g} s")
            await asyncio.sleep(0.02)
