"""Continuous batching: which rows each micro-batch computes, and what becomes of the tokens that it chose."""

from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Many

from afd_ray.engine.kv_cache import BlockAllocator
from afd_ray.engine.pipeline import Load
from afd_ray.engine.sampling import Sampled
from afd_ray.engine.sequence import Chunk, MicroBatch, Sequence
from afd_ray.engine.shares import LEAST_PREFILL, ROWS_ALONE, Share
from afd_ray.engine.stage_costs import CostLine
from afd_ray.request import FinishReason, KVTicket, Request, TokenOutput


class Scheduler:
    """Decides what runs: `schedule` a slot, compute its rows, `complete` it; slots may complete in any order.

    The oldest admitted sequence can always go on: for its next block the youngest idle one gives up its own, and starts over later from
    its prompt and the tokens it has. So work never deadlocks, and no token is lost or repeated.

    Micro-batches are equal in predicted time, not in rows: a slot leaves what exceeds its share to slots that have less. What was left
    goes first at the next turn, and goes in any case when each slot has had one.
    """

    def __init__(
        self,
        *,
        allocator: BlockAllocator,
        slots: int,
        max_tokens_per_micro_batch: int,
        max_running_requests: int,
        max_context: int,
        eos_token_ids: tuple[int, ...],
    ) -> None:
        _at_least_1("slots", slots)
        _at_least_1("max_tokens_per_micro_batch", max_tokens_per_micro_batch)
        _at_least_1("max_running_requests", max_running_requests)
        self.allocator, self.slots, self.in_use = allocator, slots, slots
        self.token_budget, self.max_running = max_tokens_per_micro_batch, max_running_requests
        self.max_context, self.eos_token_ids = max_context, frozenset(eos_token_ids)
        self.costs: CostLine | None = None
        """What a row of a micro-batch takes on its way through a layer; None: not known, rows count alike."""
        self.preemptions = 0
        self.epoch = 0
        """What its tokens say that they were computed in."""
        self._waiting: deque[Sequence] = deque()
        self._running: dict[str, Sequence] = {}  # admission order
        self._idle: dict[str, Sequence] = {}  # running and not in flight, least recently scheduled first
        self._arriving: dict[str, Sequence] = {}  # have blocks; their keys and values are fetched from another actor
        self._in_flight: dict[int, MicroBatch] = {}
        self._decode_turn = False

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def in_flight(self) -> int:
        """Micro-batches scheduled and not yet completed."""
        return len(self._in_flight)

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._arriving or self._waiting)

    @property
    def kv_used(self) -> int:
        return self.allocator.used

    @property
    def kv_total(self) -> int:
        return self.allocator.total

    @property
    def context_tokens(self) -> int:
        """Cached tokens of the running requests. May be read by another thread."""
        return sum(sequence.computed for sequence in list(self._running.values()))

    @property
    def load(self) -> Load:
        """What there is to run, admitted or not."""
        decoding = [sequence for sequence in self._running.values() if sequence.decodes]
        prefill = sum(s.remaining for s in self._running.values() if not s.decodes) + sum(s.to_prefill for s in self._waiting)
        requests = len(self._running) + len(self._arriving) + len(self._waiting)
        return Load(requests, len(decoding), sum(s.computed for s in decoding), prefill)

    @property
    def context_limit(self) -> int:
        """Tokens at which a sequence ends: the model's context, or what the whole cache holds."""
        return min(self.max_context, self.allocator.total * self.allocator.block_size)

    @property
    def sequences(self) -> list[Sequence]:
        """Every unfinished sequence: running in order of admission, arriving, then waiting."""
        return [*self._running.values(), *self._arriving.values(), *self._waiting]

    @property
    def to_fetch(self) -> list[Sequence]:
        """Arriving sequences that have a ticket still. Who takes it fetches the keys and values into their blocks, and calls `arrived`."""
        return [sequence for sequence in self._arriving.values() if sequence.ticket is not None]

    def add(self, request: Request, generated: Many[int] = (), ticket: KVTicket | None = None) -> None:
        """Queue a request, or go on with one that has `generated` tokens from elsewhere; those go ahead of requests not begun.

        `ticket`: once it has blocks, the keys and values of so many of its tokens, not all, are to be fetched. Raises ValueError, one line, when it can never fit or its id is in use.
        """
        self._refuse_unfit(request, len(generated))
        sequence = Sequence(request, generated, ticket)
        if not generated:
            self._waiting.append(sequence)
            return
        place = next((i for i, other in enumerate(self._waiting) if not other.output_count), len(self._waiting))
        self._waiting.insert(place, sequence)

    def abort(self, request_id: str) -> bool:
        """Forget a request; False when it is not here. If it is in flight or arriving, its blocks are freed when that is over."""
        sequence = self._running.get(request_id) or self._arriving.get(request_id)
        if sequence is None:
            return self._abort_waiting(request_id)
        if sequence.aborted:
            return False
        sequence.aborted = True
        if request_id in self._idle:
            self._release(sequence)
        return True

    def detach(self, request_id: str) -> Sequence | None:
        """Forget a request, and leave its blocks to the caller, who frees them; None (and nothing done) if it is in flight or has nothing computed."""
        sequence = self._idle.get(request_id)
        if sequence is None or not sequence.computed:
            return None
        del self._running[request_id], self._idle[request_id]
        return sequence

    def arrived(self, request_id: str, positions: int) -> None:
        """The fetch is over: so many tokens' keys and values are in the sequence's blocks. 0: it failed, and all are computed here."""
        sequence = self._arriving.pop(request_id)
        if sequence.aborted:
            self.allocator.free(sequence.block_table)
            return
        sequence.computed = positions
        self._running[request_id] = self._idle[request_id] = sequence

    def schedule(self, slot: int) -> MicroBatch | None:
        """The rows that a free slot computes next: a fair share of decode rows, then prefill; None if idle or not in use."""
        if not 0 <= slot < self.slots:
            raise ValueError(f"slot must be from 0 to {self.slots - 1}, got {slot}")
        if slot in self._in_flight:
            raise ValueError(f"slot {slot} is still in flight")
        if slot >= self.in_use:
            return None
        self._admit()
        share = self._share(slot)
        chunks = self._decode_chunks(share)
        chunks += self._prefill_chunks(self._prefill_room(len(chunks), share))
        if not chunks:
            return None
        batch = MicroBatch(slot, tuple(chunks))
        self._in_flight[slot] = batch
        return batch

    def complete(self, batch: MicroBatch, sampled: list[Sampled]) -> list[TokenOutput]:
        """Take in a computed micro-batch: one Sampled for each chunk that samples, in order; gives the new tokens and who ended."""
        expected = sum(chunk.samples for chunk in batch.chunks)
        if len(sampled) != expected:
            raise ValueError(f"sampled must hold {expected} tokens for {batch}, got {len(sampled)}")
        self._land(batch)
        outputs = []
        tokens = iter(sampled)
        for chunk in batch.chunks:
            token = next(tokens) if chunk.samples else None
            chunk.sequence.computed = chunk.start + chunk.count
            if chunk.sequence.aborted:
                self._release(chunk.sequence)
            elif token is not None:
                outputs.append(self._append(chunk.sequence, token))
        return outputs

    def cancel(self, batch: MicroBatch) -> None:
        """Take back a micro-batch whose step was interrupted: its rows are scheduled again, aborted sequences are freed."""
        self._land(batch)
        for chunk in batch.chunks:
            if chunk.sequence.aborted:
                self._release(chunk.sequence)

    def cancel_all(self) -> None:
        """Take back every micro-batch in flight, whatever became of its step."""
        for batch in list(self._in_flight.values()):
            self.cancel(batch)

    def reslot(self, slots: int) -> None:
        """Change the number of slots, all of them in use; nothing may be in flight."""
        _at_least_1("slots", slots)
        self._require_landed("reslot")
        self.slots = self.in_use = slots

    def use(self, slots: int) -> None:
        """Schedule the first so many slots from now on; a micro-batch in flight in another one is its last."""
        if not 1 <= slots <= self.slots:
            raise ValueError(f"slots in use must be from 1 to {self.slots}, got {slots}")
        self.in_use = slots

    def requests_in_progress(self) -> list[tuple[Request, tuple[int, ...]]]:
        """Every unfinished request with the tokens generated for it, oldest first: what `add` takes elsewhere."""
        return [(s.request, tuple(s.output_token_ids)) for s in self.sequences if not s.aborted]

    def drain_all(self) -> list[tuple[Request, tuple[int, ...]]]:
        """`requests_in_progress`, and forget them all and free their blocks; nothing may be in flight."""
        self._require_landed("drain_all")
        progress = self.requests_in_progress()
        for sequence in self._running.values():
            self.allocator.free(sequence.block_table)
        for sequence in self._arriving.values():
            sequence.aborted = True  # its blocks are being written to
        self._waiting.clear()
        self._running.clear()
        self._idle.clear()
        return progress

    def _refuse_unfit(self, request: Request, generated: int) -> None:
        prompt, limit = len(request.prompt_token_ids), self.context_limit
        if prompt < 1:
            raise ValueError("prompt must hold at least 1 token, got 0")
        if prompt + generated + 1 > limit:
            raise ValueError(
                f"prompt must leave room for a token in the context of {limit} tokens, got {prompt + generated} tokens"
            )
        if request.params.max_tokens is not None and generated >= request.params.max_tokens:
            raise ValueError(f"generated must be fewer than max_tokens ({request.params.max_tokens}), got {generated} tokens")
        if request.id in self._running or request.id in self._arriving or any(request.id == s.id for s in self._waiting):
            raise ValueError(f"request id must be new, got {request.id}, which is in progress")

    def _require_landed(self, what: str) -> None:
        if self._in_flight:
            raise ValueError(f"{what} needs every micro-batch completed or cancelled, slots in flight: {sorted(self._in_flight)}")

    def _abort_waiting(self, request_id: str) -> bool:
        sequence = next((s for s in self._waiting if s.id == request_id), None)
        if sequence is not None:
            self._waiting.remove(sequence)
        return sequence is not None

    def _admit(self) -> None:
        """First come, first served. A sequence gets blocks for all its tokens at once, so that no prefill stalls half way."""
        while self._waiting and (admitted := len(self._running) + len(self._arriving)) < self.max_running:
            sequence = self._waiting[0]
            needed = self.allocator.blocks_for(len(sequence.token_ids))
            # A block of headroom for each running sequence, lest the newcomer be preempted before it has begun.
            if needed + admitted > self.allocator.available:
                return
            blocks = self.allocator.allocate(needed)
            assert blocks is not None
            sequence.block_table = blocks
            self._waiting.popleft()
            if sequence.ticket is not None:
                self._arriving[sequence.id] = sequence
            else:
                self._running[sequence.id] = self._idle[sequence.id] = sequence

    def _share(self, slot: int) -> Share:
        others = [self._in_flight.get(other) for other in range(self.in_use) if other != slot]
        return Share(self._running.values(), others, self.costs or ROWS_ALONE)

    def _decode_chunks(self, share: Share) -> list[Chunk]:
        """Rows left over at an earlier turn first, then the costliest, until the share is full and the rest fits other slots."""
        candidates = [sequence for sequence in self._idle.values() if sequence.decodes]
        candidates.sort(key=lambda sequence: (-sequence.passed_over, -share.row_us(sequence)))
        chunks: list[Chunk] = []
        room = self._decode_room()
        for sequence in candidates:
            if len(chunks) == room:
                break
            due = not chunks or sequence.passed_over >= self.in_use - 1 or share.wants(sequence)
            # A preemption below may have taken the sequence from the idle ones.
            if due and sequence.id in self._idle and self._grow(sequence):
                chunks.append(self._take(sequence, 1))
                share.take(sequence)
        for sequence in candidates:
            sequence.passed_over = sequence.passed_over + 1 if sequence.id in self._idle else 0
        return chunks

    def _decode_room(self) -> int:
        """Decode rows for this micro-batch at most: the budget, but for a part of it that is left to prefill that waits."""
        if all(sequence.decodes for sequence in self._idle.values()):
            return self.token_budget
        if self.token_budget > 1:
            return self.token_budget - max(1, self.token_budget // 4)
        self._decode_turn = not self._decode_turn  # a budget of one row: they take turns
        return self.token_budget if self._decode_turn else 0

    def _prefill_room(self, decode_rows: int, share: Share) -> int:
        """Prefill rows for this micro-batch at most: the budget, and what stretches it no further than allowed where others decode."""
        room = self.token_budget - decode_rows
        stretch = share.prefill_rows() if self.costs is not None else None
        return room if stretch is None else min(room, max(stretch, self.token_budget // LEAST_PREFILL, 1))

    def _prefill_chunks(self, budget: int) -> list[Chunk]:
        """First come, first served: a prompt that is half done goes on before the next begins, so that first tokens come one by one."""
        chunks: list[Chunk] = []
        for sequence in [s for s in self._running.values() if s.id in self._idle and not s.decodes]:
            if not budget:
                break
            chunks.append(self._take(sequence, min(budget, sequence.remaining)))
            budget -= chunks[-1].count
        return chunks

    def _take(self, sequence: Sequence, count: int) -> Chunk:
        del self._idle[sequence.id]
        return Chunk(sequence, sequence.computed, count, samples=count == sequence.remaining)

    def _grow(self, sequence: Sequence) -> bool:
        """Room for one more token, taken from idle sequences admitted later if need be; False: it has to wait for those in flight."""
        while self.allocator.blocks_for(sequence.computed + 1) > len(sequence.block_table):
            blocks = self.allocator.allocate(1)
            if blocks is not None:
                sequence.block_table += blocks
            elif not self._preempt_younger(sequence):
                return False
        return True

    def _preempt_younger(self, sequence: Sequence) -> bool:
        for victim in reversed(self._running.values()):
            if victim is sequence:
                return False
            if victim.id in self._idle:
                self._release(victim)
                victim.computed = victim.passed_over = 0
                self._waiting.appendleft(victim)
                self.preemptions += 1
                return True
        return False

    def _land(self, batch: MicroBatch) -> None:
        if self._in_flight.get(batch.slot) is not batch:
            raise ValueError(f"not in flight: {batch}")
        del self._in_flight[batch.slot]
        self._idle.update((chunk.sequence.id, chunk.sequence) for chunk in batch.chunks)

    def _append(self, sequence: Sequence, sampled: Sampled) -> TokenOutput:
        if sampled.error is not None or sampled.token_id is None:
            self._release(sequence)
            return TokenOutput(sequence.id, None, finish_reason="error", error=sampled.error)
        sequence.token_ids.append(sampled.token_id)
        reason = finish_reason(sequence, self.eos_token_ids, self.context_limit)
        if reason is not None:
            self._release(sequence)
        return TokenOutput(sequence.id, sampled.token_id, sampled.logprob, sampled.top_logprobs, reason, epoch=self.epoch)

    def _release(self, sequence: Sequence) -> None:
        self.allocator.free(sequence.block_table)
        sequence.block_table = []
        del self._running[sequence.id]
        self._idle.pop(sequence.id, None)


def finish_reason(sequence: Sequence, eos_token_ids: Iterable[int], context_limit: int) -> FinishReason | None:
    """Whether a sequence ends with its last token, and why."""
    params, last = sequence.request.params, sequence.token_ids[-1]
    if (not params.ignore_eos and last in eos_token_ids) or last in params.stop_token_ids:
        return "stop"
    if params.max_tokens is not None and sequence.output_count >= params.max_tokens:
        return "length"
    return "length" if len(sequence.token_ids) >= context_limit else None


def _at_least_1(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
