"""Attention ranks that take every sequence through the live scheduler: by rounds, which `counted` is held against, and slot by slot."""

from collections.abc import Sequence

from afd_ray.engine.kv_cache import BlockAllocator
from afd_ray.engine.sampling import Sampled
from afd_ray.engine.scheduler import Scheduler
from afd_ray.engine.sequence import MicroBatch
from afd_ray.engine.stage_costs import CostLine
from afd_ray.request import Request, SamplingParams
from afd_ray.simulation.serving.jobs import Job, Work

TOKEN = 0


class SlotRank:
    """Slot by slot, as in a step loop: the live scheduler, and the jobs that its sequences are of."""

    def __init__(self, *, blocks: int, block_size: int, budget: int, max_running: int) -> None:
        self.outstanding = self.outstanding_tokens = 0
        self.scheduler = Scheduler(
            allocator=BlockAllocator(blocks, block_size),
            slots=1,
            max_tokens_per_micro_batch=budget,
            max_running_requests=max_running,
            max_context=blocks * block_size,
            eos_token_ids=(),
        )
        self._jobs: dict[str, Job] = {}

    @property
    def running(self) -> int:
        return self.scheduler.running

    @property
    def waiting(self) -> int:
        return self.scheduler.waiting

    @property
    def preemptions(self) -> int:
        return self.scheduler.preemptions

    @property
    def kv_used(self) -> float:
        return self.scheduler.kv_used / self.scheduler.kv_total

    @property
    def oldest_waiting_ps(self) -> int | None:
        waiting = self.scheduler.sequences[self.scheduler.running :]
        return min((self._jobs[sequence.id].arrived_ps for sequence in waiting), default=None)

    def add(self, job: Job) -> None:
        request = Request(str(job.number), (TOKEN,) * job.prompt, SamplingParams(max_tokens=job.output, ignore_eos=True))
        self.scheduler.add(request, (TOKEN,) * job.produced)
        self._jobs[request.id] = job
        self.outstanding += 1
        self.outstanding_tokens += job.prompt + job.output

    def schedule(self, slot: int) -> MicroBatch | None:
        """The rows that a free slot computes next."""
        return self.scheduler.schedule(slot)

    def complete(self, batch: MicroBatch) -> list[tuple[Job, bool]]:
        """Who has one more token, and whether it was the last."""
        produced = []
        for output in self.scheduler.complete(batch, [Sampled(TOKEN)] * sum(chunk.samples for chunk in batch.chunks)):
            job, last = self._jobs[output.request_id], output.finish_reason is not None
            job.produced += 1
            produced.append((job, last))
            if last:
                self._forget(job)
        return produced

    def drain(self) -> list[Job]:
        """Every request with the tokens that it has, and none of them here any more; nothing may be in flight."""
        jobs = [self._jobs[request.id] for request, _ in self.scheduler.drain_all()]
        for job in jobs:
            self._forget(job)
        return jobs

    def _forget(self, job: Job) -> None:
        del self._jobs[str(job.number)]
        self.outstanding -= 1
        self.outstanding_tokens -= job.prompt + job.output


class ScheduledRank(SlotRank):
    """By rounds: all slots are scheduled when one begins, and complete when it ends."""

    def __init__(self, *, blocks: int, block_size: int, budget: int, max_running: int, costs: CostLine | None) -> None:
        super().__init__(blocks=blocks, block_size=block_size, budget=budget, max_running=max_running)
        self.costs = costs
        self._batches: list[MicroBatch] = []

    def begin(self, number: int, micro_batches: int) -> Work:
        scheduler = self.scheduler
        if scheduler.slots != micro_batches:
            scheduler.reslot(micro_batches)
        scheduler.costs = self.costs
        batches = [scheduler.schedule(slot) for slot in range(micro_batches)]
        self._batches = [batch for batch in batches if batch is not None]
        return work_of(self._batches)

    def steady_from(self, number: int) -> int:
        return number + 1

    def end(self, number: int) -> tuple[list[Job], list[Job]]:
        produced = [one for batch in self._batches for one in self.complete(batch)]
        return [job for job, _ in produced if job.produced == 1], [job for job, last in produced if last]

    def evict(self, number: int) -> list[Job]:
        return self.drain()


def work_of(batches: Sequence[MicroBatch]) -> Work:
    """What these compute together."""
    chunks = [chunk for batch in batches for chunk in batch.chunks]
    decoding = sum(chunk.sequence.decodes for chunk in chunks)
    return Work(decoding, sum(chunk.count for chunk in chunks) - decoding, sum(chunk.start + chunk.count for chunk in chunks))
