"""One attention and one FFN process without Ray: the real step loops, joined by a mesh, or each alone on recorded inputs."""

import multiprocessing
import random
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
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
from afd_ray.engine.stage_costs import StageTimes
from afd_ray.handoff.capacity import inbound_bytes
from afd_ray.handoff.mesh import Endpoint, LinkKind, Mesh, RingMesh, open_mesh
from afd_ray.handoff.message import Header, Kind, LinkError, Message
from afd_ray.handoff.spin import SPIN_US
from afd_ray.kernels.packed import packed_attention, packed_ffn
from afd_ray.membership.epoch import Epoch
from afd_ray.models.checkpoint import Checkpoint, load_attention, load_ffn
from afd_ray.request import Request, SamplingParams, TokenOutput
from benchmarks.testbed.switch import Switch, leave_network, switch

ATTENTION, FFN = 0, 1
ADDRESSES = ("10.77.0.1", "10.77.0.2")
"""Of both, where they are on two hosts."""
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


class Worker:
    """A process of the pair, told what to do by name: `start` a method, take its `result`."""

    def __init__(self, role: type["Half"], directory: Path, apart: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, there = context.Pipe()
        self.process = context.Process(target=_serve, args=(role, directory, apart, there), daemon=True)
        self.process.start()
        there.close()

    def start(self, method: str, *arguments: Any) -> None:
        self.pipe.send((method, arguments))

    def result(self) -> Any:
        answer, error = self.pipe.recv()
        if error:
            raise RuntimeError(error)
        return answer

    def close(self) -> None:
        """The process ends once its pipe has."""
        self.pipe.close()
        self.process.join(TIMEOUT_S)
        self.process.kill()


class Pair:
    """Both processes; every method returns when both have done their part."""

    def __init__(self, directory: Path, apart: bool) -> None:
        self.workers = (Worker(AttentionSide, directory, apart), Worker(FFNSide, directory, apart))
        self.results()

    @property
    def pids(self) -> tuple[int, int]:
        first, second = (worker.process.pid or 0 for worker in self.workers)
        return first, second

    def both(self, method: str, *arguments: Any) -> list[Any]:
        return self.each(method, arguments, arguments)

    def each(self, method: str, *arguments: Sequence[Any]) -> list[Any]:
        """`method` on both at once, each with its own arguments."""
        for worker, own in zip(self.workers, arguments, strict=True):
            worker.start(method, *own)
        return self.results()

    def results(self) -> list[Any]:
        """Of both; raises RuntimeError as soon as either has failed."""
        results: dict[int, Any] = {}
        while len(results) < len(self.workers):
            left = {worker.pipe: rank for rank, worker in enumerate(self.workers) if rank not in results}
            for rank in [left[pipe] for pipe in wait(list(left)) if isinstance(pipe, Connection)]:
                results[rank] = self.workers[rank].result()
        return [results[rank] for rank in range(len(self.workers))]

    def load(self, load: Load) -> None:
        self.both("load", load)

    def unlinked(self, slots: int, seconds: float) -> StageTimes:
        """Stage times (us) with both computing at once, each on recorded inputs, so that neither waits and both contend."""
        attention = self.workers[ATTENTION]
        attention.start("record", slots)
        self.both("replay", slots, attention.result())
        return StageTimes(*_pairwise(self.both("alone", slots, seconds)))

    def linked(self, slots: int, kind: LinkKind, hosts: tuple[str, str], steps: int) -> tuple[float, float]:
        """(us for a layer of all micro-batches, us of transfer both ways) while tokens are made over a mesh of this kind."""
        endpoints = self.each("open", (slots, kind, hosts[0]), (slots, kind, hosts[1]))
        self.both("connect", dict(enumerate(endpoints)))
        transfer_us, _ = self.both("ping")
        period_us, _ = self.each("run", (steps,), ())
        self.both("leave")
        return period_us, transfer_us

    def close(self) -> None:
        for worker in self.workers:
            worker.close()


@contextmanager
def pair(directory: Path) -> Iterator[Pair]:
    """A pair on this host."""
    made = Pair(directory, apart=False)
    try:
        yield made
    finally:
        made.close()


@contextmanager
def pair_of_hosts(directory: Path) -> Iterator[tuple[Pair, Switch]]:
    """A pair of which each has a network of its own, and the wire between them; needs the rights of root."""
    made = Pair(directory, apart=True)
    try:
        with switch() as wire:
            for address, pid in zip(ADDRESSES, made.pids, strict=True):
                wire.attach(address, pid)
            yield made, wire
    finally:
        made.close()


def _pairwise(busy_us: list[float]) -> tuple[float, float, float, float]:
    attention, ffn = busy_us
    return attention, 0.0, ffn, 0.0


def _serve(role: type["Half"], directory: Path, apart: bool, pipe: Connection) -> None:
    """A worker's life: what it is told, until the pipe ends."""
    torch.set_num_threads(1)
    with suppress(EOFError, ConnectionError, KeyboardInterrupt):
        half, error = _try(_settle, role, directory, apart)
        pipe.send((None, error))
        while True:
            method, arguments = pipe.recv()
            pipe.send(_try(getattr(half, method), *arguments))


def _settle(role: type["Half"], directory: Path, apart: bool) -> "Half":
    if apart:
        leave_network()
    return role(directory)


def _try(function: Callable[..., Any], *arguments: Any) -> tuple[Any, str]:
    """(result, "") or (None, the error in one line)."""
    try:
        return function(*arguments), ""
    except Exception as error:  # told to the parent, who raises it
        return None, f"{function.__name__}: {type(error).__name__}: {error}"


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


class Answering:
    """A mesh without a peer: what is sent is answered at once by what a peer would send some time later."""

    rank = world_size = epoch = 1

    def __init__(self) -> None:
        self.due: deque[Message] = deque()

    def receive(self) -> Message | None:
        return self.due.popleft() if self.due else None

    def wait(self, timeout_s: float | None, busy: bool = False) -> None:
        raise LinkError(self.rank, "nothing will come")

    def wake(self) -> None:
        pass

    def close(self) -> None:
        pass

    def answer(self, header: Header, tensors: tuple[Tensor, ...] = ()) -> None:
        self.due.append(Message(header, tensors, _nothing))


class AnsweringFFN(Answering):
    """Returns zeros for every dispatch; knows what was sent in the first steps."""

    def __init__(self, hidden: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.sent: list[tuple[Header, tuple[Tensor, ...]]] = []
        self.on_layer: Any = None
        self._zeros = torch.zeros(1 << 12, hidden, dtype=dtype)

    def send(self, peer: int, header: Header, tensors: Sequence[Tensor] = ()) -> None:
        if header.kind is not Kind.DISPATCH:
            return
        if self.on_layer is not None:
            self.sent.append((header, tuple(tensor.clone() for tensor in tensors)))
            self.on_layer(header.layer)
        self.answer(header._replace(kind=Kind.PARTIAL, source=FFN), (self._zeros[: header.rows],))


class AnsweringAttention(Answering):
    """Sends the recorded rows of the next layer for every partial result."""

    def __init__(self, slots: int, recorded: list[tuple[Header, tuple[Tensor, ...]]]) -> None:
        super().__init__()
        self._recorded = recorded
        for slot in range(slots):
            self._dispatch(slot, 0)

    def send(self, peer: int, header: Header, tensors: Sequence[Tensor] = ()) -> None:
        if header.kind is Kind.PARTIAL:
            self._dispatch(header.slot, (header.layer + 1) % len(self._recorded))

    def _dispatch(self, slot: int, layer: int) -> None:
        header, tensors = self._recorded[layer]
        if layer == 0:
            self.answer(Header(Kind.STEP, 1, ATTENTION, slot=slot, rows=header.rows))
        self.answer(header._replace(slot=slot), tensors)


def _nothing() -> None:
    pass


def busy_us(loop: StepLoop) -> float:
    """Mean us of a layer that the loop was in a stage; the head counts as part of every layer."""
    recorded = loop.recorder.stages_us()
    stages = [recorded[stage] for stage in ("attention", "head", "ffn") if stage in recorded]
    return sum(stage.total for stage in stages) / stages[0].count
