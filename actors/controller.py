"""Controller: a Ray actor that brings the cluster up, changes its shape, repairs it, and is asked by ingress and command line."""

import asyncio
import logging
import secrets
import time
from typing import Any

import ray

from actors import ledger
from actors.aside import persist
from actors.autoscaler import Autoscaler
from actors.crew import Crew
from actors.heap import freeze_heap
from actors.inquiry import ANSWER_TIMEOUT_S, Inquiry
from actors.roster import ask
from actors.status import cluster_metrics, cluster_status
from actors.survey import measured
from actors.transition import Transition
from afd_ray.config import Config, model_directory
from afd_ray.membership.events import Adopted, Lost, Record, Stopping
from afd_ray.membership.shape import Shape
from afd_ray.membership.steps import NAMES
from afd_ray.metrics import Sample
from afd_ray.models.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

NAME = "afd-controller"
NAMESPACE = "afd"
STOP_TIMEOUT_S = 10.0
ADOPT_PAUSE_S = 0.2
CALLED_OFF = "called off by an operator"


class Controller(Inquiry):
    """The cluster's one owner of actors and placement groups. The data plane goes on without it; Ray restarts it, and it takes over again."""

    def __init__(self, config: Config, name: str = NAME) -> None:
        self._config, self._name = config, name
        self._checkpoint = Checkpoint.open(model_directory(config.model))
        self._left = _left(config, name)
        secret = self._left.secret if self._left else secrets.token_bytes(32)
        uid = self._left.uid if self._left else secrets.token_hex(4)
        self._crew = Crew(config, secret, uid, NAMESPACE, name)
        model = self._checkpoint.config
        super().__init__(Transition(config, model, self._crew, self._store))
        self._autoscaler = Autoscaler(config, model.num_hidden_layers, self._transition, ledger.Shelf(name))
        if self._left is not None:
            persist(self._call_adopt, ADOPT_PAUSE_S)
        freeze_heap()

    def _call_adopt(self) -> None:
        """On the event loop, which only calls get to. Ray may fail one that comes while this actor is still called restarting."""
        this: Any = ray.get_actor(self._name, namespace=NAMESPACE)
        ray.get(this.adopt.remote())

    @ray.method
    async def adopt(self) -> None:
        """Take over what the controller before this one left; harmless when there is nothing, or when it is done."""
        await self._adopt()

    async def _adopt(self) -> None:
        left = self._left
        if left is None:
            return
        logger.warning("the controller was restarted, and takes the cluster over")
        missing = self._crew.adopt(left.actors)
        self._transition.epochs.loads, self._transition.epochs.decided = left.loads, left.epochs
        self._left = None
        self._transition.tell(Adopted(left.record))
        for member in missing:
            self._transition.tell(Lost(member, "it ended while there was no controller"))
        self._autoscaler.begin()

    @ray.method
    async def start(self) -> None:
        """Reserve, start, load, connect, warm up; at once when that is done. Raises in one line, with nothing left behind."""
        await self._adopt()
        if self._transition.roster is not None:
            return
        answer = await self._transition.ask(Shape.of(self._config))
        if answer["outcome"] != "committed":
            await self._stop()
            raise RuntimeError(answer["reason"])
        self._transition.last_resize = None
        self._autoscaler.begin()

    @ray.method
    async def configuration(self) -> Config:
        """What the cluster was started with."""
        return self._config

    @ray.method
    async def progress(self) -> str:
        """What the bring-up is doing now, in a few words."""
        change = self._transition.coordinator.change
        if change is None:
            return "ready" if self._transition.roster else ""
        doing = NAMES[change.phase]
        if self._transition.waiting_for is not None:
            return f"waiting for {self._transition.waiting_for}"
        if change.phase != "load":
            return doing
        try:
            hands = [self._crew[member] for member in change.roster.members]
            shares = await ask(hands, "loaded", timeout_s=0.5)
        except (KeyError, RuntimeError, TimeoutError):
            return doing
        return f"{doing}: {int(10 * sum(shares) / len(shares)) * 10}%"

    @ray.method
    async def scale(
        self,
        attention: int | None = None,
        ffn: int | None = None,
        ffn_tensor_parallel: int | None = None,
        timeout_s: float | None = None,
        cancel: bool = False,
    ) -> dict[str, Any]:
        """Resize while serving; returns when that is over, what `last_resize` in the status says. None: as it is.

        `ffn` counts ranks. `cancel`: roll back the resize that is in progress instead, whoever asked for it.
        Raises ValueError for a shape that cannot be, RuntimeError when a resize is in progress already, or none that could be rolled back.
        """
        if cancel:
            answer = await self._transition.call_off(CALLED_OFF)
            if answer["outcome"] == "committed":
                raise RuntimeError("the resize could not be called off any more: it has committed")
            return answer
        shape = self._wanted().scaled(attention, ffn, ffn_tensor_parallel)
        return await self._autoscaler.by_hand(shape, lambda: self._resize(shape, timeout_s=timeout_s))

    @ray.method
    async def reshape(self, attention: int, tensor_parallel: int, expert_parallel: int, micro_batches: int | None = None) -> None:
        """Form a new epoch of another shape while serving. Raises RuntimeError when it was rolled back."""
        if self._config.ffn.colocated:
            if tensor_parallel * expert_parallel != 1:
                raise ValueError(f"a colocated cluster has no FFN ranks to cut, got {tensor_parallel} x {expert_parallel}")
            expert_parallel = 0
        shape = Shape(attention, tensor_parallel, expert_parallel, micro_batches)
        _require_committed(await self._autoscaler.by_hand(shape, lambda: self._resize(shape)))

    @ray.method
    async def rebalance(self) -> dict[str, Any]:
        """Form a new epoch of the same shape while serving, its experts placed by how often each was chosen in this one."""
        loads = await self._expert_loads()
        if not any(loads):
            raise ValueError("no expert was chosen in this epoch yet, so there is nothing to place them by: send requests first")
        epochs = self._transition.epochs
        before, epochs.loads = epochs.loads, loads
        try:
            _require_committed(await self._resize(self._wanted(), anew=True))
        except RuntimeError:
            epochs.loads = before
            raise
        roster = self._transition.roster
        assert roster is not None
        return {"epoch": roster.number, "experts": self._transition.epoch(roster).experts}

    @ray.method
    async def ingress_view(self) -> dict[str, Any]:
        """What an ingress replica needs: the model, the secret, and where the attention actors that take requests listen."""
        model = self._checkpoint.config
        coordinator = self._transition.coordinator
        return {
            "state": coordinator.state,
            "epoch": self._epoch_number,
            "version": self._transition.views,
            "secret": self._crew.secret,
            "lost": self._transition.lost,
            "model": {
                "name": self._config.model.served_name,
                "directory": str(self._checkpoint.directory),
                "max_context": self._config.context_limit(model.max_position_embedding),
                "vocab_size": model.vocab_size,
            },
            "attention": [
                {"id": member, "address": self._crew[member].identity["address"]}
                for member in coordinator.takers
                if member in self._crew
            ],
        }

    @ray.method
    async def changed(self, epoch: int, state: str, version: int | None = None) -> tuple[int, str]:
        """Return (epoch, state) as soon as they, or who takes requests (`version` of the view), differ from these."""
        transition = self._transition

        def differs() -> bool:
            now = (self._epoch_number, transition.coordinator.state)
            return now != (epoch, state) or (version is not None and version != transition.views)

        async with transition.changed:
            await transition.changed.wait_for(differs)
        return self._epoch_number, transition.coordinator.state

    @ray.method
    async def status(self) -> dict[str, Any]:
        """The whole cluster, as `afd-ray status --json` prints it."""
        return await cluster_status(self._config, self._transition) | {"autoscaling": self._autoscaler.describe()}

    @ray.method
    async def metrics(self) -> list[Sample]:
        """What `/metrics` tells of the cluster and its actors."""
        return await cluster_metrics(self._config, self._transition)

    @ray.method
    async def measured(self) -> dict[str, Any]:
        """What the attention actors have measured since their start, and the bounds of the load that the cluster takes."""
        return await measured(self._config, self._checkpoint.config, self._transition)

    @ray.method
    async def decisions(self, after: int = 0) -> dict[str, Any]:
        """What the policy decided and operators asked for, and how that ended: those that are kept with a number above `after`, oldest first."""
        return {"policy": self._config.autoscaling.policy, "decisions": self._autoscaler.decisions(after)}

    @ray.method
    async def shutdown(self) -> None:
        """Stop every actor and give all placement groups back."""
        await self._stop()

    def _wanted(self) -> Shape:
        wanted = self._transition.coordinator.wanted
        if wanted is None:
            raise ValueError("the cluster is starting: nothing to resize yet")
        return wanted

    async def _resize(self, shape: Shape, *, anew: bool = False, timeout_s: float | None = None) -> dict[str, Any]:
        """Raises RuntimeError when it is refused."""
        answer = await self._transition.ask(shape, anew=anew, timeout_s=timeout_s)
        if answer["outcome"] == "refused":
            raise RuntimeError(answer["reason"])
        return answer

    async def _expert_loads(self) -> list[int]:
        """How often each expert was chosen in this epoch, by all attention ranks."""
        hands = [hand for hand in self._transition.hands if hand.role == "attention"]
        answers = await ask(hands, "status", timeout_s=ANSWER_TIMEOUT_S)
        return [sum(counts) for counts in zip(*(answer["expert_loads"] for answer in answers), strict=True)]

    def _store(self, record: Record) -> None:
        crew, epochs = self._crew, self._transition.epochs
        entry = ledger.Entry(record, crew.uid, crew.secret, crew.describe(), tuple(epochs.loads), epochs.decided)
        ledger.write(self._name, entry)

    async def _stop(self) -> None:
        transition = self._transition
        transition.tell(Stopping())
        deadline_s = time.monotonic() + STOP_TIMEOUT_S
        while transition.coordinator.record.members and time.monotonic() < deadline_s:
            await asyncio.sleep(0.02)
        self._autoscaler.close()
        transition.close()
        self._crew.release(list(self._crew.hands))
        ledger.erase(self._name)


def _left(config: Config, name: str) -> ledger.Entry | None:
    """What this controller is to take over: only that of its own earlier life. What another of its name left behind is ended."""
    left = ledger.read(name)
    if left is None or ray.get_runtime_context().was_current_actor_reconstructed:
        return left
    crew = Crew(config, left.secret, left.uid, NAMESPACE, name)
    crew.adopt(left.actors)
    crew.release(list(crew.hands))
    ledger.erase(name)
    return None


def _require_committed(answer: dict[str, Any]) -> None:
    """Raises RuntimeError for a resize that was rolled back."""
    if answer["outcome"] != "committed":
        raise RuntimeError(answer["reason"])
