"""The FFN actor's step loop: gather a wave's rows, compute this rank's share of the layer, reduce inside the instance, return.

Stateless between steps. Slots are independent and nothing here waits for one of them while another can run.
"""

import time
from collections import deque
from concurrent.futures import Future
from typing import NamedTuple

import torch
from torch import Tensor

from afd_ray.engine.device_times import FFNMarks
from afd_ray.engine.loop import StepLoop, Wire
from afd_ray.engine.pace import Pace, hold
from afd_ray.engine.pipeline import Ready, next_slot
from afd_ray.engine.waves import Conductor, Wave
from afd_ray.handoff.message import Header, Kind, Message
from afd_ray.handoff.routing import Owned, ownership
from afd_ray.handoff.rows import partial_dtype, unpack_rows
from afd_ray.models.step3 import FFNHalf, Routed


class Reduction(NamedTuple):
    """This rank's own rows of one layer, waiting for the other ranks of the instance."""

    layer: int
    step: int
    owned: tuple[Owned, ...]
    rows: Tensor
    """[N, H] of `owned`, as computed here."""
    busy_us: int
    queued: dict[int, dict[str, int]]
    """By attention rank, what the header says of how long its rows lay here; nothing where that is not known."""


class Arrival(NamedTuple):
    """One attention rank's rows for a layer, when they were found here, and when this rank had looked before that."""

    message: Message
    looked_ns: int
    found_ns: int

    def queued(self, started_ns: int) -> dict[str, int]:
        """What the header says of how long they lay here, if the stage began then."""
        return {"queued_us": (started_ns - self.found_ns) // 1000, "unseen_us": (self.found_ns - self.looked_ns) // 1000}


class SlotState:
    """One micro-batch slot as one FFN rank sees it."""

    def __init__(self, attention: int) -> None:
        self.waves: deque[Wave] = deque()
        """The one under way and those after it: where rows are routed, others may be ahead of an instance that got none."""
        self.begun_ns = 0
        """When the newest of them came."""
        self.layer = 0
        self.arrived: list[deque[Arrival]] = [deque() for _ in range(attention)]
        self.reduction: Reduction | None = None
        self.shares: dict[int, Message] = {}

    @property
    def ready(self) -> bool:
        return bool(self.waves) and all(self.arrived[member] for member in self.waves[0].members)

    def due_ns(self, arrivals: list[Arrival]) -> int:
        """When all that the layer of these waited for was here."""
        found_ns = max(arrival.found_ns for arrival in arrivals)
        return found_ns if self.layer else max(found_ns, self.begun_ns)


class FFNLoop(StepLoop):
    """One FFN rank; the first of all is also the conductor of the waves."""

    def __init__(self, half: FFNHalf, pace: Pace | None = None) -> None:
        super().__init__(arrival="a2f", waiting="ffn_wait")
        self.half, self.pace = half, pace
        self.steps = self.rows = 0
        """Waves that passed all layers, and their rows."""
        self._passing_on_ns = 0
        """What the last stage took after its rows were computed. It is no part of what they say of that stage, for then they are gone; the next one's say it."""
        self._instance = self._tp_rank = 0
        self._slots: list[SlotState] = []
        self._turns: deque[int] = deque()
        self._conductor: Conductor | None = None
        self._marks: FFNMarks | None = None
        """On a device that the host runs ahead of."""

    def switch(self, wire: Wire, half: FFNHalf | None = None) -> "Future[float]":
        """Serve in another epoch from now on, with another half where one is given; what is in flight is dropped."""
        return self.call(lambda: self._switch_to(wire, half or self.half))

    def _switch_to(self, wire: Wire, half: FFNHalf) -> float:
        self.half = half
        return self._switch(wire)

    def _enter(self, wire: Wire) -> None:
        slots = wire.epoch.micro_batches
        self._instance, self._tp_rank = wire.epoch.instance_of(wire.rank)
        self._marks = None if self._clock is None else FFNMarks(self._clock, self.recorder.record)
        self._slots = [SlotState(wire.epoch.attention) for _ in range(slots)]
        self._turns = deque(range(slots))
        self._conductor = Conductor(wire.epoch.attention, slots) if wire.rank == wire.epoch.conductor else None

    def _take_back(self) -> None:
        """The attention ranks run again what was under way: nothing here has to be kept."""
        self._slots, self._turns, self._conductor = [], deque(), None

    def _run_stage(self) -> bool:
        if self._marks is not None:
            self._marks.look(time.monotonic_ns())
        slots = self._slots
        slot = next_slot([Ready(i, slots[i].layer, since) for since, i in enumerate(self._turns) if slots[i].ready])
        if slot is None:
            return False
        self._turns.remove(slot)
        self._turns.append(slot)
        self._compute(slot)
        return True

    def _under_way(self) -> bool:
        return any(slot.waves for slot in self._slots)

    # --- messages ---------------------------------------------------------------------------------------------------------

    def _receive(self) -> bool:
        received = False
        while (message := self.wire.mesh.receive()) is not None:
            self._take(message)
            received = True
        return received

    def _take(self, message: Message) -> None:
        header = message.header
        slot = self._slots[header.slot]
        if header.kind is Kind.DISPATCH:
            if header.rows:
                self._record_arrival(header)
            slot.arrived[header.source].append(Arrival(message, self._looked_ns, time.monotonic_ns()))
            self._free_edges(slot)
        elif header.kind is Kind.REDUCE:
            slot.shares[header.source] = message if slot.reduction is not None else message.copied()
            self._reduce(header.slot)
        elif header.kind is Kind.WAVE:
            self._begin(Wave(header.slot, header.step, tuple(message.tensors[0].tolist())))
            message.release()
        else:
            self._conduct(message)

    def _free_edges(self, slot: SlotState) -> None:
        """Rows that are not next, or wait for other ranks' rows, leave the edge's buffer: other slots may go round many times meanwhile."""
        for queue in slot.arrived:
            for i, arrival in enumerate(queue):
                if arrival.message.borrowed and (i > 0 or not slot.ready):
                    queue[i] = arrival._replace(message=arrival.message.copied())

    def _conduct(self, message: Message) -> None:
        header = message.header
        if self._conductor is None or header.kind not in (Kind.STEP, Kind.PARK):
            raise RuntimeError(f"rank {header.source} sent {header.kind.name}, which is not for this FFN rank")
        message.release()
        if header.kind is Kind.STEP:
            self._start(self._conductor.announce(header.source, header.slot, header.rows))
        else:
            self._start(self._conductor.park(header.source, header.slot))

    def _start(self, wave: Wave | None) -> None:
        """As the conductor: tell every FFN rank of a new wave, this one included."""
        if wave is None:
            return
        wire = self.wire
        header = Header(Kind.WAVE, wire.epoch.number, wire.rank, slot=wave.slot, step=wave.number, rows=wave.total_rows)
        for peer in wire.epoch.ffn_ranks:
            if peer != wire.rank:
                wire.mesh.send(peer, header, (torch.tensor(wave.rows, dtype=torch.int32),))
        self._begin(wave)

    def _begin(self, wave: Wave) -> None:
        slot = self._slots[wave.slot]
        slot.waves.append(wave)
        slot.begun_ns = time.monotonic_ns()

    # --- one stage --------------------------------------------------------------------------------------------------------

    def _compute(self, index: int) -> None:
        """One layer of one slot's wave: this rank's share."""
        slot = self._slots[index]
        wave, layer = slot.waves[0], slot.layer
        arrivals = self._take_layer(slot, wave)
        started_ns = max(slot.due_ns(arrivals), self._free_ns)
        rows = sum(arrival.message.header.rows for arrival in arrivals)
        partial = self.half(layer, self._gather(arrivals)) if rows else None
        for arrival in arrivals:
            arrival.message.release()
        if partial is not None:
            hold(self.pace, started_ns, rows)
            computed_ns = time.monotonic_ns()
            if self._marks is not None:
                self._marks.end(index, layer, wave.number, rows, computed_ns)
            self._pass_on(index, wave, arrivals, partial, started_ns)
            self._free_ns = time.monotonic_ns()
            self._passing_on_ns = self._free_ns - computed_ns
            if self._marks is None:
                self._record("ffn", index, layer, wave.number, rows, started_ns)
        self._end_layer(index, slot)

    def _take_layer(self, slot: SlotState, wave: Wave) -> list[Arrival]:
        """The members' messages for the layer that is due, in the order of the attention ranks."""
        arrivals = [slot.arrived[member].popleft() for member in wave.members]
        for arrival in arrivals:
            header = arrival.message.header
            if header.layer != slot.layer:
                raise RuntimeError(f"rank {header.source} is at layer {header.layer} where layer {slot.layer} is due")
        return arrivals

    def _end_layer(self, index: int, slot: SlotState) -> None:
        slot.layer += 1
        if slot.layer == self.half.config.num_hidden_layers:
            slot.layer = 0
            self.rows += slot.waves.popleft().total_rows
            self.steps += 1
            if self._conductor is not None:
                self._start(self._conductor.finish(index))

    def _gather(self, arrivals: list[Arrival]) -> Routed:
        """The rows that have come, in the order of the attention ranks, in the compute dtype, or in 8 bits."""
        parts = [arrival.message.received() for arrival in arrivals if arrival.message.header.rows]
        if self._marks is not None:
            self._marks.begin()
        joined = parts[0] if len(parts) == 1 else tuple(torch.cat(columns) for columns in zip(*parts, strict=True))
        return unpack_rows(joined, self.wire.dtype, self.half.config.dtype, narrow=self.half.takes_narrow)

    def _pass_on(self, index: int, wave: Wave, arrivals: list[Arrival], partial: Tensor, started_ns: int) -> None:
        """Send the other ranks of the instance their rows; return this rank's own once theirs are here."""
        wire, slot = self.wire, self._slots[index]
        layer = slot.layer
        counts = [0] * wire.epoch.attention
        for arrival in arrivals:
            counts[arrival.message.header.source] = arrival.message.header.rows
        if self._marks is None:
            busy_us = (time.monotonic_ns() - started_ns + self._passing_on_ns) // 1000
            queued = {arrival.message.header.source: arrival.queued(started_ns) for arrival in arrivals}
        else:
            busy_us, queued = self._marks.busy_us(layer, sum(counts)), {}
        all_owned = ownership(tuple(counts), wire.epoch.tensor_parallel)
        for tp_rank in sorted({o.tp_rank for o in all_owned}):
            owned = tuple(o for o in all_owned if o.tp_rank == tp_rank)
            rows = _rows_of(partial, owned)
            if tp_rank == self._tp_rank:
                slot.reduction = Reduction(layer, wave.number, owned, rows, busy_us, queued)
                self._reduce(index)
            else:
                header = Header(
                    Kind.REDUCE, wire.epoch.number, wire.rank, slot=index, layer=layer, step=wave.number, rows=len(rows)
                )
                wire.mesh.send(wire.epoch.ffn_rank(self._instance, tp_rank), header, (rows.to(partial_dtype(wire.dtype)),))

    def _reduce(self, index: int) -> None:
        """Sum the instance's shares in rank order and return each attention rank its rows; does nothing until all are here."""
        wire, slot = self.wire, self._slots[index]
        reduction = slot.reduction
        if reduction is None or len(slot.shares) < wire.epoch.tensor_parallel - 1:
            return
        for share in slot.shares.values():
            if share.header.layer != reduction.layer:
                raise RuntimeError(
                    f"rank {share.header.source} reduces layer {share.header.layer} where {reduction.layer} is due"
                )
        total = self._sum_shares(slot, reduction.rows).to(partial_dtype(wire.dtype))
        slot.reduction = None
        place = {"slot": index, "layer": reduction.layer, "step": reduction.step}
        first = 0
        for o in reduction.owned:
            rows = total[first : first + o.stop - o.start]
            first += len(rows)
            span = {"rows": len(rows), "first_row": o.first_row, "sent_ns": self._wall_ns()}
            span |= {"busy_us": reduction.busy_us, **reduction.queued.get(o.attention, {})}
            wire.mesh.send(o.attention, Header(Kind.PARTIAL, wire.epoch.number, wire.rank, **place, **span), (rows,))

    def _sum_shares(self, slot: SlotState, own: Tensor) -> Tensor:
        if not slot.shares:
            return own
        ranks = self.wire.epoch.instance_ranks(self._instance)
        parts = [own if rank == self.wire.rank else slot.shares[rank].received()[0].to(own.dtype) for rank in ranks]
        total = parts[0] + parts[1]
        for part in parts[2:]:
            total += part
        for message in slot.shares.values():
            message.release()
        slot.shares = {}
        return total


def _rows_of(partial: Tensor, owned: tuple[Owned, ...]) -> Tensor:
    if len(owned) == 1:
        return partial[owned[0].start : owned[0].stop]
    return torch.cat([partial[o.start : o.stop] for o in owned])
