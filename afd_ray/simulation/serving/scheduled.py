"""An attention rank that steps every sequence through the live scheduler: slow, and what `counted` is held against."""

from afd_ray.engine.kv_cache import BlockAllocator
from afd_ray.engine.sampling import Sampled
from afd_ray.engine.scheduler import Scheduler
from afd_ray.engine.sequence import MicroBatch
from afd_ray.engine.stage_costs import CostLine
from afd_ray.request import Request, SamplingParams
from afd_ray.simulation.serving.jobs import Job, Work

TOKEN = 0


class ScheduledRank:
    """All slots are scheduled when a round begins, and complete when it ends."""

    def __init__(self, *, blocks: int, block_size: int, budget: int, max_running: int, costs: CostLine | None) -> None:
        self.outstanding = self.outstanding_tokens = 0
        self.costs = costs
        self._scheduler = Scheduler(
            allocator=BlockAllocator(blocks, block_size),
            slots=1,
            max_tokens_per_micro_batch=budget,
            max_running_requests=max_running,
            max_context=blocks * block_size,
            eos_token_ids=(),
        )
        self._jobs: dict[str, Job] = {}
        self._batches: list[MicroBatch] = []

    @property
    def running(self) -> int:
        return self._scheduler.running

    @property
    def waiting(self) -> int:
        return self._scheduler.waiting

    @property
    def preemptions(self) -> int:
        return self._scheduler.preemptions

    @property
    def kv_used(self) -> float:
        return self._scheduler.kv_used / self._scheduler.kv_total

    @property
    def oldest_waiting_ps(self) -> int | None:
        waiting = self._scheduler.sequences[self._scheduler.running :]
        return min((self._jobs[sequence.id].arrived_ps for sequence in waiting), default=None)

    def add(self, job: Job) -> None:
        request = Request(str(job.number), (TOKEN,) * job.prompt, SamplingParams(max_tokens=job.output, ignore_eos=True))
        self._scheduler.add(request, (TOKEN,) * job.produced)
        self._jobs[request.id] = job
        self.outstanding += 1
        self.outstanding_tokens += job.prompt + job.output

    def begin(self, number: int, micro_batches: int) -> Work:
        scheduler = self._scheduler
        if scheduler.slots != micro_batches:
            scheduler.reslot(micro_batches)
        scheduler.costs = self.costs
        batches = [scheduler.schedule(slot) for slot in range(micro_batches)]
        self._batches = [batch for batch in batches if batch is not None]
        chunks = [chunk for batch in self._batches for chunk in batch.chunks]
        decoding = sum(chunk.sequence.decodes for chunk in chunks)
        return Work(decoding, sum(chunk.count for chunk in chunks) - decoding, sum(chunk.start + chunk.count for chunk in chunks))

    def steady_from(self, number: int) -> int:
        return number + 1

    def end(self, number: int) -> tuple[list[Job], list[Job]]:
        first, last = [], []
        for batch in self._batches:
            for output in self._scheduler.complete(batch, [Sampled(TOKEN)] * sum(chunk.samples for chunk in batch.chunks)):
                job = self._jobs[output.request_id]
                job.produced += 1
                if job.produced == 1:
                    first.append(job)
                if output.finish_reason is not None:
                    last.append(job)
                    self._forget(job)
        return first, last

    def evict(self, number: int) -> list[Job]:
        jobs = [self._jobs[request.id] for request, _ in self._scheduler.drain_all()]
        for job in jobs:
            self._forget(job)
        return jobs

    def _forget(self, job: Job) -> None:
        del self._jobs[str(job.number)]
        self.outstanding -= 1
        self.outstanding_tokens -= job.prompt + job.output
