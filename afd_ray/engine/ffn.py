"""The FFN actor's step loop: gather a wave's rows, compute this rank's share of the layer, reduce inside the instance, return.

Stateless between steps. Slots are independent and nothing here waits for one of them while another can run.
"""

import time
from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from afd_ray.engine.loop import StepLoop, Wire
from afd_ray.engine.pace import Pace, hold
from afd_ray.engine.waves import Conductor, Wave
from afd_ray.handoff.message import Header, Kind, Message
from afd_ray.handoff.routing import row_owners
from afd_ray.models.step3 import FFNHalf, Routed


class Owned(NamedTuple):
    """Rows of one attention rank that one rank of the instance reduces and returns."""

    attention: int
    tp_rank: int
    first_row: int
    """In the attention rank's micro-batch."""
    start: int
    stop: int
    """In the wave's concatenated rows."""


class Reduction(NamedTuple):
    """This rank's own rows of one layer, waiting for the other ranks of the instance."""

    layer: int
    step: int
    owned: tuple[Owned, ...]
    rows: Tensor
    """[N, H] of `owned`, as computed here."""
    busy_us: int
    queued_us: dict[int, int]
    """By attention rank."""


class SlotState:
    """One micro-batch slot as one FFN rank sees it."""

    def __init__(self) -> None:
        self.wave: Wave | None = None
        self.layer = 0
        self.owned: tuple[Owned, ...] = ()
        self.arrived: dict[int, Message] = {}
        self.since_ns: dict[int, int] = {}
        self.reduction: Reduction | None = None
        self.shares: dict[int, Message] = {}

    @property
    def ready(self) -> bool:
        return self.wave is not None and all(member in self.arrived for member in self.wave.members)


class FFNLoop(StepLoop):
    """One FFN rank; the first of all is also the conductor of the waves."""

    def __init__(self, half: FFNHalf, pace: Pace | None = None) -> None:
        super().__init__(arrival="a2f", waiting="ffn_wait")
        self.half, self.pace = half, pace
        self._instance = self._tp_rank = 0
        self._slots: list[SlotState] = []
        self._turns: deque[int] = deque()
        self._conductor: Conductor | None = None

    def _enter(self, wire: Wire) -> None:
        slots = wire.epoch.micro_batches
        self._instance, self._tp_rank = wire.epoch.instance_of(wire.rank)
        self._slots = [SlotState() for _ in range(slots)]
        self._turns = deque(range(slots))
        self._conductor = Conductor(wire.epoch.attention, slots) if wire.rank == wire.epoch.conductor else None

    def _run_stage(self) -> bool:
        slot = next((slot for slot in self._turns if self._slots[slot].ready), None)
        if slot is None:
            return False
        self._turns.remove(slot)
        self._turns.append(slot)
        self._compute(slot)
        return True

    def _under_way(self) -> bool:
        return any(slot.wave is not None for slot in self._slots)

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
            self._record_arrival(header)
            if header.source in slot.arrived:
                raise RuntimeError(f"rank {header.source} sent slot {header.slot} rows twice")
            slot.arrived[header.source] = message
            slot.since_ns[header.source] = self._looked_ns
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
        """Rows that wait for other ranks' rows leave the edge's buffer: other slots may go round many times meanwhile."""
        if not slot.ready:
            slot.arrived = {rank: message.copied() if message.borrowed else message for rank, message in slot.arrived.items()}

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
        if slot.wave is not None:
            raise RuntimeError(f"wave {wave.number} of slot {wave.slot} came before wave {slot.wave.number} was over")
        slot.wave, slot.layer, slot.owned = wave, 0, self._ownership(wave)

    def _ownership(self, wave: Wave) -> tuple[Owned, ...]:
        epoch = self.wire.epoch
        owned: list[Owned] = []
        offset = 0
        for member in wave.members:
            for part in row_owners(wave.rows[member], member, epoch.attention, epoch.tensor_parallel):
                owned.append(Owned(member, part.tp_rank, part.start, offset + part.start, offset + part.stop))
            offset += wave.rows[member]
        return tuple(owned)

    # --- one stage --------------------------------------------------------------------------------------------------------

    def _compute(self, index: int) -> None:
        """One layer of one slot's wave: this rank's share."""
        started_ns = time.monotonic_ns()
        slot = self._slots[index]
        wave, layer = slot.wave, slot.layer
        assert wave is not None
        messages = [slot.arrived.pop(member) for member in wave.members]
        partial = self.half(layer, self._gather(messages, layer))
        for message in messages:
            message.release()
        hold(self.pace, started_ns, wave.total_rows)
        self._pass_on(index, slot, wave, partial, started_ns)
        self._record("ffn", index, layer, wave.number, wave.total_rows, started_ns)
        slot.layer += 1
        if slot.layer == self.half.config.num_hidden_layers:
            slot.wave = None
            if self._conductor is not None:
                self._start(self._conductor.finish(index))

    def _gather(self, messages: list[Message], layer: int) -> Routed:
        """The wave's rows in the order of the attention ranks, in the compute dtype."""
        for message in messages:
            if message.header.layer != layer:
                raise RuntimeError(f"rank {message.header.source} is at layer {message.header.layer} where layer {layer} is due")
        dtype = self.half.config.dtype
        parts = [message.tensors for message in messages]
        joined = parts[0] if len(parts) == 1 else tuple(torch.cat(columns) for columns in zip(*parts, strict=True))
        hidden = joined[0].to(dtype)
        return Routed(hidden, None, None) if len(joined) == 1 else Routed(hidden, joined[1], joined[2].to(dtype))

    def _pass_on(self, index: int, slot: SlotState, wave: Wave, partial: Tensor, started_ns: int) -> None:
        """Send the other ranks of the instance their rows; return this rank's own once theirs are here."""
        wire, layer = self.wire, slot.layer
        busy_us = (time.monotonic_ns() - started_ns) // 1000
        for tp_rank in sorted({o.tp_rank for o in slot.owned}):
            owned = tuple(o for o in slot.owned if o.tp_rank == tp_rank)
            rows = _rows_of(partial, owned)
            if tp_rank == self._tp_rank:
                queued_us = {o.attention: (started_ns - slot.since_ns[o.attention]) // 1000 for o in owned}
                slot.reduction = Reduction(layer, wave.number, owned, rows, busy_us, queued_us)
                self._reduce(index)
            else:
                header = Header(
                    Kind.REDUCE, wire.epoch.number, wire.rank, slot=index, layer=layer, step=wave.number, rows=len(rows)
                )
                wire.mesh.send(wire.epoch.ffn_rank(self._instance, tp_rank), header, (rows.to(wire.dtype),))

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
        total = self._sum_shares(slot, reduction.rows).to(wire.dtype)
        slot.reduction = None
        place = {"slot": index, "layer": reduction.layer, "step": reduction.step}
        first = 0
        for o in reduction.owned:
            rows = total[first : first + o.stop - o.start]
            first += len(rows)
            span = {"rows": len(rows), "first_row": o.first_row, "sent_ns": self._wall_ns()}
            span |= {"busy_us": reduction.busy_us, "queued_us": reduction.queued_us[o.attention]}
            wire.mesh.send(o.attention, Header(Kind.PARTIAL, wire.epoch.number, wire.rank, **place, **span), (rows,))

    def _sum_shares(self, slot: SlotState, own: Tensor) -> Tensor:
        if not slot.shares:
            return own
        ranks = self.wire.epoch.instance_ranks(self._instance)
        parts = [own if rank == self.wire.rank else slot.shares[rank].tensors[0].to(own.dtype) for rank in ranks]
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
