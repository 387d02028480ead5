"""The controller's autoscaling: once a period it looks at the actors, lets the policy decide, and resizes as an operator would."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

from actors.aside import aside
from actors.roster import first_line
from actors.survey import look_at
from actors.transition import Transition, new_ask_id
from afd_ray.autoscaling.guard import Guard
from afd_ray.autoscaling.loading import load_policy
from afd_ray.autoscaling.memory import Memory
from afd_ray.autoscaling.observing import Observer
from afd_ray.autoscaling.record import Action, Entry, Record, figures
from afd_ray.autoscaling.values import Counts, Decision, Goals, Observation, Override, Resize
from afd_ray.config import Config
from afd_ray.membership.events import Roster
from afd_ray.membership.shape import Shape

logger = logging.getLogger(__name__)

IDLE = "fixed"
"""The policy for which nobody has to look."""
MEMORY, DECISION = "autoscaling", "decision/"
"""Where they are kept."""
Answer = dict[str, Any]


class Shelf(Protocol):
    """JSON values that outlive the controller (`ledger.Shelf`)."""

    def put(self, key: str, value: Any) -> None: ...

    def drop(self, key: str) -> None: ...

    def read(self) -> dict[str, Any]: ...


class Autoscaler:
    """Of one cluster, on the controller's event loop; it never waits there for a resize, nor for the policy."""

    def __init__(
        self,
        config: Config,
        layers: int,
        transition: Transition,
        shelf: Shelf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Goes on from what is on the shelf. `clock`: seconds, as the policy is told them. Raises ValueError for a policy that cannot be loaded."""
        kept, self._clock = shelf.read(), clock
        self._scaling, self._layers, self._transition, self._shelf = config.autoscaling, layers, transition, shelf
        self._memory = Memory.load(kept[MEMORY]) if MEMORY in kept else Memory()
        self._record = Record(Entry.load(value) for key, value in kept.items() if key.startswith(DECISION))
        self._guard = Guard(load_policy(config.autoscaling.policy), state=self._memory.state)
        self._observer = Observer()
        self._looking: asyncio.Task[None] | None = None
        self._resizing: asyncio.Task[None] | None = None
        self._ask_id = ""
        """Of the resize that is under way for the policy."""
        self._change = (0, 0.0)
        """Number of the change that was seen last, and since when."""

    def begin(self) -> None:
        """Look, decide and act from now on; harmless when repeated, and nothing for `fixed`."""
        if self._looking is None and self._scaling.policy != IDLE:
            self._looking = asyncio.get_running_loop().create_task(self._look_again_and_again())

    def close(self) -> None:
        """Decide nothing any more. A resize that is under way is not waited for."""
        for task in (self._looking, self._resizing):
            if task is not None:
                task.cancel()

    def decisions(self, after: int = 0) -> list[dict[str, Any]]:
        """Those with a higher number that are still kept, oldest first."""
        return [entry.dump() for entry in self._record.after(after)]

    def describe(self) -> dict[str, Any]:
        """For the status."""
        now_s = self._clock()
        override = self._memory.override_at(now_s)
        return {
            "policy": self._scaling.policy,
            "override": override and {"counts": override.counts._asdict(), "for_s": round(override.until_s - now_s, 1)},
            "last_decision": self._record.last and self._record.last.dump(),
        }

    async def by_hand(self, shape: Shape, resize: Callable[[], Awaitable[Answer]]) -> Answer:
        """An operator's resize. It goes before the policy's own, which is given up, and then the policy leaves the counts alone for a while.

        Raises ValueError for a shape that cannot be, and what `resize` raises.
        """
        self._transition.epochs.check(shape)
        memory, before = self._memory, self._memory.override
        counts, served = _counts(shape), self._served
        memory.override = Override(counts, self._clock() + self._scaling.override_s)
        self._note("by_hand", served, counts, "asked for by hand")
        await self._give_way()
        try:
            answer = await resize()
        except RuntimeError as error:
            memory.override = before
            self._note("refused", served, counts, str(error))
            raise
        if answer["outcome"] != "committed":
            memory.override = before
        self._note_end(served, counts, answer)
        return answer

    @property
    def _served(self) -> Counts:
        roster = self._transition.roster
        assert roster is not None  # nothing is set by hand before the cluster is up
        return _counts(roster.shape)

    # --- looking --------------------------------------------------------------------------------------------------------------

    async def _look_again_and_again(self) -> None:
        due_s = time.monotonic()
        while True:
            due_s = max(due_s + self._scaling.period_s, time.monotonic())
            await asyncio.sleep(due_s - time.monotonic())
            try:
                await self._decide()
            except Exception:  # whatever one look runs into, the next is made
                logger.exception("autoscaling: nothing decided")

    async def _decide(self) -> None:
        """One look, one decision, and what follows from it."""
        roster = self._transition.roster
        if roster is None or self._transition.coordinator.state == "stopping":
            return
        known = self._known(roster)
        look, silent = await look_at(roster.number, self._transition.hands)
        if silent:
            self._note("hold", known.counts, known.counts, f"nothing decided: no answer from {', '.join(silent)}")
            return
        observation = self._observer.observe(known, look)
        decision = await aside(self._guard.decide, observation, self._clock())
        self._memory.state = self._guard.state
        self._act(decision, observation, roster)

    def _known(self, roster: Roster) -> Observation:
        """What the controller itself knows of the cluster."""
        transition, memory, now_s, counts = self._transition, self._memory, self._clock(), _counts(roster.shape)
        change, wanted = transition.coordinator.change, transition.coordinator.wanted or roster.shape
        if change is not None and change.number != self._change[0]:
            self._change = change.number, now_s
        elif change is None and self._resizing is None:
            memory.settle(counts, now_s)
        return Observation(
            counts=counts,
            goals=Goals.of(self._scaling, wanted.tensor_parallel),
            layers=self._layers,
            micro_batches=transition.epoch(roster).micro_batches,
            start_delay_s=memory.start_delay_s,
            resize=Resize(_counts(change.roster.shape), self._change[1]) if change else None,
            last_resize=memory.last,
            override=memory.override_at(now_s),
        )

    # --- acting ---------------------------------------------------------------------------------------------------------------

    def _act(self, decision: Decision, observation: Observation, roster: Roster) -> None:
        counts, wanted = observation.counts, decision.counts
        if decision.give_up and self._resizing is not None:
            self._note("give_up", counts, counts, decision.reason, observation)
            self._transition.withdraw(self._ask_id, decision.reason)
        elif wanted == counts or not self._is_still(roster):
            self._note("hold", counts, wanted, decision.reason, observation)
        else:
            self._memory.asked = wanted
            self._note("resize", counts, wanted, decision.reason, observation)
            self._ask_id = new_ask_id()
            self._resizing = asyncio.get_running_loop().create_task(self._resize(counts, wanted))

    def _is_still(self, roster: Roster) -> bool:
        """Whether the cluster is the one that was looked at, with nobody changing it."""
        by_hand = self._memory.override_at(self._clock()) is not None
        same = self._transition.roster == roster and self._transition.coordinator.change is None
        return same and self._resizing is None and not by_hand

    async def _resize(self, served: Counts, wanted: Counts) -> None:
        """As an operator's, but for its deadline; whatever goes wrong is how it ended."""
        shape, deadline_s = self._transition.coordinator.wanted, self._scaling.resize_deadline_s
        assert shape is not None  # there is a roster
        try:
            aim = shape.scaled(wanted.attention, wanted.ffn)
            answer = await self._transition.ask(aim, timeout_s=deadline_s, ask_id=self._ask_id)
        except Exception as error:
            answer = {"outcome": "refused", "reason": first_line(error), "total_s": 0.0}
        self._resizing = None
        self._note_end(served, wanted, answer)

    async def _give_way(self) -> None:
        """Until no resize of the policy is under way."""
        if self._resizing is not None:
            self._transition.withdraw(self._ask_id, "other counts were set by hand")
            await asyncio.wait([self._resizing])

    # --- keeping --------------------------------------------------------------------------------------------------------------

    def _note_end(self, before: Counts, wanted: Counts, answer: Answer) -> None:
        committed, total_s = answer["outcome"] == "committed", answer["total_s"]
        self._memory.note_end(before, wanted, committed, self._clock(), total_s)
        reason = f"in {total_s:.1f} s" if committed else answer["reason"]
        self._note(answer["outcome"], before, wanted, reason)

    def _note(self, action: Action, before: Counts, wanted: Counts, reason: str, by: Observation | None = None) -> None:
        """Record it, and keep it and what is to be remembered where the controller's death does not reach."""
        seen: Mapping[str, float | int | None] = figures(by) if by else {}
        entry = Entry(self._record.next_number, time.time(), self._scaling.policy, action, before, wanted, reason, seen)
        crowded_out = self._record.add(entry)
        self._shelf.put(_key(entry), entry.dump())
        self._shelf.put(MEMORY, self._memory.dump())
        if crowded_out is not None:
            self._shelf.drop(_key(crowded_out))


def _counts(shape: Shape) -> Counts:
    return Counts(shape.attention, shape.ffn)


def _key(entry: Entry) -> str:
    return f"{DECISION}{entry.number}"
