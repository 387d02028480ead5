"""Who is still there: Ray's word for the dead, their own for a broken epoch, and a heartbeat for those that are only silent."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import ray

from actors.crew import Crew
from actors.pulse import Pulse
from actors.roster import Hand, first_line
from afd_ray.membership.events import Event, Lost, Unlinked

LEFT = "left"
Key = TypeVar("Key")


class Vigil:
    """Watches members until told to watch others."""

    def __init__(self, crew: Crew, timeout_s: float, tell: Callable[[Event], None]) -> None:
        """A member is lost when it has not answered for `timeout_s`."""
        self._crew, self._timeout_s, self._tell = crew, timeout_s, tell
        self._beats: dict[str, asyncio.Task[None]] = {}
        self._ends: dict[tuple[int, str], asyncio.Task[None]] = {}

    def watch(self, epochs: Sequence[int], members: Sequence[str]) -> None:
        """Exactly these from now on, and how these epochs go for them."""
        wanted = {member for member in members if member in self._crew}
        seats = {(number, member) for number in epochs for member in wanted}
        _keep(self._beats, wanted)
        _keep(self._ends, seats)
        for member in wanted - self._beats.keys():
            self._beats[member] = asyncio.create_task(self._beat(self._crew[member]))
        for number, member in seats - self._ends.keys():
            self._ends[number, member] = asyncio.create_task(self._end(number, self._crew[member]))

    async def _beat(self, hand: Hand) -> None:
        """A beat every third of the time allowed, each given the other two: silence is noticed within the whole."""
        period_s, patience_s = self._timeout_s / 3, self._timeout_s * 2 / 3
        pulse: Pulse | None = None
        try:
            while True:
                started_s = time.monotonic()
                try:
                    async with asyncio.timeout(patience_s):
                        pulse = await self._felt(hand, pulse)
                except TimeoutError:
                    if time.monotonic() - started_s < patience_s + period_s:  # this loop was not stalled itself
                        self._tell(Lost(hand.name, f"it has not answered for {self._timeout_s:g} s"))
                        return
                except ray.exceptions.RayError as error:
                    self._tell(Lost(hand.name, first_line(error)))
                    return
                await asyncio.sleep(max(0.0, started_s + period_s - time.monotonic()))
        finally:
            if pulse is not None:
                pulse.close()

    async def _felt(self, hand: Hand, pulse: Pulse | None) -> Pulse | None:
        """One beat; gives the connection for the next. Ray is asked instead where there is none: it knows who is dead."""
        try:
            if pulse is None:
                pulse = await Pulse.open(hand.identity["host"], hand.identity["pulse"], self._crew.secret)
            await pulse.beat()
        except (KeyError, OSError):
            await _answer(hand.handle.beat.remote())
            return None
        return pulse

    async def _end(self, number: int, hand: Hand) -> None:
        try:
            reason = await hand.handle.lost.remote(number)
        except ray.exceptions.RayActorError as error:
            self._tell(Lost(hand.name, first_line(error)))
        except ray.exceptions.RayTaskError:
            return  # it has no seat in that epoch: the switch that is under way will tell
        else:
            if reason != LEFT:
                self._tell(Unlinked(number, hand.name, reason))


async def _answer(call: "asyncio.Future[int]") -> int:
    return await call


def _keep(tasks: dict[Key, asyncio.Task[None]], wanted: set[Key]) -> None:
    for key in tasks.keys() - wanted:
        tasks.pop(key).cancel()
