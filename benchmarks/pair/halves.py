"""What each process does: join and leave a mesh, run its role's step loop on it or alone."""

import random
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from afd_ray.config import Pace
from afd_ray.engine.attention import AttentionLoop, Publish
from afd_ray.engine.ffn import FFNLoop
from afd_ray.engine.kv_cache import BlockAllocator, PagedCache
from afd_ray.engine.loop import StepLoop, Wire
from afd_ray.engine.sampling import Sampled
from afd_ray.engine.scheduler import Scheduler
from afd_ray.handoff.capacity import inbound_bytes
from afd_ray.handoff.mesh import Endpoint, LinkKind, Mesh, RingMesh, open_mesh
from afd_ray.handoff.message import Header, Kind, Message
from afd_ray.handoff.spin import SPIN_US
from afd_ray.kernels.packed import packed_attention, packed_ffn
from afd_ray.membership.epoch import Epoch
from afd_ray.models.checkpoint import Checkpoint, load_attention, load_ffn
from afd_ray.request import Request, SamplingParams, TokenOutput
from benchmarks.pair.answering import ATTENTION, FFN, AnsweringAttention, AnsweringFFN

BLOCK_SIZE = 16
TIMEOUT_S = 30.0
WARM_UP_STEPS = 2
PINGS = 40
ENDLESS = SamplingParams(max_tokens=None, temperature=0.0, ignore_eos=True)


class Load(NamedTuple):
    """What decodes: `rows` sequences with `context` tokens behind them; `pace_us` is the least length of a stage, 0 for none."""

    rows: int
    context: int
    pace_us: float = 0.0


class Half:
    """What both sides do: join and leave a mesh, run a loop on it or alone."""

    rank: int

    def __init__(self, directory: Path) -> None:
        self.checkpoint = Checkpoint.open(directory)
        self.model = self.checkpoint.config
        self.wanted = Load(1, 1)
        self.mesh: RingMesh | None = None
        self.epoch = Epoch(1, 1, 1, 1, 1)
        self.recorded: list[tuple[Header, tuple[Tensor, ...]]] = []

    def load(self, load: Load) -> None:
        self.wanted = load

    def new_loop(self) -> StepLoop:
        raise NotImplementedError

    def replay(self, slots: int, recorded: list[tuple[Header, tuple[Tensor, ...]]]) -> None:
        """The attention side's DISPATCH of each layer, as inputs for the FFN side alone."""
        self.recorded = recorded

    @property
    def pace(self) -> Pace | None:
        return Pace(base_us=self.wanted.pace_us) if self.wanted.pace_us else None

    def rows_of(self, slots: int) -> int:
        return -(-self.wanted.rows // slots)

    def alone(self, slots: int, seconds: float) -> float:
        """Busy us a layer of a micro-batch, on a mesh that answers at once."""
        self.epoch = Epoch(1, 1, 1, 1, slots)
        loop = self.new_loop()
        mesh = self.answering(slots)
        timer = threading.Timer(seconds, loop.stop)
        timer.start()
        loop.run(Wire(mesh, self.epoch, self.rank, self.model.dtype))
        return busy_us(loop)

    def answering(self, slots: int) -> Mesh:
        raise NotImplementedError

    def open(self, slots: int, kind: LinkKind, host: str) -> dict[str, Any]:
        self.epoch = Epoch(1, 1, 1, 1, slots)
        peer = 1 - self.rank
        rings = {peer: inbound_bytes(self.epoch, self.rank, peer, self.model, self.model.dtype, self.wanted.rows)}
        self.mesh = open_mesh(self.rank, 2, 1, secret=b"benchmark", host=host, peers=rings, kind=kind, spin_us=SPIN_US)
        return self.mesh.endpoint.to_dict()

    def connect(self, endpoints: dict[int, dict[str, Any]]) -> None:
        assert self.mesh is not None
        self.mesh.connect({rank: Endpoint.from_dict(endpoint) for rank, endpoint in endpoints.items()}, TIMEOUT_S)

    def next_message(self) -> Message:
        assert self.mesh is not None
        while (message := self.mesh.receive()) is None:
            self.mesh.wait(TIMEOUT_S)
        return message

    def leave(self) -> None:
        assert self.mesh is not None
        self.mesh.close()
        self.mesh = None


class AttentionSide(Half):
    """Owns the sequences; they stay where they are between runs."""

    rank = ATTENTION

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.half = packed_attention(load_attention(self.checkpoint))

    def load(self, load: Load) -> None:
        """Every sequence decoding, its context full of noise: what a key says does not change what it costs."""
        super().load(load)
        model = self.model
        most = load.context + 512
        num_blocks = load.rows * -(-most // BLOCK_SIZE)
        self.cache = PagedCache(
            layers=model.num_hidden_layers,
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            head_dim=model.head_dim,
            dtype=model.dtype,
        )
        self.cache.blocks.normal_(std=0.1)
        self.scheduler = Scheduler(
            allocator=BlockAllocator(num_blocks, BLOCK_SIZE),
            slots=1,
            max_tokens_per_micro_batch=1 << 20,
            max_running_requests=load.rows,
            max_context=most,
            eos_token_ids=(),
        )
        rng = random.Random(0)
        for i in range(load.rows):
            self.scheduler.add(Request(f"r{i}", tuple(rng.choices(range(model.vocab_size), k=load.context)), ENDLESS))
        batch = self.scheduler.schedule(0)
        assert batch is not None
        # Different tokens: equal ones would all choose the same experts, and the FFN alone would read few of its weights.
        self.scheduler.complete(batch, [Sampled(rng.randrange(model.vocab_size)) for _ in range(load.rows)])

    def rewind(self) -> None:
        """Forget the tokens of the last run, so that every run has the same contexts."""
        self.scheduler.cancel_all()
        for sequence in self.scheduler.sequences:
            del sequence.token_ids[self.wanted.context + 1 :]
            sequence.computed = self.wanted.context

    def new_loop(self) -> AttentionLoop:
        return self.publishing(lambda outputs: None)

    def publishing(self, publish: Publish) -> AttentionLoop:
        self.rewind()
        return AttentionLoop(self.half, self.cache, self.scheduler, publish, self.pace)

    def answering(self, slots: int) -> "AnsweringFFN":
        return AnsweringFFN(self.half.config.hidden_size, self.model.dtype)

    def record(self, slots: int) -> list[tuple[Header, tuple[Tensor, ...]]]:
        """What one micro-batch sends at each layer."""
        self.epoch = Epoch(1, 1, 1, 1, slots)
        loop = self.new_loop()
        mesh = AnsweringFFN(self.model.hidden_size, self.model.dtype)
        mesh.on_layer = lambda layer: loop.stop() if layer == self.model.num_hidden_layers - 1 else None
        loop.run(Wire(mesh, self.epoch, self.rank, self.model.dtype))
        return [(header, tensors) for header, tensors in mesh.sent if header.slot == 0][: self.model.num_hidden_layers]

    def ping(self) -> float:
        """Median us of a round trip with one layer's rows each way."""
        assert self.mesh is not None
        rows, hidden, top_k = self.rows_of(self.epoch.micro_batches), self.model.hidden_size, self.model.moe_top_k
        hidden_rows = torch.zeros(rows, hidden, dtype=self.model.dtype)
        there = (hidden_rows, torch.zeros(rows, top_k, dtype=torch.int32), torch.zeros(rows, top_k))
        took_us = []
        for step in range(PINGS):
            started_ns = time.monotonic_ns()
            self.mesh.send(FFN, Header(Kind.DISPATCH, 1, ATTENTION, step=step), there)
            self.next_message().release()
            took_us.append((time.monotonic_ns() - started_ns) / 1000)
        return statistics.median(took_us)

    def run(self, steps: int) -> float:
        """Us for a layer of all rows, over so many steps after the warm-up."""
        assert self.mesh is not None
        meter = TokenMeter(WARM_UP_STEPS * self.wanted.rows, (WARM_UP_STEPS + steps) * self.wanted.rows)
        loop = self.publishing(meter.count)
        meter.enough = loop.stop
        loop.run(Wire(self.mesh, self.epoch, self.rank, self.model.dtype))
        self.mesh.send(FFN, Header(Kind.STOP, 1, ATTENTION))
        return meter.us_per_token * self.wanted.rows / self.model.num_hidden_layers


class TokenMeter:
    """Times the tokens from the `first` to the `last`, and calls `enough` then."""

    def __init__(self, first: int, last: int) -> None:
        self._first, self._last, self._tokens = first, last, 0
        self._marks: list[tuple[int, int]] = []  # (monotonic ns, tokens so far)
        self.enough: Callable[[], object] = _nothing

    def count(self, outputs: list[TokenOutput]) -> None:
        self._tokens += len(outputs)
        if self._tokens >= self._first:
            self._marks.append((time.monotonic_ns(), self._tokens))
        if self._tokens >= self._last:
            self.enough()

    @property
    def us_per_token(self) -> float:
        (start_ns, before), (end_ns, after) = self._marks[0], self._marks[-1]
        return (end_ns - start_ns) / (after - before) / 1000


class FFNSide(Half):
    """Keeps nothing."""

    rank = FFN

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.half = packed_ffn(load_ffn(self.checkpoint, Epoch(1, 1, 1, 1, 1).shard(FFN, self.model)))

    def new_loop(self) -> FFNLoop:
        return FFNLoop(self.half, self.pace)

    def answering(self, slots: int) -> "AnsweringAttention":
        return AnsweringAttention(slots, self.recorded)

    def ping(self) -> None:
        assert self.mesh is not None
        for step in range(PINGS):
            message = self.next_message()
            self.mesh.send(ATTENTION, Header(Kind.PARTIAL, 1, FFN, step=step), message.tensors[:1])
            message.release()

    def run(self) -> None:
        """Until the attention side says that it is over."""
        assert self.mesh is not None
        try:
            self.new_loop().run(Wire(self.mesh, self.epoch, self.rank, self.model.dtype))
        except RuntimeError as error:
            if "STOP" not in str(error):
                raise


def busy_us(loop: StepLoop) -> float:
    """Mean us of a layer that the loop was in a stage; the head counts as part of every layer."""
    recorded = loop.recorder.stages_us()
    stages = [recorded[stage] for stage in ("attention", "head", "ffn") if stage in recorded]
    return sum(stage.total for stage in stages) / stages[0].count


def _nothing() -> None:
    pass
