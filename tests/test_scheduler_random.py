"""Random traffic on a scheduler short of blocks: everything finishes, nothing is lost, repeated or left behind."""

import random

import pytest

from afd_ray.engine.kv_cache import BlockAllocator, check_integrity
from afd_ray.engine.sampling import Sampled
from afd_ray.engine.scheduler import Scheduler
from afd_ray.engine.sequence import MicroBatch, Sequence
from afd_ray.request import Request, SamplingParams

VOCAB, EOS = 50, 0


def next_token(tokens: list[int]) -> int:
    """A model whose token depends on every token before it, and on their order."""
    value = 0
    for token in tokens:
        value = (value * 31 + token + 1) % 1_000_003
    return value % VOCAB


def continuation(request: Request, limit: int) -> list[int]:
    tokens = list(request.prompt_token_ids)
    most = request.params.max_tokens or limit
    while len(tokens) - len(request.prompt_token_ids) < most and len(tokens) < limit:
        tokens.append(next_token(tokens))
        if tokens[-1] == EOS and not request.params.ignore_eos:
            break
    return tokens[len(request.prompt_token_ids) :]


class Traffic:
    """Clients, a cache that remembers which token each place holds, and slots that complete in any order."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.slots = rng.randint(1, 4)
        self.allocator = BlockAllocator(rng.randint(4, 14), rng.randint(1, 4))
        self.scheduler = self.new_scheduler()
        self.limit = self.scheduler.context_limit
        self.kept: dict[tuple[int, int], int] = {}  # (block, offset) -> token
        self.in_flight: dict[int, MicroBatch] = {}
        self.asked: dict[str, Request] = {}
        self.streamed: dict[str, list[int]] = {}
        self.ended: set[str] = set()
        self.aborted: set[str] = set()

    def new_scheduler(self) -> Scheduler:
        return Scheduler(
            allocator=self.allocator,
            slots=self.slots,
            max_tokens_per_micro_batch=self.rng.randint(1, 9),
            max_running_requests=self.rng.randint(1, 9),
            max_context=30,
            eos_token_ids=(EOS,),
        )

    def arrive(self) -> None:
        prompt = tuple(self.rng.randrange(1, VOCAB) for _ in range(self.rng.randint(1, self.limit - 1)))
        params = SamplingParams(max_tokens=self.rng.choice([None, 1, 5, 20]), ignore_eos=self.rng.random() < 0.5)
        request = Request(f"r{len(self.asked)}", prompt, params)
        self.asked[request.id], self.streamed[request.id] = request, []
        self.scheduler.add(request)

    def abort(self) -> None:
        going = sorted(self.asked.keys() - self.ended)
        if going:
            name = self.rng.choice(going)
            assert self.scheduler.abort(name)
            self.ended.add(name)
            self.aborted.add(name)

    def start(self, slot: int) -> None:
        batch = self.scheduler.schedule(slot)
        if batch is None:
            return
        names = [chunk.sequence.id for other in (batch, *self.in_flight.values()) for chunk in other.chunks]
        assert len(names) == len(set(names)), f"a sequence is in two micro-batches: {names}"
        assert batch.rows <= self.scheduler.token_budget
        self.in_flight[slot] = batch

    def land(self, slot: int) -> None:
        batch = self.in_flight.pop(slot)
        if self.rng.random() < 0.1:
            self.scheduler.cancel(batch)
            return
        for output in self.scheduler.complete(batch, self.compute(batch)):
            assert output.request_id not in self.ended
            assert output.token_id is not None
            self.streamed[output.request_id].append(output.token_id)
            if output.finish_reason is not None:
                self.ended.add(output.request_id)

    def compute(self, batch: MicroBatch) -> list[Sampled]:
        sampled = []
        for chunk in batch.chunks:
            for position in range(chunk.start, chunk.start + chunk.count):
                self.kept[self.place(chunk.sequence, position)] = chunk.sequence.token_ids[position]
            if chunk.samples:
                seen = [self.kept[self.place(chunk.sequence, position)] for position in range(chunk.start + chunk.count)]
                sampled.append(Sampled(next_token(seen)))
        return sampled

    def place(self, sequence: Sequence, position: int) -> tuple[int, int]:
        block, offset = divmod(position, self.allocator.block_size)
        return sequence.block_table[block], offset

    def migrate(self) -> None:
        """Everything goes on in a new scheduler, as after the loss of an actor."""
        for batch in self.in_flight.values():
            self.scheduler.cancel(batch)
        self.in_flight.clear()
        progress = self.scheduler.drain_all()
        assert self.allocator.used == 0
        self.slots = self.rng.randint(1, 4)
        self.scheduler = self.new_scheduler()
        for request, generated in progress:
            assert list(generated) == self.streamed[request.id]
            self.scheduler.add(request, generated)

    def step(self, *, arrivals: bool) -> None:
        action = self.rng.random()
        if arrivals and action < 0.15:
            self.arrive()
        elif arrivals and action < 0.18:
            self.abort()
        elif action > 0.995:
            self.migrate()
        else:
            slot = self.rng.randrange(self.slots)
            (self.land if slot in self.in_flight else self.start)(slot)
        assert check_integrity(self.allocator, self.scheduler.sequences) == []


@pytest.mark.parametrize("seed", range(40))
def test_everything_finishes_as_if_it_had_run_alone(seed: int) -> None:
    traffic = Traffic(seed)
    for _ in range(400):
        traffic.step(arrivals=True)
    for _ in range(20_000):
        if not traffic.scheduler.has_work:
            break
        traffic.step(arrivals=False)
    assert (traffic.scheduler.running, traffic.scheduler.waiting, traffic.scheduler.in_flight) == (0, 0, 0)
    assert traffic.allocator.used == 0
    assert traffic.ended == traffic.asked.keys()
    for name, request in traffic.asked.items():
        expected = continuation(request, traffic.limit)
        streamed = traffic.streamed[name]
        assert streamed == (expected[: len(streamed)] if name in traffic.aborted else expected)


def test_without_aborts_every_token_arrives_and_preemption_happened() -> None:
    preemptions = 0
    for seed in range(100, 120):
        traffic = Traffic(seed)
        for _ in range(15):
            traffic.arrive()
        while traffic.scheduler.has_work:
            slot = traffic.rng.randrange(traffic.slots)
            (traffic.land if slot in traffic.in_flight else traffic.start)(slot)
        preemptions += traffic.scheduler.preemptions
        for name, request in traffic.asked.items():
            assert traffic.streamed[name] == continuation(request, traffic.limit)
    assert preemptions > 20
