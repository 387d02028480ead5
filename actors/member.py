"""What attention and FFN actors share: joining an epoch's collective group, and the thread of their step loop."""

import asyncio
import logging
import os
import threading
from abc import ABC, abstractmethod
from typing import Any, cast

import ray
import ray.util.collective as col
import torch

from actors.collective import BACKEND, AFDGroup, register_backend
from actors.memory import resident_bytes
from actors.tracing import count_calls, trace_steps
from afd_ray.config import Config, model_directory
from afd_ray.engine.loop import StepLoop, Wire
from afd_ray.handoff.capacity import inbound_bytes
from afd_ray.handoff.mesh import Endpoint
from afd_ray.handoff.rows import WIRE_DTYPES
from afd_ray.membership.contract import contract_digest
from afd_ray.membership.epoch import Epoch
from afd_ray.models.checkpoint import Checkpoint, Progress, digest
from afd_ray.models.config import DTYPES, ModelConfig
from afd_ray.models.step3 import AttentionHalf, FFNHalf
from afd_ray.telemetry import clock_offset_ns

logger = logging.getLogger(__name__)


class Member(ABC):
    """One actor's place in an epoch: what both roles can be asked. Control methods run on the actor's event loop."""

    def __init__(self, name: str, config: Config, secret: bytes) -> None:
        self._name, self._config, self._secret = name, config, secret
        self._failure: str | None = None
        self._failed = asyncio.Event()
        self._group: AFDGroup | None = None
        self._group_name = ""
        self._wire: Wire | None = None
        self._thread: threading.Thread | None = None
        self._model_digest = 0
        self._loaded = 0.0
        self._traced_enough = asyncio.Event()

    @abstractmethod
    def _ready_loop(self) -> StepLoop:
        """The step loop of the loaded model; RuntimeError before `load`."""

    @abstractmethod
    def _ready_half(self) -> AttentionHalf | FFNHalf:
        """The loaded half of the model; RuntimeError before `load`."""

    def _held(self) -> "list[AttentionHalf | FFNHalf]":
        """Everything of the model in this process."""
        return [self._ready_half()]

    @abstractmethod
    def _stages(self, steps: int) -> tuple[str, int]:
        """The stage that counts steps, and how often it runs in that many."""

    def _ended(self, reason: str) -> None:
        """The step loop is over, for this reason; called on the event loop."""
        logger.info("%s: the step loop is over: %s", self._name, reason)

    @ray.method
    async def loaded(self) -> float:
        """Share of this role's tensors that is loaded, 0 to 1."""
        return self._loaded

    @ray.method
    async def prepare(self, epoch: Epoch, rank: int, group_name: str, spin_us: float) -> dict[str, Any]:
        """Open this member's side of the epoch's group; gives its endpoint for `connect`."""
        config, model = self._config, self._ready_half().config
        kind = config.handoff.kind
        if kind == "nccl":
            raise ValueError(f"handoff.kind: {kind} is not supported yet, use auto, shm, tcp or gloo")
        register_backend()
        # Ray types the name of a backend as one of its own two.
        await asyncio.to_thread(col.init_collective_group, epoch.world_size, rank, cast(Any, BACKEND), group_name)
        group: AFDGroup = col.get_group_handle(group_name)
        dtype = wire_dtype(config, model)
        rows = config.pipeline.max_tokens_per_micro_batch
        peers = {peer: inbound_bytes(epoch, rank, peer, model, dtype, rows) for peer in epoch.peers(rank)}
        contract = contract_digest(self._model_digest, epoch, dtype)
        host = ray.util.get_node_ip_address()
        group.open(secret=self._secret, host=host, peers=peers, kind=kind, spin_us=spin_us, digest=contract)
        self._group, self._group_name = group, group_name
        self._wire = Wire(group.mesh, epoch, rank, dtype)
        return group.endpoint.to_dict()

    @ray.method
    async def connect(self, endpoints: dict[int, dict[str, Any]], timeout_s: float) -> dict[int, str]:
        """Connect and warm up every edge; gives the link kind by peer. Raises LinkError or TimeoutError naming the edge."""
        if self._group is None:
            raise RuntimeError(f"{self._name} has joined no epoch")
        peers = {rank: Endpoint.from_dict(endpoint) for rank, endpoint in endpoints.items()}
        await asyncio.to_thread(self._group.connect, peers, timeout_s)
        return self._group.mesh.edge_kinds()

    @ray.method
    async def start(self) -> None:
        """Serve in the prepared epoch, in a thread of its own, until `halt` or a failure."""
        if self._wire is None:
            raise RuntimeError(f"{self._name} has joined no epoch")
        self._failure = None
        self._failed.clear()
        arguments = (self._ready_loop(), self._wire, asyncio.get_running_loop())
        self._thread = threading.Thread(target=self._run, args=arguments, name="step-loop", daemon=True)
        self._thread.start()

    @ray.method
    async def halt(self) -> None:
        """End the step loop; harmless when there is none. Members leave only when all have halted, or they would miss each other."""
        await self._halt()

    @ray.method
    async def leave(self) -> None:
        """Leave the epoch's group; harmless when there is none."""
        await self._halt()
        if self._group is not None:
            self._group.mesh.close()
            await asyncio.to_thread(col.destroy_collective_group, self._group_name)
        self._group = self._wire = None

    @ray.method
    async def lost(self) -> str:
        """Return the reason once the step loop has failed or was halted; never while it is well."""
        await self._failed.wait()
        return self._failure or "halted"

    @ray.method
    async def trace(self, steps: int, timeout_s: float) -> dict[str, Any]:
        """The stage events of the next `steps` micro-batches, or of those that came within the timeout or until `end_trace`."""
        self._traced_enough.clear()
        events = await trace_steps(self._ready_loop(), *self._stages(steps), timeout_s, self._traced_enough)
        return self._identity() | {"events": events}

    @ray.method
    async def end_trace(self) -> None:
        """Let a trace under way end with what it has."""
        self._traced_enough.set()

    @ray.method
    async def count_ray_calls(self, steps: int, timeout_s: float) -> dict[str, int]:
        """Calls on the step loop's thread over the next `steps` micro-batches, and how many of them go into Ray."""
        return await count_calls(self._ready_loop(), *self._stages(steps), timeout_s)

    @ray.method
    async def resident_bytes(self) -> dict[str, int]:
        """Memory: resident set of the process, and the weights held."""
        return await asyncio.to_thread(resident_bytes, self._held())

    async def _halt(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            self._ready_loop().stop()
            await asyncio.to_thread(thread.join)
            self._failed.set()  # whoever watches this epoch's loop need not watch any longer
            self._ended(f"{self._name} left its epoch")

    def _identity(self) -> dict[str, Any]:
        """Where this actor runs, and which checkpoint it has read."""
        return {
            "id": self._name,
            "node": ray.get_runtime_context().get_node_id(),
            "address": ray.util.get_node_ip_address(),
            "pid": os.getpid(),
            "offset_ns": clock_offset_ns(),
            "model_digest": self._model_digest,
        }

    def _standing(self) -> dict[str, Any]:
        """What the status of either role begins with."""
        return {
            "failure": self._failure,
            "rank": self._wire.rank if self._wire else None,
            "totals": self._ready_loop().recorder.totals(),
        }

    def _open_checkpoint(self, num_cpus: float) -> tuple[Checkpoint, torch.dtype]:
        """The model's files and the dtype to compute in; takes the threads that `num_cpus` allows."""
        torch.set_num_threads(max(1, min(int(num_cpus), os.cpu_count() or 1)))
        model = self._config.model
        checkpoint = Checkpoint.open(model_directory(model))
        self._model_digest = digest(checkpoint)
        return checkpoint, checkpoint.config.dtype if model.dtype == "auto" else DTYPES[model.dtype]

    def _progress(self, part: int = 0, parts: int = 1) -> Progress:
        """Takes in how far one of several loads, done one after the other, has come."""

        def note(done: int, total: int) -> None:
            self._loaded = (part + (done / total if total else 1.0)) / parts

        return note

    def _run(self, loop: StepLoop, wire: Wire, events: asyncio.AbstractEventLoop) -> None:
        try:
            loop.run(wire)
        except Exception as error:  # whatever ends the loop ends this member's part in the epoch
            logger.exception("%s: the step loop failed", self._name)
            wire.mesh.close()
            events.call_soon_threadsafe(self._fail, f"{type(error).__name__}: {error}")

    def _fail(self, reason: str) -> None:
        """On the event loop, where requests are taken too: none can slip in between."""
        self._failure = reason
        self._failed.set()
        self._ended(reason)


def wire_dtype(config: Config, model: ModelConfig) -> torch.dtype:
    """Of the hidden rows from attention to FFN."""
    return model.dtype if config.handoff.wire_dtype == "auto" else WIRE_DTYPES[config.handoff.wire_dtype]
