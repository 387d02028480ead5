"""AttentionActor: a Ray actor that owns requests and their KV cache, and drives the layers."""

import asyncio
import functools
import os
import time
from concurrent.futures import Future
from typing import Any

import ray
import torch

from actors.member import Member, compute_threads
from actors.memory import resident_bytes
from actors.token_stream import TokenStreamServer
from actors.tracing import count_calls, trace_steps
from afd_ray.config import Config, model_directory
from afd_ray.engine.attention import AttentionLoop
from afd_ray.engine.kv_cache import BlockAllocator, PagedCache, check_integrity
from afd_ray.engine.scheduler import Scheduler
from afd_ray.membership.epoch import Epoch
from afd_ray.models.checkpoint import Checkpoint, load_attention
from afd_ray.models.checkpoint import digest as checkpoint_digest
from afd_ray.models.config import DTYPES, ModelConfig
from afd_ray.request import Request, TokenOutput

MAX_CACHE_BYTES = 1 << 30
CACHE_SHARE = 0.1
"""Of the machine's free memory, for one actor's KV cache where `num_blocks` is auto."""


class AttentionActor:
    """One attention rank. Its control methods answer at once; the step loop runs in a thread of its own."""

    def __init__(self, name: str, config: Config, secret: bytes) -> None:
        self._config = config
        self._model_digest = 0
        self._member = Member(name, config, secret, on_failure=self._fail_requests)
        self._tokens = TokenStreamServer(self._submit, self._abort, secret=secret, host=ray.util.get_node_ip_address())
        self._loop: AttentionLoop | None = None
        self._port = 0

    @ray.method
    async def load(self) -> dict[str, Any]:
        """Load this role's tensors and open the token stream; gives where the actor runs."""
        if self._loop is None:
            self._loop = await asyncio.to_thread(self._build)
            self._port = await self._tokens.start()
        address = f"{ray.util.get_node_ip_address()}:{self._port}"
        return self._member.identity() | {"address": address, "model_digest": self._model_digest}

    @ray.method
    async def prepare(self, epoch: Epoch, rank: int, group_name: str, spin_us: float) -> dict[str, Any]:
        """Open this actor's side of the epoch's group; gives its endpoint."""
        return await self._member.prepare(epoch, rank, group_name, self._ready_loop().half.config, self._model_digest, spin_us)

    @ray.method
    async def connect(self, endpoints: dict[int, dict[str, Any]], timeout_s: float) -> dict[int, str]:
        """Connect and warm up every edge; gives the link kind by peer."""
        return await self._member.connect(endpoints, timeout_s)

    @ray.method
    async def start(self) -> None:
        """Begin to serve in the prepared epoch."""
        self._member.start(self._ready_loop())

    @ray.method
    async def halt(self) -> None:
        """Stop serving; requests in progress end with an error."""
        await self._member.halt()
        self._fail_requests("the attention actor left its epoch")

    @ray.method
    async def leave(self) -> None:
        """Leave the epoch's group, once every member has halted."""
        await self._member.leave()

    @ray.method
    async def lost(self) -> str:
        """Return the reason once the step loop has failed; never while it is well."""
        return await self._member.lost()

    @ray.method
    async def status(self) -> dict[str, Any]:
        """This actor's part of the cluster's status, with raw latencies (ms) of the last minute."""
        loop, now_s = self._ready_loop(), time.monotonic()
        pace = self._config.attention.pace
        return {
            "failure": self._member.failure,
            "rank": self._member.rank,
            "running": loop.scheduler.running,
            "waiting": loop.scheduler.waiting,
            "kv_used": loop.scheduler.kv_used,
            "kv_total": loop.scheduler.kv_total,
            "pace": pace.model_dump() if pace else None,
            "ttft_ms": loop.ttft.recent(now_s),
            "tpot_ms": loop.tpot.recent(now_s),
            "totals": loop.recorder.totals(),
        }

    @ray.method
    async def trace(self, steps: int, timeout_s: float) -> dict[str, Any]:
        """The stage events of the next `steps` micro-batches, or of those that came within the timeout."""
        return self._member.identity() | {"events": await trace_steps(self._ready_loop(), "head", steps, timeout_s)}

    @ray.method
    async def count_ray_calls(self, steps: int, timeout_s: float) -> dict[str, int]:
        """Calls on the step loop's thread over the next `steps` micro-batches, and how many of them go into Ray."""
        return await count_calls(self._ready_loop(), "head", steps, timeout_s)

    @ray.method
    async def check_integrity(self) -> list[str]:
        """What is wrong with the KV blocks, a line each; also tells of requests and streams left behind when idle."""
        loop = self._ready_loop()
        findings = await asyncio.wrap_future(loop.call(functools.partial(_findings, loop.scheduler)))
        if not loop.scheduler.has_work and self._tokens.requests:
            findings.append(f"{self._tokens.requests} requests are routed to a stream, but none is in progress")
        return findings

    @ray.method
    async def resident_bytes(self) -> dict[str, int]:
        """Memory: resident set of the process, and the weights held."""
        return await asyncio.to_thread(resident_bytes, self._ready_loop().half)

    def _build(self) -> AttentionLoop:
        config = self._config
        torch.set_num_threads(compute_threads(config.attention.num_cpus))
        checkpoint = Checkpoint.open(model_directory(config.model))
        self._model_digest = checkpoint_digest(checkpoint)
        dtype = checkpoint.config.dtype if config.model.dtype == "auto" else DTYPES[config.model.dtype]
        half = load_attention(checkpoint, dtype)
        cache, allocator = build_cache(config, half.config)
        scheduler = Scheduler(
            allocator=allocator,
            slots=1,
            max_tokens_per_micro_batch=config.pipeline.max_tokens_per_micro_batch,
            max_running_requests=config.pipeline.max_running_requests,
            max_context=max_context(config, half.config),
            eos_token_ids=half.config.eos_token_ids,
        )
        return AttentionLoop(half, cache, scheduler, self._tokens.publish, config.attention.pace)

    def _submit(self, request: Request) -> None:
        if self._member.failure is not None:
            raise RuntimeError(f"the attention actor has failed: {self._member.failure}")
        self._ready_loop().submit(request).add_done_callback(functools.partial(self._refuse, request.id))

    def _refuse(self, request_id: str, submitted: "Future[None]") -> None:
        error = submitted.exception()
        if isinstance(error, ValueError):
            self._tokens.refuse(request_id, str(error))
        elif error is not None:
            self._tokens.publish([TokenOutput(request_id, None, finish_reason="error", error=str(error))])

    def _abort(self, request_id: str) -> None:
        self._ready_loop().abort(request_id)

    def _fail_requests(self, reason: str) -> None:
        """After the step loop has ended: no request is left without an answer."""
        if self._loop is not None:
            lost = self._loop.abandon()
            self._tokens.publish([TokenOutput(request_id, None, finish_reason="error", error=reason) for request_id in lost])

    def _ready_loop(self) -> AttentionLoop:
        if self._loop is None:
            raise RuntimeError("the attention actor has not loaded its model")
        return self._loop


def max_context(config: Config, model: ModelConfig) -> int:
    """Tokens of prompt and answer that a request may come to."""
    return min(config.model.max_context or model.max_position_embedding, model.max_position_embedding)


def build_cache(config: Config, model: ModelConfig) -> tuple[PagedCache, BlockAllocator]:
    """The KV cache that the configuration asks for; `num_blocks` auto is what all running requests could need, within memory."""
    wanted = config.attention.kv_cache
    dtype = model.dtype if wanted.dtype == "auto" else DTYPES[wanted.dtype]
    if wanted.num_blocks != "auto":
        num_blocks = wanted.num_blocks
    else:
        block_bytes = wanted.block_size * model.num_hidden_layers * model.kv_width * dtype.itemsize
        per_request = -(-max_context(config, model) // wanted.block_size)
        free_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        budget = min(MAX_CACHE_BYTES, int(free_bytes * CACHE_SHARE)) // block_bytes
        num_blocks = max(1, min(per_request * config.pipeline.max_running_requests, budget))
    cache = PagedCache(
        layers=model.num_hidden_layers, num_blocks=num_blocks, block_size=wanted.block_size, head_dim=model.head_dim, dtype=dtype
    )
    return cache, BlockAllocator(num_blocks, wanted.block_size)


def _findings(scheduler: Scheduler) -> list[str]:
    return check_integrity(scheduler.allocator, scheduler.sequences)
