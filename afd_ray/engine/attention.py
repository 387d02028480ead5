"""The attention actor's step loop: every micro-batch slot through attention, out to the FFN, back, and on to the next token.

Slots are independent: each goes on to its next token as soon as its own last layer is back, and nothing waits while one can run.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import torch
from torch import Tensor

from afd_ray.engine.boundary import Boundary
from afd_ray.engine.device_times import FlightMarks, StreamMarks
from afd_ray.engine.flight import Flight
from afd_ray.engine.kv_cache import PagedCache
from afd_ray.engine.left_behind import Kept, LeftBehind
from afd_ray.engine.loop import StepLoop, Wire
from afd_ray.engine.moving_in import MovingIn
from afd_ray.engine.pace import Pace, hold
from afd_ray.engine.passage import Begin, HostPassage, Part
from afd_ray.engine.pipeline import Ready, micro_batches_for, next_slot
from afd_ray.engine.request_clocks import RequestClocks
from afd_ray.engine.sampling import sample
from afd_ray.engine.scheduler import Scheduler
from afd_ray.engine.stage_costs import FlightTimes, StageCosts, StageMeter
from afd_ray.handoff.message import Header, Kind, Message
from afd_ray.handoff.routing import RowRouting, row_owners
from afd_ray.handoff.rows import id_dtype, pack_rows
from afd_ray.measured import Flights
from afd_ray.models.step3 import AttentionHalf, Routed
from afd_ray.request import KVTicket, Request, TokenOutput

Publish = Callable[[list[TokenOutput]], None]


class AttentionLoop(StepLoop):
    """One attention rank: it owns its requests and their KV cache."""

    def __init__(
        self,
        half: AttentionHalf,
        cache: PagedCache,
        scheduler: Scheduler,
        publish: Publish,
        pace: Pace | None = None,
        begin: Begin = HostPassage,
    ) -> None:
        """`begin`: takes a micro-batch's chunks on their way, where `half` and `cache` lie."""
        super().__init__(arrival="f2a", waiting="attention_wait")
        self.half, self.cache, self.scheduler, self.pace = half, cache, scheduler, pace
        self._passage = begin
        self.clocks = RequestClocks()
        self.moving_in: MovingIn | None = None
        """What fetches keys and values; None: requests from elsewhere are computed again."""
        self._publish = publish
        self._routing: RowRouting | None = None
        self.expert_loads = torch.zeros(half.config.moe_num_experts, dtype=torch.int64)
        """How many rows chose each expert in this epoch, over all layers; replaced, never changed, at the end of a micro-batch."""
        self._flights: list[Flight | None] = []
        self._before: list[tuple[int, FlightTimes] | None] = []
        """Of each slot the rows and times of its last micro-batch."""
        self._parked: list[bool] = []
        self._work_came = False
        self._boundary = Boundary()
        self._arrivals = 0
        self._steps = 0
        """Micro-batches that were begun."""
        self.steps = 0
        """Micro-batches that passed all layers."""
        self._stream: StreamMarks | None = None
        self._meter = StageMeter()
        self.flights = Flights()
        """Of all micro-batches that passed all layers and whose stages' times are known; replaced, never changed, at the end of one."""
        self.prompt_tokens = 0
        """Computed, over all micro-batches."""

    @property
    def draining(self) -> bool:
        """Whether no new micro-batch is begun."""
        return self._boundary.draining

    @property
    def costs(self) -> StageCosts:
        """What its stages have been measured to take."""
        return self._meter.costs

    def submit(self, request: Request, generated: Sequence[int] = (), ticket: KVTicket | None = None) -> "Future[None]":
        """Queue a request, or go on with one that has `generated` tokens from elsewhere, and maybe its keys and values.

        The future raises ValueError (one line) if it can never be served.
        """
        return self.call(lambda: self._submit(request, generated, ticket))

    def abort(self, request_id: str) -> "Future[None]":
        """Forget a request and free its blocks; unknown ids are ignored."""
        return self.call(lambda: self._abort(request_id))

    def abort_all(self) -> list[str]:
        """On the loop's thread: abort every request, so that none gets another token; gives their ids."""
        ids = [request.id for request, _ in self.scheduler.requests_in_progress()]
        for request_id in ids:
            self._abort(request_id)
        return ids

    def hand_over(self, left: LeftBehind) -> dict[str, Kept | None]:
        """On the loop's thread: as `abort_all`, but what requests hold stays behind; gives what that is by id. At a step boundary it is everything."""
        kept = {request.id: left.keep(request.id) for request, _ in self.scheduler.requests_in_progress()}
        for request_id in kept:
            self._abort(request_id)
        return kept

    def drain(self) -> "Future[None]":
        """Begin no new micro-batch; done at the step boundary, when nothing is in flight and no wave waits for this rank.

        RuntimeError while unlinked, and when `resume`, `switch` or the loss of the epoch comes first.
        """
        reached: Future[None] = Future()
        reached.set_running_or_notify_cancel()  # only the loop ends it
        self.call(lambda: self._drain(reached)).add_done_callback(lambda asked: _hand_on_error(asked, reached))
        return reached

    def resume(self) -> "Future[None]":
        """Begin micro-batches again in the same epoch; harmless when not draining."""
        return self.call(self._resume)

    def give_up(self, reason: str) -> "Future[int]":
        """End every request with this error, if the loop is still unlinked; gives how many there were."""
        return self.call(lambda: self._give_up(reason))

    def abandon(self) -> list[str]:
        """Forget every request, once `run` has ended, those still on their way in too; gives their ids."""
        super().abandon()
        return self._forget_all()

    def _enter(self, wire: Wire) -> None:
        if self.half.shared != wire.epoch.shared_at_attention:
            raise RuntimeError("shared experts must be where the epoch says: with the attention ranks, or with the FFN ranks")
        slots = wire.epoch.micro_batches
        self.scheduler.reslot(slots)
        self.scheduler.epoch = wire.epoch.number
        self._flights, self._before = [None] * slots, [None] * slots
        self._parked = [True] * slots
        experts, device = wire.epoch.expert_map(self.half.config), wire.mesh.device
        self._routing = RowRouting(experts, wire.epoch.routed, None if wire.epoch.routed else device)
        self.expert_loads = torch.zeros_like(self.expert_loads)
        self._stream = None if self._clock is None else StreamMarks(self._clock)
        self._meter.forget_ffn()
        self._work_came = True
        if wire.epoch.adaptive:
            self.scheduler.use(1)

    def _take_back(self) -> None:
        """Micro-batches in flight are scheduled again: their rows write the same keys and values a second time."""
        self.scheduler.cancel_all()
        self._flights = [None] * len(self._flights)
        self._boundary.end("the epoch ended before the step boundary")

    def _run_stage(self) -> bool:
        filled = self._work_came and self._fill_idle_slots()
        slot = next_slot([Ready(i, f.layer, f.since) for i, f in enumerate(self._flights) if f and not f.awaited])
        if slot is not None:
            self._advance(slot)
        return filled or slot is not None

    def _under_way(self) -> bool:
        return any(flight is not None for flight in self._flights)

    def _submit(self, request: Request, generated: Sequence[int] = (), ticket: KVTicket | None = None) -> None:
        self.scheduler.add(request, generated, self._worth(request, generated, ticket))
        self.clocks.start(request.id, time.monotonic(), continued=bool(generated))

    def _abort(self, request_id: str) -> None:
        self.scheduler.abort(request_id)
        self.clocks.forget(request_id)

    def _worth(self, request: Request, generated: Sequence[int], ticket: KVTicket | None) -> KVTicket | None:
        """What to fetch for a request that has begun elsewhere."""
        if self.moving_in is None or not (generated or ticket):
            return None
        return self.moving_in.weigh(ticket, len(request.prompt_token_ids) + len(generated), self.costs)

    def _take_commands(self) -> bool:
        """Whatever was told may be work for an idle slot, or free blocks that one waits for."""
        told = super()._take_commands()
        self._work_came = self._work_came or told
        return told

    def _forget_all(self) -> list[str]:
        self._take_back()
        self.clocks.clear()
        return [request.id for request, _ in self.scheduler.drain_all()]

    def _give_up(self, reason: str) -> int:
        ids = self._forget_all() if self._wire is None else []
        if ids:
            self._publish([TokenOutput(request_id, None, finish_reason="error", error=reason) for request_id in ids])
        return len(ids)

    # --- the step boundary ------------------------------------------------------------------------------------------------

    def _drain(self, reached: "Future[None]") -> None:
        if self._wire is None:
            raise RuntimeError("the step loop has no epoch to drain")
        self._boundary.ask(reached)  # the next stage looks whether anything is in flight

    def _resume(self) -> None:
        self._boundary.end("resumed before the step boundary")
        if self._wire is not None:
            self._idle_since_ns = None

    def _note_boundary(self) -> None:
        """Draining: an idle slot is parked, so when all are idle this is the boundary."""
        if self._under_way():
            return
        if self._idle_since_ns is None:
            self._idle_since_ns = time.monotonic_ns()
        self._boundary.reach()

    # --- messages ---------------------------------------------------------------------------------------------------------

    def _receive(self) -> bool:
        mesh = self.wire.mesh
        received = False
        while (message := mesh.receive()) is not None:
            self._take_partial(message)
            received = True
        return received

    def _take_partial(self, message: Message) -> None:
        header = message.header
        flight = self._flights[header.slot] if header.kind is Kind.PARTIAL else None
        if flight is None or flight.layer != header.layer or flight.awaited == 0:
            what = f"{header.kind.name} of slot {header.slot} layer {header.layer}"
            raise RuntimeError(f"rank {header.source} sent {what}, which is not awaited")
        self._record_arrival(header)
        flight.awaited -= 1
        # Only what completes the set stays in its edge's buffer: the slot may wait long for the others.
        flight.partials.append(message if flight.awaited == 0 else message.copied())
        if flight.awaited == 0:
            flight.due_ns = time.monotonic_ns()
            if flight.marks is None:
                round_trip_us = (flight.due_ns - flight.dispatched_ns) / 1000
                unseen_us = header.unseen_us + (flight.due_ns - self._looked_ns) / 1000
                flight.observed.returned(round_trip_us - header.queued_us, header.busy_us, unseen_us)
            self._next_layer(flight)

    def _next_layer(self, flight: Flight) -> None:
        """The layer's FFN is done: the flight is ready, behind those that were ready before."""
        flight.layer += 1
        self._arrivals += 1
        flight.since = self._arrivals

    def _fill_idle_slots(self) -> bool:
        self._work_came = False
        if self._boundary.draining:
            self._note_boundary()
            return False
        filled = False
        for slot, flight in enumerate(self._flights):
            if flight is None and self.scheduler.has_work:
                filled = self._begin(slot, time.monotonic_ns()) or filled
        return filled

    def _begin(self, slot: int, started_ns: int) -> bool:
        """Put a new micro-batch into an idle slot; False (and the slot parked) when there is nothing for it."""
        batch = None if self._boundary.draining else self.scheduler.schedule(slot)
        if self.moving_in is not None:
            self.moving_in.fetch_admitted(self.call)
        if batch is None:
            self._park(slot)
            return False
        self.clocks.schedule((chunk.sequence.id for chunk in batch.chunks if not chunk.start), time.monotonic())
        self._steps += 1
        marks = None if self._stream is None else FlightMarks(self._stream)
        flight = Flight(batch, self._passage(self.half, self.cache, batch.chunks, slot), self._steps, marks)
        self._flights[slot] = flight
        self._parked[slot] = False
        self._announce(slot, flight)
        self._attend(slot, flight, started_ns)
        return True

    def _announce(self, slot: int, flight: Flight) -> None:
        wire = self.wire
        header = Header(Kind.STEP, wire.epoch.number, wire.rank, slot=slot, step=flight.step, rows=flight.rows)
        wire.mesh.send(wire.epoch.conductor, header)

    def _park(self, slot: int) -> None:
        if not self._parked[slot]:
            wire = self.wire
            wire.mesh.send(wire.epoch.conductor, Header(Kind.PARK, wire.epoch.number, wire.rank, slot=slot))
            self._parked[slot] = True

    def _advance(self, slot: int) -> None:
        """The next stage of a slot whose partial results are all here."""
        flight = self._flights[slot]
        assert flight is not None
        started_ns = max(flight.due_ns, self._free_ns)
        self._add_partials(flight)
        if flight.layer < self.half.config.num_hidden_layers:
            self._attend(slot, flight, started_ns)
        else:
            self._finish(slot, flight, started_ns)

    def _add_partials(self, flight: Flight) -> None:
        """In the order of the senders' ranks, so that the sum never depends on arrival."""
        messages = sorted(flight.partials, key=lambda m: (m.header.source, m.header.first_row))
        marks = flight.marks
        if marks is not None:
            marks.due(self._steps)
        parts = [self._part(flight, message) for message in messages]
        if marks is not None:
            marks.begin([message.header.busy_us for message in messages])
        flight.passage.add_parts(parts)
        for message in messages:
            message.release()
        flight.partials = []

    def _part(self, flight: Flight, message: Message) -> Part:
        """What a rank returned for some of the rows that its instance got."""
        (sums,) = message.received()
        instance = self.wire.epoch.instance_of(message.header.source)[0]
        returned = slice(message.header.first_row, message.header.first_row + len(sums))
        rows = flight.sent[instance]
        return Part(instance, returned if rows is None else rows[returned], sums)

    def _attend(self, slot: int, flight: Flight, started_ns: int) -> None:
        routed = flight.passage.attend(flight.layer)
        hold(self.pace, started_ns, flight.rows, flight.context_tokens)
        self._dispatch(slot, flight, routed)
        flight.dispatched_ns = time.monotonic_ns()
        if flight.marks is not None:
            flight.marks.send(self._steps if self._flights.count(None) == len(self._flights) - 1 else None)
        flight.passage.share(flight.layer, routed.hidden)  # while the FFN ranks compute the other experts
        self._free_ns = time.monotonic_ns()
        if flight.marks is not None:
            flight.marks.end()
            return
        flight.observed.attended((self._free_ns - started_ns) / 1000)
        self._record("attention", slot, flight.layer, flight.step, flight.rows, started_ns)

    def _dispatch(self, slot: int, flight: Flight, routed: Routed) -> None:
        """One layer's rows to the FFN ranks: all of an instance's ranks get the same, an instance that none goes to a bare header."""
        wire, routing = self.wire, self._routing
        assert routing is not None
        routed, ids = self._leaving(flight, routed)
        tensors = pack_rows(routed, wire.dtype, id_dtype(routing.ids))
        flight.sent = routing.rows_by_instance(ids, flight.rows)
        flight.awaited = 0
        place = {"slot": slot, "layer": flight.layer, "step": flight.step}
        for instance, rows in enumerate(flight.sent):
            count = flight.rows if rows is None else len(rows)
            flight.awaited += len(row_owners(count, wire.rank, wire.epoch.attention, wire.epoch.tensor_parallel))
            header = Header(Kind.DISPATCH, wire.epoch.number, wire.rank, rows=count, sent_ns=self._wall_ns(), **place)
            parts = _rows_of(tensors, rows)
            for peer in wire.epoch.instance_ranks(instance):
                wire.mesh.send(peer, header, parts)

    def _leaving(self, flight: Flight, routed: Routed) -> tuple[Routed, Tensor | None]:
        """The rows where the links take them from, with ids as they go on the wire; and these for the routing.

        To device memory the host waits for the ids alone, and only where rows take ways of their own.
        """
        wire, routing = self.wire, self._routing
        assert routing is not None
        device = wire.mesh.device
        if device is None:
            routed = flight.passage.to_host(routed)
        if routed.experts is None:
            return routed, None
        experts = routed.experts
        if device is not None:
            experts = experts.clone()  # a captured step gives the next layer's in the same place
            if wire.epoch.routed:
                experts = experts.cpu().long()
                wire.mesh.settle()
            elif routing.renumbers:
                # Whatever a broken epoch left in the rows.
                experts = experts.long().clamp_(0, self.half.config.moe_num_experts - 1)
        flight.chosen.append(experts)
        ids = routing.choose_copies(experts)
        return routed._replace(experts=ids if device is None else ids.to(device)), ids

    def _finish(self, slot: int, flight: Flight, started_ns: int) -> None:
        """Sample after the last layer, publish, and give the slot its next micro-batch."""
        sampling = [chunk.sequence for chunk in flight.batch.chunks if chunk.samples]
        logits = flight.passage.logits() if sampling else None
        if flight.marks is not None:
            flight.marks.end()
        flight.chosen = [torch.cat(flight.chosen).cpu()] if flight.chosen else []
        self.wire.mesh.settle()  # else rows that never came would count as computed
        settled_ns = time.monotonic_ns()
        sampled = [] if logits is None else sample(logits, sampling)
        outputs = self.scheduler.complete(flight.batch, sampled)
        self._flights[slot] = None
        self._free_ns = ended_ns = time.monotonic_ns()
        self._count(flight)
        if flight.marks is None:
            flight.observed.attended((self._free_ns - started_ns) / 1000)
            self._measure(flight)
            self._record("head", slot, flight.layer, flight.step, flight.rows, started_ns)
        if outputs:
            self.clocks.note(outputs, time.monotonic())
            self._publish(outputs)
        wire = self._wire
        self._take_commands()
        if self._wire is not wire:
            return
        if self._running:
            if slot == 0:
                self._replan()
            self._begin(slot, self._free_ns)
            self._work_came = True
        if flight.marks is not None:  # while the device has the next one to compute
            self._observe(flight, flight.marks, settled_ns, ended_ns)

    def _replan(self) -> None:
        """Balance by what stages cost by now, and use as many slots as pay."""
        scheduler, costs = self.scheduler, self.costs
        scheduler.costs = costs.row
        if self.wire.epoch.adaptive:
            budget, slots = scheduler.token_budget, scheduler.slots
            scheduler.use(micro_batches_for(scheduler.load, costs, budget, slots, scheduler.in_use))

    # --- measuring ----------------------------------------------------------------------------------------------------------

    def _observe(self, flight: Flight, marks: FlightMarks, settled_ns: int, ended_ns: int) -> None:
        """What the device says of it. The host had waited for that, and then ended the head."""
        slot, step, rows = flight.batch.slot, flight.step, flight.rows
        stages = marks.stages()
        host_us = (ended_ns - settled_ns) / 1000
        for layer, stage in enumerate(stages):
            is_head = layer == flight.layer
            flight.observed.attended(stage.busy_us + (host_us if is_head else 0))
            end_ns = settled_ns - round(stage.ago_us * 1000)
            start_ns = end_ns - round(stage.busy_us * 1000)
            if stage.waited_us:
                self.recorder.record(self._waiting, 0, 0, 0, 0, start_ns - round(stage.waited_us * 1000), start_ns)
            name = "head" if is_head else "attention"
            self.recorder.record(name, slot, layer, step, rows, start_ns, ended_ns if is_head else end_ns)
        if marks.tell_of_ffn(flight.observed, alone=self.wire.epoch.attention == 1):
            self._measure(flight)
        else:
            self._meter.add_attention(flight.observed, rows, flight.context_tokens, flight.layer)

    def _measure(self, flight: Flight) -> None:
        """What it took on its way through the layers."""
        times, rows, context = flight.observed, flight.rows, flight.context_tokens
        self._meter.add(times, rows, context, flight.layer)
        mean_us = times.attention / flight.layer, times.ffn / flight.layer
        by_layer_us = tuple(times.attention_by_layer), tuple(times.ffn_by_layer)
        slot = flight.batch.slot
        before, self._before[slot] = self._before[slot], (rows, times)
        changes = times.changes(before[1]) if before is not None and before[0] == rows else ()
        self.flights = self.flights.plus(
            Flights(1, rows, context, *mean_us, times.carries, times.carried, *by_layer_us, *changes)
        )

    def _count(self, flight: Flight) -> None:
        """It has passed all layers."""
        self.steps += 1
        self.prompt_tokens += flight.batch.prompt_tokens
        if flight.chosen:
            chosen = torch.cat(flight.chosen).flatten()
            self.expert_loads = self.expert_loads + torch.bincount(chosen, minlength=len(self.expert_loads))


def _rows_of(tensors: tuple[Tensor, ...], rows: Tensor | None) -> tuple[Tensor, ...]:
    if rows is None:
        return tensors
    if not len(rows):
        return ()
    rows = rows.to(tensors[0].device)
    return tuple([_picked(tensor, rows) for tensor in tensors])


def _picked(tensor: Tensor, rows: Tensor) -> Tensor:
    """Bytes as such: not every torch picks rows in e4m3 on every device."""
    if tensor.itemsize == 1:
        return tensor.view(torch.uint8).index_select(0, rows).view(tensor.dtype)
    return tensor.index_select(0, rows)


def _hand_on_error(asked: "Future[None]", reached: "Future[None]") -> None:
    error = asked.exception()
    if error is not None:
        reached.set_exception(error)
