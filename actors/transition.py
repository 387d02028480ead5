"""The shell around the coordinator: does what it decides with real actors, clocks and Ray, and tells it what came of it."""

import asyncio
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, NamedTuple

import ray

from actors.crew import Crew
from actors.roster import Hand, first_line
from actors.vigil import Vigil
from afd_ray.config import Config
from afd_ray.handoff.message import LinkError
from afd_ray.handoff.spin import SPIN_US
from afd_ray.membership.contract import check_same_model, check_same_versions
from afd_ray.membership.epoch import Epoch
from afd_ray.membership.epochs import Epochs
from afd_ray.membership.events import (
    Answered,
    Ask,
    Asked,
    Deadline,
    Done,
    Effect,
    Event,
    Gone,
    Late,
    Lost,
    Provide,
    Provided,
    Publish,
    Record,
    Release,
    Roster,
    Store,
    Unprovided,
    Watch,
    Withdrawn,
)
from afd_ray.membership.protocol import Coordinator
from afd_ray.membership.shape import Shape
from afd_ray.membership.steps import Deadlines
from afd_ray.models.config import ModelConfig

logger = logging.getLogger(__name__)

START_S = 120.0
"""For the processes of reserved actors to come up."""
REMEMBERED_S = 60.0
"""For how long the status shows an actor that died."""
RECONNECT = 4
"""Times `failure.detect_timeout_s`: for the edges between those who are left after a loss. All of them answer, so whoever does not connect is cut off."""
MARGIN_S = 2.0
"""A member is told to be done so much sooner than it is given up: it can say what is wrong."""


def deadlines_of(config: Config) -> Deadlines:
    """As configured."""
    start_s, fetched_s = config.handoff.start_timeout_s, config.failure.drain_timeout_s
    return Deadlines(
        provide_s=config.placement.wait_for_nodes_s + config.placement.timeout_s + START_S,
        prepare_s=start_s,
        connect_s=start_s + MARGIN_S,
        reconnect_s=min(start_s, RECONNECT * config.failure.detect_timeout_s) + MARGIN_S,
        move_out_s=fetched_s + 2 * MARGIN_S,
    )


class Asking(NamedTuple):
    """A shape that somebody asked for, and waits for."""

    shape: Shape
    before: Roster | None
    started_s: float
    answer: asyncio.Future[dict[str, Any]]


class Transition:
    """One cluster's way through its epochs. Everything happens on one event loop."""

    def __init__(self, config: Config, model: ModelConfig, crew: Crew, store: Callable[[Record], None]) -> None:
        """`store` keeps the record where the controller's death does not reach, at once."""
        self.coordinator = Coordinator(deadlines_of(config))
        self.crew = crew
        self.changed = asyncio.Condition()
        self.epochs = Epochs(config, model)
        self.last_resize: dict[str, Any] | None = None
        self._model, self._store = model, store
        self._vigil = Vigil(crew, config.failure.detect_timeout_s, self.tell)
        self._asked: dict[str, Asking] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._told: deque[Event] = deque()
        self._endpoints: dict[int, dict[int, dict[str, Any]]] = {}
        self._providing: dict[int, asyncio.Task[None]] = {}
        self._pauses_ms: dict[int, list[float]] = {}
        """Of the attention actors, by the epoch that they entered; the last one alone."""
        self._departed: list[tuple[float, Hand]] = []
        self.views = 0
        """How often what ingress and status show has changed."""

    @property
    def roster(self) -> Roster | None:
        return self.coordinator.roster

    @property
    def hands(self) -> list[Hand]:
        """The actors of the serving epoch that are there, in the order of the group ranks."""
        roster = self.roster
        return [self.crew[member] for member in (roster.members if roster else ()) if member in self.crew]

    @property
    def departed(self) -> list[Hand]:
        """Actors that died in the last minute."""
        self._departed = [(at_s, hand) for at_s, hand in self._departed if time.monotonic() - at_s < REMEMBERED_S]
        return [hand for _, hand in self._departed]

    @property
    def lost(self) -> list[str]:
        """Attention actors whose requests have to go on elsewhere now: dead, or not answering."""
        coordinator = self.coordinator
        serving = self.roster.attention if self.roster else ()
        silent = [name for name in serving if name not in coordinator.takers and name not in coordinator.leaving]
        return [*(hand.name for hand in self.departed), *silent]

    @property
    def waiting_for(self) -> str | None:
        """The nodes that a change in progress needs and the cluster lacks."""
        return None if self.crew.lack is None else f"nodes: {self.crew.lack}"

    def state_of(self, hand: Hand) -> str:
        """As the status shows it."""
        coordinator = self.coordinator
        if hand.name not in self.crew:
            return "dead"
        if self.roster is None or hand.name not in self.roster.members:
            return "starting"
        return "running" if hand.role == "ffn" or hand.name in coordinator.takers else "draining"

    def epoch(self, roster: Roster) -> Epoch:
        """What its members are told of it."""
        change = self.coordinator.change
        recovers = change is not None and change.kind == "recover" and change.roster == roster
        return self.epochs.of(roster, change.base if change and recovers else None)

    def tell(self, event: Event) -> None:
        """Let the coordinator decide what follows from this, and do it."""
        if isinstance(event, Lost) and event.member in self.crew and not self.crew[event.member].reason:
            logger.error("%s is lost: %s", event.member, event.reason)
            self.crew[event.member].reason = event.reason
        self._told.append(event)
        if len(self._told) > 1:
            return  # what an effect leads to at once comes after all effects of the event before
        while self._told:
            try:
                for effect in self.coordinator.on(self._told[0]):
                    self._do(effect)
            finally:
                self._told.popleft()

    async def ask(
        self, shape: Shape, *, anew: bool = False, timeout_s: float | None = None, ask_id: str | None = None
    ) -> dict[str, Any]:
        """Get to this shape, or give it up after `timeout_s`; gives how that ended, as `last_resize` in the status.

        `ask_id`: for `withdraw`. Raises ValueError for a shape that cannot be.
        """
        self.epochs.check(shape)
        ask_id = ask_id or new_ask_id()
        asking = self._asked[ask_id] = Asking(shape, self.roster, time.monotonic(), asyncio.get_running_loop().create_future())
        self.tell(Asked(ask_id, shape, anew))
        alarm = None
        if timeout_s is not None:
            alarm = asyncio.get_running_loop().call_later(timeout_s, self.withdraw, ask_id, f"not over in {timeout_s:g} s")
        answer = await asking.answer
        if alarm is not None:
            alarm.cancel()
        return answer

    async def call_off(self, reason: str) -> dict[str, Any]:
        """Roll back the resize that somebody asked for; gives how that ended, once it has. Raises RuntimeError where there is none."""
        ask_id = self.coordinator.asked
        asking = self._asked.get(ask_id or "")
        if ask_id is None or asking is None:
            raise RuntimeError("no resize is in progress, so there is none to call off")
        self.withdraw(ask_id, reason)
        return await asyncio.shield(asking.answer)

    def withdraw(self, ask_id: str, reason: str) -> None:
        """Roll back what was asked for, and say what it waited for; too late once it has committed."""
        change, lack = self.coordinator.change, self.waiting_for
        waited = lack is not None and change is not None and change.ask_id == ask_id
        self.tell(Withdrawn(ask_id, f"{reason}; waiting for {lack}" if waited else reason))

    def close(self) -> None:
        """Watch nobody any more."""
        self._vigil.watch((), ())
        for task in self._tasks:
            task.cancel()

    # --- effects --------------------------------------------------------------------------------------------------------------

    def _do(self, effect: Effect) -> None:
        if isinstance(effect, Store):
            self.epochs.forget(but=self._numbers)
            self._store(effect.record)
        elif isinstance(effect, Provide):
            self._providing[effect.number] = self._begin(self._provide(effect))
        elif isinstance(effect, Ask):
            self._ask(effect)
        elif isinstance(effect, Watch):
            self._vigil.watch(effect.epochs, effect.members)
        elif isinstance(effect, Release):
            self._release(effect.members)
        elif isinstance(effect, Deadline):
            asyncio.get_running_loop().call_later(effect.seconds, self.tell, Late(effect.number, effect.phase))
        elif isinstance(effect, Done):
            self._answer(effect)
        elif isinstance(effect, Publish):
            self._begin(self._publish())

    def _answer(self, done: Done) -> None:
        """To whoever asked; nobody does any more after a restart."""
        asking = self._asked.pop(done.ask_id, None)
        if asking is None:
            return
        entered = self.roster.number if self.roster and self.roster != asking.before else 0
        answer = {
            "from": _counts(asking.before.shape) if asking.before else None,
            "to": _counts(asking.shape),
            "outcome": done.outcome,
            "reason": done.reason or None,
            "pause_ms": max(self._pauses_ms.get(entered, ()), default=None) if done.outcome == "committed" else None,
            "total_s": round(time.monotonic() - asking.started_s, 3),
        }
        if done.outcome != "refused":
            self.last_resize = answer
        if not asking.answer.done():
            asking.answer.set_result(answer)

    @property
    def _numbers(self) -> set[int]:
        """Of the epochs that serve, come, or were to be gone back to."""
        change = self.coordinator.change
        rosters = (self.roster, change.base, change.roster) if change else (self.roster,)
        return {roster.number for roster in rosters if roster}

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _publish(self) -> None:
        self.views += 1
        async with self.changed:
            self.changed.notify_all()

    async def _provide(self, wanted: Provide) -> None:
        names = (*wanted.attention, *(name for group in wanted.ffn for name in group))
        try:
            await self.crew.provide(wanted.number, wanted.attention, wanted.ffn)
        except (ValueError, RuntimeError, TimeoutError, ray.exceptions.RayError) as error:
            self.tell(Unprovided(wanted.number, first_line(error)))
        else:
            self._store(self.coordinator.record)  # with the actors that there are now
            self.tell(Provided(wanted.number, names))
        finally:
            self._providing.pop(wanted.number, None)

    def _release(self, members: Sequence[str]) -> None:
        for number, providing in list(self._providing.items()):
            change = self.coordinator.change
            if change is None or change.number != number or set(change.fresh) & set(members):
                providing.cancel()
        ended = {hand.name: hand for hand in self.crew.release(members)}
        self._departed += [(time.monotonic(), hand) for hand in ended.values() if hand.reason]
        for member in members:
            self._begin(self._gone(member, ended.get(member)))

    async def _gone(self, member: str, hand: Hand | None) -> None:
        if hand is not None:
            await self.crew.gone(hand)
        self.tell(Gone(member))

    # --- calls ----------------------------------------------------------------------------------------------------------------

    def _ask(self, ask: Ask) -> None:
        logger.info("epoch %d: %s of %s", ask.number, ask.op, ", ".join(ask.members))
        if ask.op == "prepare":
            self._endpoints, self._pauses_ms = {ask.number: {}}, {ask.number: []}
        for member in ask.members:
            if member in self.crew:
                self._begin(self._call(ask, self.crew[member]))
            else:
                self.tell(Lost(member, "it is gone"))

    async def _call(self, ask: Ask, hand: Hand) -> None:
        try:
            answer = await getattr(hand.handle, ask.op).remote(*self._arguments(ask, hand))
            self._take(ask, hand, answer)
        except ray.exceptions.RayActorError as error:
            self.tell(Lost(hand.name, first_line(error)))
        except Exception as error:  # whatever went wrong is the member's answer
            cause = getattr(error, "cause", None) or error
            peer = ask.roster.members[cause.peer] if isinstance(cause, LinkError) else None
            self.tell(Answered(ask.number, ask.op, hand.name, first_line(error), peer))
        else:
            self.tell(Answered(ask.number, ask.op, hand.name))

    def _arguments(self, ask: Ask, hand: Hand) -> tuple[Any, ...]:
        """What the call takes beside the epoch's number."""
        number, members = ask.number, ask.roster.members
        if ask.op in ("resume", "switch", "retire", "discard"):
            return (number,)
        if ask.op in ("move_out", "drain"):
            return (number, ask.timeout_s + MARGIN_S)
        epoch = self.epoch(ask.roster)
        rank = members.index(hand.name)
        if ask.op == "load":
            return (epoch,) if hand.role == "attention" else (epoch.shard(rank, self._model), number)
        if ask.op == "connect":
            return (number, self._endpoints[number], max(ask.timeout_s - MARGIN_S, ask.timeout_s / 2))
        spin_us = SPIN_US if self.crew.spin_hosts(members) <= (os.cpu_count() or 1) else 0.0
        return (epoch, rank, f"afd-{self.crew.uid}-e{number}", spin_us)

    def _take(self, ask: Ask, hand: Hand, answer: Any) -> None:
        if ask.op == "load":
            hand.identity = answer
            known = [self.crew[member] for member in ask.roster.members if member in self.crew]
            check_same_versions({other.name: other.identity["versions"] for other in known if other.identity})
            check_same_model({other.name: other.identity["model_digest"] for other in known if other.identity})
        elif ask.op == "prepare":
            self._endpoints.setdefault(ask.number, {})[ask.roster.members.index(hand.name)] = answer
        elif ask.op == "switch" and hand.role == "attention":
            self._pauses_ms.setdefault(ask.number, []).append(round(float(answer), 1))


def new_ask_id() -> str:
    """No two are the same."""
    return os.urandom(8).hex()


def _counts(shape: Shape) -> dict[str, int]:
    return {"attention": shape.attention, "ffn": shape.ffn}
