"""An attention rank that counts its sequences instead of stepping each: `engine.scheduler.Scheduler`'s rules at the cost of what changes.

What it takes from the scheduler: who is admitted, which prompt rows join a micro-batch, when a sequence needs another KV block and who gives up its blocks
for it. What it leaves out: which slot a decode row is in (a round runs all slots), and the bound on decode rows of a micro-batch.
"""

import heapq
from collections import deque

from afd_ray.engine.shares import LEAST_PREFILL, prefill_room
from afd_ray.engine.stage_costs import CostLine
from afd_ray.simulation.serving.jobs import Job, Work

NEVER = 2**62


class Stay:
    """A job's time at a rank: its place in the order of admission, and since when it decodes."""

    __slots__ = ("blocks", "computed", "joined", "length", "order", "passed_over")

    def __init__(self, order: int, length: int, blocks: int) -> None:
        self.order, self.length, self.blocks = order, length, blocks
        """`blocks` at admission; a decoding sequence's follow from its length."""
        self.computed = 0
        self.joined = NEVER
        """The round of its first decode row."""
        self.passed_over = 0


class CountedRank:
    """Sequences that decode are known by their number, the sum of their contexts and when they need blocks; rounds in which nothing else happens cost nothing."""

    def __init__(self, *, blocks: int, block_size: int, budget: int, max_running: int, costs: CostLine | None) -> None:
        self.outstanding = self.outstanding_tokens = 0
        self.preemptions = 0
        self.costs = costs
        """What a row takes on its way through a layer: bounds the prompt rows that join decoding ones; None: unknown."""
        self._blocks, self._block_size, self._budget, self._max_running = blocks, block_size, budget, max_running
        self._waiting: deque[Job] = deque()
        self._running: dict[Job, Stay] = {}
        self._prefilling: dict[Job, Stay] = {}
        self._chunks: list[tuple[Job, int]] = []
        self._stalled: list[Job] = []
        self._decoding = 0
        self._context = 0  # of the decoding sequences in round 0, if they had decoded since then
        self._used = 0
        self._used_at = 0  # blocks of rounds before this one are counted
        self._needs = [0] * block_size  # sequences that need a block in rounds r with r % block_size == index
        self._finishes: list[tuple[int, int, int, Job]] = []
        self._admitted = 0
        self._check = NEVER

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def kv_used(self) -> float:
        return self._used / self._blocks

    @property
    def oldest_waiting_ps(self) -> int | None:
        return min((job.arrived_ps for job in self._waiting), default=None)

    def add(self, job: Job) -> None:
        self.outstanding += 1
        self.outstanding_tokens += job.prompt + job.output
        if not job.produced:
            self._waiting.append(job)
            return
        place = next((i for i, other in enumerate(self._waiting) if not other.produced), len(self._waiting))
        self._waiting.insert(place, job)

    def begin(self, number: int, micro_batches: int) -> Work:
        self._count_blocks(number)
        self._admit()
        if self._decoding and self._available < self._needs[number % self._block_size]:
            self._make_room(number)
        context = self._context + self._decoding * number
        self._take_prompt_rows(micro_batches, context)
        prompt_rows = sum(count for _, count in self._chunks)
        context += sum(self._prefilling[job].computed + count for job, count in self._chunks)
        free = self._available // self._decoding * self._block_size if self._decoding else NEVER
        self._check = number + max(1, free)
        return Work(self._decoding, prompt_rows, context)

    def steady_from(self, number: int) -> int:
        if self._chunks or self._stalled:
            return number + 1
        return min(self._check, self._next_finish + 1)

    def end(self, number: int) -> tuple[list[Job], list[Job]]:
        first, last = [], []
        while self._finishes and self._next_finish <= number:
            _, _, phase, job = heapq.heappop(self._finishes)
            if job.stay == phase:
                self._leave(job, number + 1)
                last.append(job)
        for job, count in self._chunks:
            stay = self._prefilling[job]
            stay.computed += count
            if stay.computed == stay.length:
                job.produced += 1
                del self._prefilling[job]
                if job.produced == 1:
                    first.append(job)
                if job.produced >= job.output:
                    self._leave(job, number + 1)
                    last.append(job)
                else:
                    self._join(job, number + 1)
        self._chunks = []
        for job in self._stalled:
            self._join(job, number + 1)
        self._stalled = []
        return first, last

    def evict(self, number: int) -> list[Job]:
        jobs = [*self._running, *self._waiting]
        for job in list(self._running):
            self._leave(job, number)
        self._waiting.clear()
        self._chunks, self._stalled = [], []
        self.outstanding = self.outstanding_tokens = 0
        return jobs

    @property
    def _available(self) -> int:
        return self._blocks - self._used

    @property
    def _next_finish(self) -> int:
        while self._finishes and self._finishes[0][3].stay != self._finishes[0][2]:
            heapq.heappop(self._finishes)
        return self._finishes[0][0] if self._finishes else NEVER

    def _count_blocks(self, number: int) -> None:
        """Those that decoding took in the rounds before `number`."""
        cycles, rest = divmod(number - self._used_at, self._block_size)
        self._used += cycles * self._decoding
        self._used += sum(self._needs[r % self._block_size] for r in range(number - rest, number))
        self._used_at = number

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._max_running:
            job = self._waiting[0]
            length = job.prompt + job.produced
            needed = -(-length // self._block_size)
            if needed + len(self._running) > self._available:
                return
            self._waiting.popleft()
            self._used += needed
            self._admitted += 1
            self._running[job] = self._prefilling[job] = Stay(self._admitted, length, needed)

    def _take_prompt_rows(self, micro_batches: int, context: int) -> None:
        """Each slot in turn takes what its decode rows leave room for, from the prompts in order of admission that no other slot has."""
        self._chunks = []
        if not self._prefilling:
            return
        pending = iter(self._prefilling.items())
        for slot in range(micro_batches):
            rows = (self._decoding + micro_batches - 1 - slot) // micro_batches
            room = self._prompt_room(rows, context, micro_batches)
            while room > 0:
                job, stay = next(pending, (None, None))
                if job is None or stay is None:
                    return
                count = min(room, stay.length - stay.computed)
                self._chunks.append((job, count))
                room -= count

    def _prompt_room(self, decode_rows: int, context: int, micro_batches: int) -> int:
        room = self._budget - decode_rows
        if self.costs is None:
            return room
        cached = context - self._decoding  # the rows' own tokens are not in the cache yet
        fair_us = (self.costs.per_row_us * self._decoding + self.costs.per_token_us * cached) / micro_batches
        stretch = prefill_room(self.costs, fair_us, fair_us)
        return room if stretch is None else min(room, max(stretch, self._budget // LEAST_PREFILL, 1))

    def _join(self, job: Job, number: int) -> None:
        """From round `number` on it decodes."""
        self._count_blocks(number)
        stay = self._running[job]
        stay.joined = number
        length = job.prompt + job.produced
        self._decoding += 1
        self._context += length - number
        self._needs[(number - (length - 1)) % self._block_size] += 1
        heapq.heappush(self._finishes, (number + job.output - job.produced - 1, job.number, job.stay, job))

    def _part(self, job: Job, number: int) -> None:
        """It does not decode in round `number`: its tokens up to then are its own."""
        stay = self._running[job]
        length = job.prompt + job.produced
        self._count_blocks(number)
        self._needs[(stay.joined - (length - 1)) % self._block_size] -= 1
        self._decoding -= 1
        self._context -= length - stay.joined
        job.produced += number - stay.joined
        job.stay += 1
        stay.joined = NEVER

    def _leave(self, job: Job, number: int) -> None:
        """Its blocks are free."""
        stay = self._running[job]
        self._count_blocks(number)
        if stay.joined != NEVER:
            self._part(job, number)
        self._used -= self._held(job, stay)
        del self._running[job]
        self._prefilling.pop(job, None)
        self.outstanding -= 1
        self.outstanding_tokens -= job.prompt + job.output

    def _held(self, job: Job, stay: Stay) -> int:
        """Blocks of a sequence that does not decode just now."""
        cached = job.prompt + job.produced - 1
        return max(stay.blocks, -(-cached // self._block_size))

    def _make_room(self, number: int) -> None:
        """For each sequence that needs a block and finds none, the youngest not yet scheduled one gives up its own, or it waits a round itself."""
        decoding = [(job, stay) for job, stay in self._running.items() if stay.joined != NEVER]
        decoding.sort(key=lambda pair: (-pair[1].passed_over, -self._length(pair[0], pair[1], number)))
        free, taken = self._available, set()
        for job, stay in decoding:
            if job not in self._running:
                continue
            if (number - stay.joined + job.prompt + job.produced - 1) % self._block_size:
                taken.add(job)
                continue
            while free < 1 and (victim := self._youngest_after(stay, taken)) is not None:
                self._preempt(victim, number)
                free = self._available - self._granted(taken, number)
            if free < 1:
                self._part(job, number)
                stay.passed_over += 1
                self._stalled.append(job)
                continue
            stay.passed_over = 0
            free -= 1
            taken.add(job)

    def _granted(self, taken: set[Job], number: int) -> int:
        """Blocks that those already scheduled take in this round."""
        stays = [(job, self._running[job]) for job in taken]
        return sum(not (number - stay.joined + job.prompt + job.produced - 1) % self._block_size for job, stay in stays)

    def _length(self, job: Job, stay: Stay, number: int) -> int:
        return job.prompt + job.produced + number - stay.joined if self.costs is not None else 0

    def _youngest_after(self, stay: Stay, taken: set[Job]) -> Job | None:
        for job, other in reversed(self._running.items()):
            if other is stay:
                return None
            if job not in taken:
                return job
        return None

    def _preempt(self, job: Job, number: int) -> None:
        """It starts over from its prompt and the tokens that it has, ahead of all that wait."""
        if job in self._stalled:
            self._stalled.remove(job)
        self._leave(job, number)
        self.outstanding += 1
        self.outstanding_tokens += job.prompt + job.output
        self._waiting.appendleft(job)
        self.preemptions += 1
