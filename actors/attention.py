"""AttentionActor: a Ray actor that owns requests and their KV cache, and drives the layers."""

import asyncio
import functools
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import ray

from actors.aside import aside
from actors.departure import Departure
from actors.device import compute_for
from actors.member import Member
from actors.place import wire_dtype
from actors.request_log import log_requests
from actors.token_server import TokenStreamServer
from afd_ray.config import Config
from afd_ray.engine.attention import AttentionLoop
from afd_ray.engine.colocated import ColocatedLoop
from afd_ray.engine.compute import Compute, Needs
from afd_ray.engine.kv_cache import CACHE_DTYPES, BlockAllocator, PagedCache, check_integrity
from afd_ray.engine.look import look_at_attention
from afd_ray.engine.loop import Wire
from afd_ray.engine.moving_in import Moved, MovingIn
from afd_ray.engine.request_clocks import Targets
from afd_ray.engine.scheduler import Scheduler
from afd_ray.handoff.capacity import frame_bytes
from afd_ray.handoff.device.carrier import places_for
from afd_ray.handoff.kv_fetcher import KVFetcher
from afd_ray.handoff.kv_wire import kv_digest
from afd_ray.measured import Measured
from afd_ray.membership.epoch import Epoch
from afd_ray.membership.seat import Stale
from afd_ray.membership.shape import Shape
from afd_ray.metrics import Sample, attention_samples
from afd_ray.models.checkpoint import load_attention, load_ffn
from afd_ray.models.config import ModelConfig
from afd_ray.models.step3 import AttentionHalf, FFNHalf, FFNShard
from afd_ray.request import KVTicket, Request

HELD_S = 1.0
"""How long it stands at a step boundary for want of a `switch`: a controller that died meanwhile has a successor only after several seconds."""


class AttentionActor(Member):
    """One attention rank. Its control methods answer at once; the step loop runs in a thread of its own."""

    def __init__(self, name: str, config: Config, secret: bytes, controller: str = "") -> None:
        super().__init__(name, config, secret, controller)
        log_requests()
        self._tokens = TokenStreamServer(self._submit, self._abort, secret=secret, host=ray.util.get_node_ip_address())
        self._loop: AttentionLoop | None = None
        self._compute: Compute | None = None
        self._port = 0
        self._loading = asyncio.Lock()
        self._departures: list[Departure] = []
        self._refusal: str | None = None
        """Why no request is taken, until an epoch is entered."""

    @ray.method
    async def load(self, epoch: Epoch | None = None) -> dict[str, Any]:
        """Load this role's tensors, unless they are, make ready for the coming epoch, and open the token stream; gives where the actor runs."""
        if epoch is not None:
            self._seat.load(epoch.number)
        async with self._loading:
            if self._loop is None:
                loop = self._loop = await aside(self._build)
                fetcher = KVFetcher(ray.util.get_node_ip_address(), self._secret, self._kv_digest(loop.cache))
                loop.moving_in = MovingIn(loop.scheduler, loop.cache, fetcher)
                self._start_thread(self._loop)
                self._port = await self._tokens.start()
            if epoch is not None:
                await aside(self._warm_up, epoch)
        return await self._introduce() | {"address": f"{ray.util.get_node_ip_address()}:{self._port}"}

    @ray.method
    async def move_out(self, number: int, deadline_s: float) -> int:
        """Answer every request, and each that comes from now on, with Moved: its ingress goes on with it elsewhere. Gives how many there were.

        None of them gets another token here. Their keys and values stay until they are fetched or not wanted, at most
        `failure.drain_timeout_s`; returns then. Ends like a drain.
        """
        self._require_well()
        self._seat.move_out(number)
        self._expect(number, deadline_s)
        loop, bound_s = self._ready_loop(), min(self._config.failure.drain_timeout_s, deadline_s)
        with suppress(RuntimeError):  # without an epoch nothing is in flight
            await asyncio.wrap_future(loop.drain())
        if self._seat.moving_out != number:
            raise Stale(f"{self._name}: epoch {number} was given up before the requests were")
        departure = Departure(loop, ray.util.get_node_ip_address(), self._secret, self._kv_digest(loop.cache))
        self._departures.append(departure)
        try:
            moved = await asyncio.wrap_future(loop.call(functools.partial(_give_back, departure, self._tokens)))
            await aside(departure.await_taken, bound_s)
        finally:
            await aside(departure.close)
            self._departures.remove(departure)
        return moved

    @ray.method
    async def stay(self, number: int) -> None:
        """The coming epoch, in which this actor was to have no place, is given up: take requests again; the same as `resume`."""
        await self._resume(number)

    @ray.method
    async def drain(self, number: int, deadline_s: float) -> None:
        """Begin no new micro-batch for the sake of this coming epoch; answers at the step boundary, when nothing is in flight any more.

        Unless `switch` or `resume` comes within the deadline, counted from this call, and within HELD_S of the boundary, the actor goes on in
        its old epoch by itself; `switch` may still come. One that moves out has nothing to go on with, and waits for its end until the deadline.
        RuntimeError when it does not come to a boundary.
        """
        self._require_well()
        self._seat.drain(number)
        self._expect(number, deadline_s)
        ends_s = time.monotonic() + deadline_s
        await asyncio.wrap_future(self._ready_loop().drain())
        if self._seat.held(number):
            self._expect(number, min(HELD_S, ends_s - time.monotonic()))

    @ray.method
    async def status(self) -> dict[str, Any]:
        """This actor's part of the cluster's status."""
        loop = self._ready_loop()
        pace = self._config.attention.pace
        return self._standing() | {
            "running": loop.scheduler.running,
            "waiting": loop.scheduler.waiting,
            "kv_used": loop.scheduler.kv_used,
            "kv_total": loop.scheduler.kv_total,
            "micro_batches": loop.scheduler.in_use,
            "expert_loads": loop.expert_loads.tolist(),
            "moved_in": asdict(loop.moving_in.moved if loop.moving_in else Moved()),
            "pace": pace.model_dump() if pace else None,
        }

    @ray.method
    async def check_integrity(self) -> list[str]:
        """What is wrong with the KV blocks, a line each; also tells of requests and streams left behind when idle."""
        loop = self._ready_loop()
        findings = await asyncio.wrap_future(loop.call(functools.partial(_findings, loop.scheduler, self._departures)))
        if not loop.scheduler.has_work and self._tokens.requests:
            findings.append(f"{self._tokens.requests} requests are routed to a stream, but none is in progress")
        return findings

    def _build(self) -> AttentionLoop:
        config = self._config
        compute = self._compute = _compute_for(config)
        checkpoint, dtype = self._open_checkpoint(config.attention.num_cpus)
        colocated, pace = config.ffn.colocated, config.attention.pace
        shared = config.attention.shared_expert
        keep, wanted = compute.narrow_parts, config.attention.kv_cache
        read = load_attention(checkpoint, dtype, self._progress(0, 1 + colocated), shared=shared, keep=keep)
        read.scale_cache(wanted.key_scale, wanted.value_scale)
        half = compute.attention(read)
        ffn = None
        if colocated:
            whole = FFNShard.whole(half.config)
            ffn = compute.colocated_ffn(load_ffn(checkpoint, whole, dtype, self._progress(1, 2), keep=keep))
        cache, allocator = build_cache(config, half.config, compute)
        scheduler = Scheduler(
            allocator=allocator,
            slots=1,
            max_tokens_per_micro_batch=config.pipeline.max_tokens_per_micro_batch,
            max_running_requests=config.pipeline.max_running_requests,
            max_context=max_context(config, half.config),
            eos_token_ids=half.config.eos_token_ids,
        )
        if ffn is None:
            loop = AttentionLoop(half, cache, scheduler, self._tokens.publish, pace, compute.begin)
        else:
            loop = ColocatedLoop(half, ffn, cache, scheduler, self._tokens.publish, pace, config.ffn.pace, compute.begin)
        loop.clocks.targets = Targets(config.autoscaling.ttft_target_ms, config.autoscaling.tpot_target_ms)
        return loop

    def _warm_up(self, epoch: Epoch) -> None:
        """For all steps of that epoch, beside those of the one served."""
        loop, compute = self._ready_loop(), self._compute
        assert compute is not None
        ffn = loop.ffn if isinstance(loop, ColocatedLoop) else None
        compute.warm_up_attention(loop.half, loop.cache, needs_of(self._config, epoch), ffn)

    def _kv_digest(self, cache: PagedCache) -> int:
        return kv_digest(self._model_digest, cache.layers, cache.head_dim, cache.dtype)

    def _submit(self, request: Request, generated: Sequence[int] = (), ticket: KVTicket | None = None) -> None:
        if self._seat.moving_out:
            self._tokens.move([request.id])
            return
        if self._failure is not None or self._refusal is not None:
            raise RuntimeError(f"the attention actor has failed: {self._failure or self._refusal}")
        submitted = self._ready_loop().submit(request, generated, ticket)
        submitted.add_done_callback(functools.partial(_answer_refusal, self._tokens, request.id))

    def _abort(self, request_id: str) -> None:
        self._ready_loop().abort(request_id)

    def _check_weights(self, epoch: Epoch, rank: int) -> None:
        """Every rank of every epoch needs the same."""

    def _drop_weights(self, number: int) -> None:
        """They serve in any epoch."""

    async def _hang_up(self) -> None:
        await self._tokens.close()

    def _enter(self, wire: Wire) -> "Future[float]":
        self._refusal = None
        return super()._enter(wire)

    def _go_on(self) -> "Future[None]":
        return self._ready_loop().resume()

    def _give_up(self, reason: str) -> None:
        self._refusal = reason
        self._tokens.move_all(reason)  # another actor may be able to go on with them
        self._ready_loop().give_up(reason)

    def _ended(self, reason: str) -> None:
        """No request is left without an answer, whatever state the failure left the scheduler in."""
        try:
            self._ready_loop().abandon()
        finally:
            self._tokens.move_all(reason)

    def _ready_loop(self) -> AttentionLoop:
        if self._loop is None:
            raise RuntimeError("the attention actor has not loaded its model")
        return self._loop

    def _ready_half(self) -> AttentionHalf:
        return self._ready_loop().half

    def _held(self) -> list[AttentionHalf | FFNHalf]:
        loop = self._ready_loop()
        return [loop.half, loop.ffn] if isinstance(loop, ColocatedLoop) else [loop.half]

    def _look(self) -> Measured:
        return look_at_attention(self._ready_loop())

    def _samples(self) -> list[Sample]:
        return attention_samples(self._name, self._look(), self._ready_lookback().recent())

    def _stages(self, steps: int) -> tuple[str, int]:
        return "head", steps


def _give_back(departure: Departure, tokens: TokenStreamServer) -> int:
    """On the step loop's thread, so that no token follows the answer."""
    tickets = departure.tickets()
    tokens.hand_over(tickets)
    return len(tickets)


def _answer_refusal(tokens: TokenStreamServer, request_id: str, submitted: "Future[None]") -> None:
    """Tell the client when the scheduler did not take its request. Not a method: Ray wraps those, and this runs on the step loop's thread."""
    error = submitted.exception()
    if isinstance(error, ValueError):
        tokens.refuse(request_id, str(error))
    elif error is not None:
        tokens.move([request_id], str(error))


def max_context(config: Config, model: ModelConfig) -> int:
    """Tokens of prompt and answer that a request may come to."""
    return config.context_limit(model.max_position_embedding)


def build_cache(config: Config, model: ModelConfig, compute: Compute) -> tuple[PagedCache, BlockAllocator]:
    """The KV cache that the configuration asks for; `num_blocks` auto is what all running requests could need, within memory."""
    wanted, pipeline = config.attention.kv_cache, config.pipeline
    dtype = model.dtype if wanted.dtype == "auto" else CACHE_DTYPES[wanted.dtype]
    if wanted.num_blocks != "auto":
        num_blocks = wanted.num_blocks
    else:
        block_bytes = wanted.block_size * model.num_hidden_layers * model.kv_width * dtype.itemsize
        per_request = -(-max_context(config, model) // wanted.block_size)
        epoch = Shape.of(config).epoch(1)
        free_bytes = compute.cache_bytes(model, needs_of(config, epoch)) - _link_bytes(config, model, epoch)
        room = max(0, free_bytes // block_bytes - compute.spare_blocks)
        num_blocks = min(per_request * pipeline.max_running_requests, room)
    cache = compute.cache(model, num_blocks, wanted.block_size, dtype)
    return cache, BlockAllocator(cache.num_blocks, wanted.block_size)


def needs_of(config: Config, epoch: Epoch) -> Needs:
    """An attention rank's in that epoch."""
    return Needs(
        rows=config.pipeline.max_tokens_per_micro_batch,
        decoding=config.pipeline.most_decoding,
        slots=epoch.micro_batches,
        instances=epoch.expert_parallel,
    )


def _compute_for(config: Config) -> Compute:
    narrow = config.ffn.quantises or config.ffn.quantises_dense if config.ffn.colocated else config.handoff.wire_dtype == "fp8"
    return compute_for(
        "attention",
        config.attention.num_gpus,
        quantise_experts=config.ffn.quantises,
        quantise_dense=config.ffn.quantises_dense,
        quantise_projections=config.attention.quantises,
        quantise_rows=narrow,
        graphs=config.pipeline.cuda_graphs,
        stays=config.handoff.between_devices is not None,
    )


def _link_bytes(config: Config, model: ModelConfig, epoch: Epoch) -> int:
    """Of device memory for what is under way to an attention rank, and by NCCL from it too, in an epoch and the next one beside it."""
    kind, rows, wire = config.handoff.between_devices, config.pipeline.max_tokens_per_micro_batch, wire_dtype(config, model)
    if kind is None:
        return 0
    frames = sum(frame_bytes(epoch, 0, peer, model, wire, rows) for peer in epoch.ffn_ranks)
    if kind == "nccl":
        frames += sum(frame_bytes(epoch, peer, 0, model, wire, rows) for peer in epoch.ffn_ranks)
    return 2 * places_for(epoch.micro_batches) * frames


def _findings(scheduler: Scheduler, departures: Sequence[Departure]) -> list[str]:
    left = [sequence for departure in departures for sequence in departure.left.sequences]
    return check_integrity(scheduler.allocator, [*scheduler.sequences, *left])
