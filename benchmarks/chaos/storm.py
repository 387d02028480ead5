"""One fault after the other, each at its moment, and the cluster whole again in between."""

import asyncio
import os
import signal
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import ray

from afd_ray.membership.steps import NAMES
from benchmarks.chaos.clients import Clients, Mishap
from benchmarks.chaos.processes import Workers, workers
from benchmarks.chaos.schedule import Fault, Moment, Shape, Victim
from benchmarks.chaos.stalls import stall_s
from benchmarks.chaos.watch import Watch, asked, repaired_s

LOOK_S, SHORT_S = 0.1, 0.001
INGRESS: tuple[Victim, ...] = ("ingress", "proxy", "serve_controller")
"""Whose death may end a client's answer, with an error that says to ask again."""


class Struck(NamedTuple):
    """One fault and what came of it. Seconds from the fault; None: it did not come to that."""

    fault: Fault
    in_time: bool
    """Whether its moment was seen: a short phase can be over before it is."""
    detected_s: float | None
    """To the cluster's first change of state."""
    stalls_s: list[float]
    """Of each answer in progress: to its next token."""
    whole_s: float
    """To the wanted shape, with every process in its place and every client served."""
    mishaps: list[Mishap]

    @property
    def excused(self) -> bool:
        """Whether clients may have been told to ask again."""
        return self.fault.victim in INGRESS


class NotWhole(RuntimeError):
    """The cluster did not get well again; one line."""


@dataclass
class Storm:
    """Faults on a cluster that this process is connected to, while clients ask it."""

    url: str
    clients: Clients
    shape: Shape
    """What the cluster has at rest."""
    patience_s: float
    """For the cluster to be whole again."""
    struck: list[Struck] = field(default_factory=list)
    kills: int = 0
    _watch: Watch = field(default_factory=Watch)
    _wanted: dict[str, int] = field(default_factory=dict)

    async def rage(self, faults: Iterable[Fault]) -> None:
        """Raises NotWhole, which ends it."""
        self._wanted = {role: len(processes) for role, processes in workers().items()}
        await self._watch.start()
        try:
            for fault in faults:
                self.struck.append(await self._strike(fault))
                report(len(self.struck), self.struck[-1])
        finally:
            await self._watch.close()

    async def _strike(self, fault: Fault) -> Struck:
        beside, in_time = await self._moment(fault)
        known = len(self.clients.mishaps)
        before = self._watch.now
        pid, at_s = await self._send(signal.SIGKILL if fault.how == "kill" else signal.SIGSTOP, fault.victim, fault.pick)
        in_progress = self.clients.in_progress(at_s)
        if fault.how == "pause":
            await asyncio.sleep(fault.pause_s)
            with suppress(ProcessLookupError):  # it was given up, and ended
                os.kill(pid, signal.SIGCONT)
        try:
            async with asyncio.timeout(self.patience_s):
                await asyncio.gather(*beside, return_exceptions=True)
                await self._whole(at_s)
        except TimeoutError:
            raise NotWhole(f"after {fault}: {await self._complaint()}") from None
        repaired = repaired_s(before, self._watch.since(at_s)) or at_s + LOOK_S
        stalls = [stall_s(answer.times_s, at_s, repaired) for answer in in_progress]
        return Struck(
            fault,
            in_time,
            self._watch.noticed(at_s) if fault.victim in ("attention", "ffn") else None,
            [stall for stall in stalls if stall is not None],
            time.monotonic() - at_s,
            self.clients.mishaps[known:],
        )

    # --- its moment ---------------------------------------------------------------------------------------------------------

    async def _moment(self, fault: Fault) -> tuple[list["asyncio.Task[Any]"], bool]:
        """Wait for it; gives what was set going for its sake, and whether it was seen."""
        beside: list[asyncio.Task[Any]] = []
        seen = True
        if fault.moment == "prefill":
            beside = [asyncio.create_task(self.clients.burst())]
        elif fault.moment == "recovery":
            before = self._watch.now.epoch
            await self._send(signal.SIGKILL, "ffn" if fault.victim == "attention" else "attention", 0.0)
            while self._watch.now.epoch == before and self._watch.now.state == "ready":
                await asyncio.sleep(SHORT_S)
        elif fault.moment != "serving":
            beside = [asyncio.create_task(asked("scale", *fault.shape, None, timeout_s=None))]
            seen = await seen_in(fault.moment, beside[0])
        await asyncio.sleep(fault.rest_s)
        return beside, seen

    async def _send(self, number: signal.Signals, victim: Victim, pick: float) -> tuple[int, float]:
        """To one such process, as soon as there is one; gives its id, and when."""
        while True:
            there = workers()[victim]
            try:
                pid = there[int(pick * len(there))].pid
                os.kill(pid, number)
            except (IndexError, ProcessLookupError):
                await asyncio.sleep(LOOK_S)
                continue
            self.kills += number == signal.SIGKILL
            return pid, time.monotonic()

    # --- whole again ----------------------------------------------------------------------------------------------------------

    async def _whole(self, since_s: float) -> None:
        """Until the shape is as at rest, every process in its place, and every client served by what there is now."""
        while not await self._well() or self._missing(workers()):
            await asyncio.sleep(LOOK_S)
        await self.clients.served(max(since_s, time.monotonic()))

    async def _well(self) -> bool:
        status = await asked("status")
        if status["state"] != "ready" or not await asyncio.to_thread(is_ready, self.url):
            return False
        running = [[row for row in status[role] if row["state"] == "running"] for role in ("attention", "ffn")]
        within = 1 + max((row.get("tp_rank") or 0 for row in running[1]), default=0)
        if (len(running[0]), len(running[1]), within) == self.shape:
            return True
        with suppress(ray.exceptions.RayTaskError):  # a resize is in progress
            await asked("scale", *self.shape, None, timeout_s=None)
        return False

    def _missing(self, there: Workers) -> list[str]:
        """Roles with fewer or more processes than at rest."""
        return [f"{len(there[role])} {role} of {count}" for role, count in self._wanted.items() if len(there[role]) != count]

    async def _complaint(self) -> str:
        try:
            async with asyncio.timeout(LOOK_S * 50):
                status = await asked("status")
        except TimeoutError:
            return "no controller answers"
        rows = [(row["id"], row["state"]) for role in ("attention", "ffn") for row in status[role]]
        late = f"{self._missing(workers())}, {self.clients.mishaps[-3:]}"
        return f"{status['state']} ({status['reason']}), {rows}, {status['last_resize']}, {late}"


async def seen_in(moment: Moment, resize: "asyncio.Task[Any]") -> bool:
    """Until the change is in that phase, or over; gives whether it was seen there."""
    words = NAMES[moment]  # type: ignore[index]
    while not resize.done():
        if str(await asked("progress")).startswith(words):
            return True
    return False


def is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


def report(count: int, struck: Struck) -> None:
    """Progress, on stderr."""
    fault, slowest = struck.fault, max(struck.stalls_s, default=0.0)
    moment = fault.moment if struck.in_time else f"too late for {fault.moment}"
    seen = f"noticed {struck.detected_s:.3f} s, " if struck.detected_s is not None else ""
    told = "".join(f"; {count} x {what}" for what, count in Counter(mishap.what for mishap in struck.mishaps).most_common(3))
    print(
        f"{count}. {fault.how} {fault.victim}, {moment}: {seen}slowest stall {slowest:.2f} s, whole after {struck.whole_s:.1f} s{told}",
        file=sys.stderr,
        flush=True,
    )
