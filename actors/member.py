"""What attention and FFN actors share: their places in epochs, and the thread of their step loop."""

import asyncio
import logging
import os
import sys
import threading
from abc import abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import ray
import torch

from actors.alarm import Alarm
from actors.aside import aside
from actors.heap import freeze_heap
from actors.observed import Observed
from actors.orphan import Orphan
from actors.place import Place, Terms
from actors.pulse import PulseServer
from afd_ray.config import Config, model_directory
from afd_ray.engine.loop import StepLoop, Wire
from afd_ray.membership.epoch import Epoch
from afd_ray.membership.seat import Seat, Stale
from afd_ray.models.checkpoint import Checkpoint, Progress, digest
from afd_ray.models.config import DTYPES
from afd_ray.telemetry import clock_offset_ns
from afd_ray.versions import DECISIVE, versions

logger = logging.getLogger(__name__)

PATIENCE_S = 120.0
"""How long a member that lost its epoch keeps what waits for the next one."""
SWITCH_S = 0.2e-3
"""How long another thread of an actor waits at most for the interpreter while the step loop looks for messages."""
LEFT = "left"


class Member(Observed):
    """One actor's places in epochs: what both roles can be asked. Control methods run on the actor's event loop.

    A call about an epoch that is over, or that this member has no place in, raises ValueError (`seat.Stale`).
    """

    def __init__(self, name: str, config: Config, secret: bytes, controller: str = "") -> None:
        super().__init__()
        self._name, self._config, self._secret = name, config, secret
        self._orphan = Orphan(controller)
        self._pulse = PulseServer(secret, self._orphan.heard)
        self._seat = Seat(name)
        self._places: dict[int, Place] = {}
        self._ends: dict[int, asyncio.Future[str]] = {}
        """By epoch with a place: why this member's part in it is over."""
        self._failure: str | None = None
        self._thread: threading.Thread | None = None
        self._overdue, self._patience = Alarm(), Alarm()
        self._checkpoint: Checkpoint | None = None
        self._versions = versions(DECISIVE)  # once: it reads files, and every epoch asks while the step loop serves
        self._model_digest = 0
        self._loaded = 0.0

    @abstractmethod
    def _check_weights(self, epoch: Epoch, rank: int) -> None:
        """Raises ValueError unless what this rank needs is loaded."""

    @abstractmethod
    def _drop_weights(self, number: int) -> None:
        """Weights loaded for this epoch or an earlier one, and not served yet, are not wanted."""

    @abstractmethod
    async def _hang_up(self) -> None:
        """Close what is open to others than the members of its epochs."""

    @abstractmethod
    def _give_up(self, reason: str) -> None:
        """No later epoch has come: what waits for one is answered, and so is what comes from now on until one does."""

    def _enter(self, wire: Wire) -> "Future[float]":
        """Have the step loop serve there; gives the pause in ms."""
        return self._ready_loop().switch(wire)

    def _go_on(self) -> "Future[None] | None":
        """Begin micro-batches again where it serves."""
        return None

    def _ended(self, reason: str) -> None:
        """The step loop is over, for this reason; called on the event loop."""
        logger.info("%s: the step loop is over: %s", self._name, reason)

    # --- from epoch to epoch ----------------------------------------------------------------------------------------------

    @ray.method
    async def loaded(self) -> float:
        """Share of this role's tensors that is loaded, 0 to 1."""
        return self._loaded

    @ray.method
    async def prepare(self, epoch: Epoch, rank: int, group_name: str, spin_us: float) -> dict[str, Any]:
        """Open this member's side of the epoch's group, beside the one it serves in; gives its endpoint for `connect`."""
        self._require_well()
        number, events = epoch.number, asyncio.get_running_loop()
        await self._close(self._seat.prepare(number))
        try:
            self._check_weights(epoch, rank)
            terms = Terms(self._config, self._ready_half().config, self._model_digest, self._secret)
            place = await Place.open(terms, epoch, rank, group_name, spin_us)
        except BaseException:
            self._seat.discard(number)
            raise
        if self._seat.standby != number:
            await place.close()
            raise Stale(f"{self._name}: epoch {number} was given up while its group was opened")
        self._places[number] = place
        self._ends[number] = events.create_future()
        # The step loop does not look at it before it is entered.
        place.group.mesh.on_broken(lambda error: tell(events, self._lose_standby, number, str(error)))
        return place.group.endpoint.to_dict()

    @ray.method
    async def connect(self, number: int, endpoints: dict[int, dict[str, Any]], timeout_s: float) -> dict[int, str]:
        """Connect and warm up every edge of the standby place; gives the link kind by peer. Raises LinkError naming the edge."""
        self._seat.connect(number)
        return await self._place(number).connect(endpoints, timeout_s)

    @ray.method
    async def switch(self, number: int) -> float:
        """Serve in the standby place from now on; gives the pause in ms.

        What is in flight is taken back. The pause is from the end of the drain, or the loss of the old epoch, to entering the new one;
        0 where neither was.
        """
        self._require_well()
        before = self._seat.serving
        if number == before:
            return self._ready_loop().pause_ms or 0.0
        place = self._place(number)
        self._seat.switch(number)
        self._overdue.call_off()
        self._patience.call_off()
        if self._seat.unlinked:
            self._wait_for_another(number, "its links broke before it was entered")
        self._part(before)
        return await asyncio.wrap_future(self._enter(place.wire))

    @ray.method
    async def resume(self, number: int) -> None:
        """The coming epoch is given up: go on in the old one, begin micro-batches and take requests again."""
        await self._resume(number)

    @ray.method
    async def retire(self, number: int) -> None:
        """Close the places of all epochs before this one, once everybody has entered it; a member without a place in it has none then."""
        had_one = self._seat.serving > 0
        closed = self._seat.retire(number)
        if had_one and not self._seat.serving:
            self._overdue.call_off()
            await asyncio.wrap_future(self._ready_loop().leave())
        self._drop_weights(number - 1)
        await asyncio.gather(*map(self._close, closed))

    @ray.method
    async def discard(self, number: int) -> None:
        """Close the standby place of this epoch and drop the weights loaded for it; harmless when repeated or after a later one was entered."""
        closed = self._seat.discard(number)
        if number > self._seat.serving:
            self._drop_weights(number)
        await self._close(closed)

    @ray.method
    async def leave(self) -> None:
        """End the step loop and close every place, for good; harmless when repeated."""
        thread, self._thread = self._thread, None
        self._overdue.call_off()
        self._patience.call_off()
        self._orphan.close()
        self._pulse.close()
        self._stop_measuring()
        if thread is not None:
            self._ready_loop().stop()
            await aside(thread.join)
            self._failure = self._failure or f"{self._name} left the cluster"
            self._ended(self._failure)
        await asyncio.gather(*map(self._close, list(self._places)))
        await self._hang_up()

    @ray.method
    async def lost(self, number: int) -> str:
        """Return the reason once this member's part in the epoch has failed, "left" once it is over without a failure; never while all is well."""
        end = self._ends.get(number)
        if end is not None:
            return await asyncio.shield(end)
        if number <= max(self._seat.over, self._seat.serving):
            return LEFT
        raise Stale(f"{self._name}: it has no place in epoch {number}")

    @ray.method
    async def beat(self) -> int:
        """Answers at once, with the epoch that this member serves in; 0: none."""
        self._orphan.heard()
        return self._seat.serving

    # --- behind it ----------------------------------------------------------------------------------------------------------

    async def _introduce(self) -> dict[str, Any]:
        """`_identity`, and where its pulse is felt."""
        host = ray.util.get_node_ip_address()
        return self._identity() | {"host": host, "pulse": await self._pulse.start(host)}

    def _identity(self) -> dict[str, Any]:
        """Where this actor runs, with what, and which checkpoint it has read."""
        return {
            "id": self._name,
            "node": ray.get_runtime_context().get_node_id(),
            "address": ray.util.get_node_ip_address(),
            "pid": os.getpid(),
            "offset_ns": clock_offset_ns(),
            "model_digest": self._model_digest,
            "versions": self._versions,
        }

    def _standing(self) -> dict[str, Any]:
        """What the status of either role begins with."""
        loop, place = self._ready_loop(), self._places.get(self._seat.serving)
        return {
            "failure": self._failure,
            "epoch": loop.epoch_number,
            "rank": place.wire.rank if place else None,
            "draining": self._seat.draining > 0,
            "pause_ms": loop.pause_ms,
            **self._measured(),
        }

    def _open_checkpoint(self, num_cpus: float) -> tuple[Checkpoint, torch.dtype]:
        """The model's files and the dtype to compute in; takes the threads that `num_cpus` allows."""
        torch.set_num_threads(max(1, min(int(num_cpus), os.cpu_count() or 1)))
        model = self._config.model
        if self._checkpoint is None:
            self._checkpoint = Checkpoint.open(model_directory(model))
            self._model_digest = digest(self._checkpoint)
        checkpoint = self._checkpoint
        return checkpoint, checkpoint.config.dtype if model.dtype == "auto" else DTYPES[model.dtype]

    def _progress(self, part: int = 0, parts: int = 1) -> Progress:
        """Takes in how far one of several loads, done one after the other, has come."""

        def note(done: int, total: int) -> None:
            self._loaded = (part + (done / total if total else 1.0)) / parts

        return note

    def _start_thread(self, loop: StepLoop) -> None:
        """The thread that all epochs of this member run on: compiled kernels keep their own threads for each thread that calls them."""
        events = asyncio.get_running_loop()
        # Lambdas, not methods: Ray wraps those of an actor, and these run on the step loop's thread.
        loop.on_lost = lambda number, reason: tell(events, self._lose, number, reason)
        on_failed = lambda reason: tell(events, self._fail, reason)  # noqa: E731
        freeze_heap()
        self._thread = threading.Thread(target=run_loop, args=(loop, self._name, on_failed), name="step-loop", daemon=True)
        self._thread.start()
        self._start_measuring()

    def _require_well(self) -> None:
        if self._failure is not None:
            raise RuntimeError(f"{self._name}: the step loop is over: {self._failure}")

    def _lose(self, number: int, reason: str) -> None:
        """A link broke: where it serves the loop waits for a later epoch."""
        if not self._seat.broke(number):
            return
        logger.warning("%s: epoch %d is lost: %s", self._name, number, reason)
        self._part(number, reason)
        if number == self._seat.serving:
            self._wait_for_another(number, reason)

    def _lose_standby(self, number: int, reason: str) -> None:
        """A link broke of a place that is not entered yet; where it serves the loop itself tells, once it has read what came before."""
        if number == self._seat.standby:
            self._lose(number, reason)

    def _wait_for_another(self, number: int, reason: str) -> None:
        """Requests stay while a later epoch may come."""
        why = f"epoch {number} was lost ({reason}), and no other came within {PATIENCE_S:g} s"
        self._patience.set(PATIENCE_S, self._give_up, why)

    def _fail(self, reason: str) -> None:
        """On the event loop, where requests are taken too: none can slip in between."""
        self._failure = reason
        self._overdue.call_off()
        self._patience.call_off()
        for number in self._ends:
            self._part(number, reason)
        self._ended(reason)

    def _part(self, number: int, reason: str = LEFT) -> None:
        """This member's part in that epoch is over."""
        end = self._ends.get(number)
        if end is not None and not end.done():
            end.set_result(reason)

    def _place(self, number: int) -> Place:
        """Raises Stale while it is not open."""
        if number not in self._places:
            raise Stale(f"{self._name}: it has no place in epoch {number} yet")
        return self._places[number]

    async def _close(self, number: int) -> None:
        """The place in that epoch, if there is one."""
        place = self._places.pop(number, None)
        self._part(number)
        self._ends.pop(number, None)
        if place is not None:
            await place.close()

    async def _resume(self, number: int) -> None:
        self._seat.resume(number)
        if self._seat.draining or self._seat.moving_out:
            return  # for the sake of a later epoch
        self._overdue.call_off()
        resumed = self._go_on()
        if resumed is not None:
            await asyncio.wrap_future(resumed)

    def _expect(self, number: int, deadline_s: float) -> None:
        """Go on as before unless `switch` or `resume` comes within the deadline."""
        self._overdue.set(deadline_s, self._on_overdue, number)

    def _on_overdue(self, number: int) -> None:
        logger.warning("%s: nothing was heard of epoch %d in time, it goes on in %d", self._name, number, self._seat.serving)
        self._seat.overdue(number)
        self._go_on()


def run_loop(loop: StepLoop, name: str, on_failed: Callable[[str], None]) -> None:
    """On the step loop's thread."""
    sys.setswitchinterval(SWITCH_S)
    try:
        loop.run()
    except Exception as error:  # whatever ends the loop ends this member
        logger.exception("%s: the step loop failed", name)
        if loop.epoch_number is not None:
            loop.wire.mesh.close()  # so that the peers learn of it
        on_failed(f"{type(error).__name__}: {error}")


def tell(events: asyncio.AbstractEventLoop, function: Callable[..., None], *args: Any) -> None:
    """Call it on the event loop, unless that is over."""
    with suppress(RuntimeError):
        events.call_soon_threadsafe(function, *args)
