"""A whole cluster in one process: the real step loops in threads over the loopback mesh. For tests and small experiments."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from types import TracebackType

import torch

from afd_ray.engine.attention import AttentionLoop
from afd_ray.engine.colocated import ColocatedLoop
from afd_ray.engine.compute import Compute, HostCompute, Needs
from afd_ray.engine.ffn import FFNLoop
from afd_ray.engine.kv_cache import BlockAllocator, PagedCache
from afd_ray.engine.loop import OnLost, StepLoop, Wire
from afd_ray.engine.scheduler import Scheduler
from afd_ray.handoff.capacity import inbound_bytes
from afd_ray.handoff.loopback import loopback_group
from afd_ray.handoff.mesh import LinkKind, Mesh, RingMesh, open_mesh
from afd_ray.membership.epoch import Epoch
from afd_ray.models.config import ModelConfig
from afd_ray.models.step3 import AttentionHalf, FFNHalf, FFNShard
from afd_ray.request import Request, TokenOutput

LoadFFN = Callable[[FFNShard], FFNHalf]

CONNECT_TIMEOUT_S = 20.0
HOST = HostCompute()


@contextmanager
def ring_group(
    epoch: Epoch, config: ModelConfig, wire_dtype: torch.dtype, max_rows: int, kinds: Sequence[LinkKind] = ("auto",)
) -> Iterator[list[RingMesh]]:
    """All members of an epoch in this process over real links, connected; `kinds` are dealt to the ranks in turn."""
    meshes = [
        open_mesh(
            rank,
            epoch.world_size,
            epoch.number,
            secret=b"one process",
            host="127.0.0.1",
            peers={peer: inbound_bytes(epoch, rank, peer, config, wire_dtype, max_rows) for peer in epoch.peers(rank)},
            kind=kinds[rank % len(kinds)],
        )
        for rank in range(epoch.world_size)
    ]
    try:
        endpoints = {mesh.rank: mesh.endpoint for mesh in meshes}
        with ThreadPoolExecutor(len(meshes)) as pool:
            list(pool.map(lambda mesh: mesh.connect(endpoints, CONNECT_TIMEOUT_S), meshes))
        yield meshes
    finally:
        for mesh in meshes:
            mesh.close()


class LocalCluster:
    """Attention and FFN loops that serve in one epoch after the other; use as a context manager."""

    def __init__(
        self,
        attention: AttentionHalf,
        load_ffn: LoadFFN,
        epoch: Epoch,
        *,
        num_blocks: int = 1024,
        block_size: int = 16,
        max_tokens_per_micro_batch: int = 512,
        max_running_requests: int = 256,
        wire_dtype: torch.dtype | None = None,
        meshes: Sequence[Mesh] | None = None,
        on_lost: OnLost | None = None,
        compute: Compute = HOST,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        """`wire_dtype`, `cache_dtype` None: the model's. `meshes`: connected, in the order of the group ranks; None: a loopback group.

        `compute`: what made `attention` and what `load_ffn` gives.

        `on_lost`: told, by each loop, of an epoch whose links broke; None: that is a failure.
        """
        self.epoch, self.config = epoch, attention.config
        self._wire_dtype = wire_dtype or attention.config.dtype
        self.failures: list[str] = []
        self._outputs: queue.SimpleQueue[list[TokenOutput]] = queue.SimpleQueue()
        self._half, self._load_ffn, self._on_lost, self._compute = attention, load_ffn, on_lost, compute
        self._cache_dtype = cache_dtype or attention.config.dtype
        self._sizes = (num_blocks, block_size, max_tokens_per_micro_batch, max_running_requests)
        self._meshes = self._meshes_of(epoch, meshes)
        self.attention = [self._attention_loop(epoch) for _ in range(epoch.attention)]
        self.ffn = [FFNLoop(self._ffn(epoch.shard(rank, self.config))) for rank in epoch.ffn_ranks]
        self._threads: dict[StepLoop, threading.Thread] = {}

    def __enter__(self) -> "LocalCluster":
        self._start(self._loops)
        for loop, wire in zip(self._loops, self._wires(), strict=True):
            loop.switch(wire)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def change(self, epoch: Epoch, meshes: Sequence[Mesh] | None = None, *, drain: bool = True) -> list[float]:
        """Go on in another epoch; gives the attention ranks' pauses in ms.

        Loops that it has no rank for end, and their requests go on at others; loops that it lacks are begun. Without `drain` what is in
        flight is taken back, as after a loss.
        """
        halves = [self._ffn(epoch.shard(rank, self.config)) for rank in epoch.ffn_ranks]
        for loop in self.attention[: epoch.attention]:
            self._warm_up(loop.cache, epoch)
        attention = [*self.attention[: epoch.attention]]
        attention += [self._attention_loop(epoch) for _ in range(len(attention), epoch.attention)]
        ffn = [*self.ffn[: epoch.ffn]]
        ffn += [FFNLoop(half) for half in halves[len(ffn) :]]
        old, leaving = self._meshes, self._loops
        moved = [
            progress for loop in self.attention[epoch.attention :] for progress in loop.call(partial(_take_out, loop)).result()
        ]
        if drain:
            for drained in [loop.drain() for loop in self.attention]:
                drained.result()
        self.epoch, self.attention, self.ffn, self._meshes = epoch, attention, ffn, self._meshes_of(epoch, meshes)
        self._start([loop for loop in self._loops if loop not in self._threads])
        wires = self._wires()
        entered = [loop.switch(wire) for loop, wire in zip(attention, wires, strict=False)]
        switched = [loop.switch(wire, half) for loop, wire, half in zip(ffn, wires[epoch.attention :], halves, strict=True)]
        pauses = [pause.result() for pause in entered]
        wait(switched)
        self._end([loop for loop in leaving if loop not in self._loops], old)
        for i, (request, generated) in enumerate(moved):
            attention[i % epoch.attention].submit(request, generated)
        return pauses

    def generate(self, requests: Sequence[Request], timeout_s: float = 120.0) -> dict[str, list[TokenOutput]]:
        """Every request's outputs by id, requests dealt to the attention ranks in turn; raises RuntimeError when a loop fails."""
        for i, request in enumerate(requests):
            self.attention[i % len(self.attention)].submit(request).result(timeout_s)
        return self.collect((request.id for request in requests), timeout_s)

    def collect(self, request_ids: Iterable[str], timeout_s: float = 120.0) -> dict[str, list[TokenOutput]]:
        """Outputs until every one of these requests has ended."""
        outputs: dict[str, list[TokenOutput]] = {request_id: [] for request_id in request_ids}
        unfinished = set(outputs)
        while unfinished:
            for output in self._next(timeout_s):
                outputs.setdefault(output.request_id, []).append(output)
                if output.finish_reason is not None:
                    unfinished.discard(output.request_id)
        return outputs

    def stop(self) -> None:
        """End the loops and their threads."""
        self._end(self._loops, self._meshes)

    def _next(self, timeout_s: float) -> list[TokenOutput]:
        try:
            outputs = self._outputs.get(timeout=timeout_s)
        except queue.Empty:
            raise RuntimeError(f"no output in {timeout_s:g} s; failures: {self.failures or 'none'}") from None
        if self.failures:
            raise RuntimeError(self.failures[0])
        return outputs

    @property
    def _loops(self) -> list[StepLoop]:
        """In the order of the group ranks."""
        return [*self.attention, *self.ffn]

    def _wires(self) -> list[Wire]:
        return [Wire(mesh, self.epoch, rank, self._wire_dtype) for rank, mesh in enumerate(self._meshes)]

    def _meshes_of(self, epoch: Epoch, meshes: Sequence[Mesh] | None) -> list[Mesh]:
        return list(meshes) if meshes is not None else loopback_group(epoch.world_size, epoch.number)

    def _attention_loop(self, epoch: Epoch) -> AttentionLoop:
        cache, scheduler = self._cache_and_scheduler(epoch, *self._sizes)
        if epoch.ffn:
            self._warm_up(cache, epoch)
            return AttentionLoop(self._half, cache, scheduler, self._outputs.put, begin=self._compute.begin)
        ffn = self._load_ffn(FFNShard.whole(self.config))
        self._warm_up(cache, epoch, ffn)
        return ColocatedLoop(self._half, ffn, cache, scheduler, self._outputs.put, begin=self._compute.begin)

    def _ffn(self, shard: FFNShard) -> FFNHalf:
        half = self._load_ffn(shard)
        rows = self.epoch.attention * min(self._sizes[2:])
        self._compute.warm_up_ffn(half, rows, narrow=self._wire_dtype is torch.float8_e4m3fn)
        return half

    def _warm_up(self, cache: PagedCache, epoch: Epoch, ffn: FFNHalf | None = None) -> None:
        needs = Needs(self._sizes[2], min(self._sizes[2:]), epoch.micro_batches, epoch.expert_parallel)
        self._compute.warm_up_attention(self._half, cache, needs, ffn)

    def _cache_and_scheduler(
        self, epoch: Epoch, num_blocks: int, block_size: int, max_tokens: int, max_running: int
    ) -> tuple[PagedCache, Scheduler]:
        config = self.config
        cache = self._compute.cache(config, num_blocks, block_size, self._cache_dtype)
        scheduler = Scheduler(
            allocator=BlockAllocator(num_blocks, block_size),
            slots=epoch.micro_batches,
            max_tokens_per_micro_batch=max_tokens,
            max_running_requests=max_running,
            max_context=config.max_position_embedding,
            eos_token_ids=config.eos_token_ids,
        )
        return cache, scheduler

    def _start(self, loops: Sequence[StepLoop]) -> None:
        for loop in loops:
            loop.on_lost = self._on_lost
            thread = self._threads[loop] = threading.Thread(target=self._run, args=(loop,), name="step-loop", daemon=True)
            thread.start()

    def _end(self, loops: Sequence[StepLoop], meshes: Sequence[Mesh]) -> None:
        for loop in loops:
            loop.stop()
        for loop in loops:
            thread = self._threads.pop(loop, None)
            if thread is not None:
                thread.join(timeout=10)
        for mesh in meshes:
            mesh.close()

    def _run(self, loop: StepLoop) -> None:
        try:
            loop.run()
        except Exception as error:  # told to whoever waits for outputs
            number = loop.epoch_number
            rank = "a loop without an epoch" if number is None else f"rank {loop.wire.rank}"
            self.failures.append(f"{rank}: {type(error).__name__}: {error}")
            loop.abandon()  # nobody waits for it
            self._outputs.put([])


def _take_out(loop: AttentionLoop) -> list[tuple[Request, tuple[int, ...]]]:
    """On the loop's thread: its requests with the tokens they have, to go on elsewhere."""
    progress = loop.scheduler.requests_in_progress()
    loop.abort_all()
    return progress
