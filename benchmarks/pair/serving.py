"""The two halves as they serve requests, on a device of choice, with random weights: what `gpu_end_to_end` tells its processes to do."""

import time
from functools import partial
from typing import Any, NamedTuple

import torch

from afd_ray.engine.attention import AttentionLoop
from afd_ray.engine.compute import Compute, HostCompute, Needs
from afd_ray.engine.ffn import FFNLoop
from afd_ray.engine.gpu.compute import GPUCompute
from afd_ray.engine.kv_cache import BlockAllocator
from afd_ray.engine.loop import Wire
from afd_ray.engine.scheduler import Scheduler
from afd_ray.handoff.capacity import inbound_bytes
from afd_ray.handoff.mesh import Endpoint, RingMesh, open_mesh
from afd_ray.handoff.message import Header, Kind
from afd_ray.handoff.spin import SPIN_US
from afd_ray.kernels.gpu.capture import CUDAGraphs
from afd_ray.membership.epoch import Epoch
from afd_ray.models.config import ModelConfig
from afd_ray.request import Request, SamplingParams, TokenOutput
from benchmarks._random_model import random_attention, random_ffn
from benchmarks.pair.answering import ATTENTION, FFN

CONNECT_S = 60.0


class Served(NamedTuple):
    """What is served, and where."""

    config: ModelConfig
    device: str
    """cuda, or cpu: then by the kernels that CPU actors have."""
    narrow: bool
    """Weights in e4m3, and rows towards the FFN."""
    requests: int
    context: int
    """Tokens of prompt and answer."""
    micro_batches: int = 2
    block_size: int = 64
    rows: int = 512
    """Of a micro-batch, at most."""

    @property
    def wire_dtype(self) -> torch.dtype:
        return torch.float8_e4m3fn if self.narrow else self.config.dtype

    @property
    def decoding(self) -> int:
        return min(self.rows, self.requests)


class Answered(NamedTuple):
    """What came of it."""

    tokens: list[list[int]]
    """By request."""
    times_s: list[list[float]]
    """When each token was there, since the first request was given."""


class Side:
    """What both do: load, meet, part."""

    rank: int

    def __init__(self, served: Served) -> None:
        self.served, self.epoch = served, Epoch(1, 1, 1, 1, served.micro_batches)
        self.device = torch.device(served.device, 0 if served.device == "cuda" else None)
        self.compute = self._compute()
        self.mesh: RingMesh | None = None
        with torch.inference_mode():
            self.load()

    def load(self) -> None:
        raise NotImplementedError

    def _compute(self) -> Compute:
        if self.device.type == "cpu":
            return HostCompute()
        narrow = self.served.narrow
        return GPUCompute(
            self.device,
            quantise_experts=narrow,
            quantise_dense=narrow,
            quantise_projections=narrow,
            quantise_rows=narrow,
            capture=partial(CUDAGraphs, self.device),
        )

    def open(self) -> dict[str, Any]:
        """Where the other one finds this one."""
        served, peer = self.served, 1 - self.rank
        room = {peer: inbound_bytes(self.epoch, self.rank, peer, served.config, served.wire_dtype, served.rows)}
        self.mesh = open_mesh(self.rank, 2, 1, secret=b"benchmark", host="127.0.0.1", peers=room, spin_us=SPIN_US)
        return self.mesh.endpoint.to_dict()

    def connect(self, endpoints: dict[int, dict[str, Any]]) -> None:
        self._mesh.connect({rank: Endpoint.from_dict(endpoint) for rank, endpoint in endpoints.items()}, CONNECT_S)

    def leave(self) -> None:
        self._mesh.close()

    @property
    def _mesh(self) -> RingMesh:
        assert self.mesh is not None
        return self.mesh

    @property
    def wire(self) -> Wire:
        return Wire(self._mesh, self.epoch, self.rank, self.served.wire_dtype)


class ServingAttention(Side):
    rank = ATTENTION

    def load(self) -> None:
        served = self.served
        num_blocks = served.requests * -(-served.context // served.block_size)
        self.half = self.compute.attention(random_attention(served.config, self.device, narrow=served.narrow))
        self.cache = self.compute.cache(served.config, num_blocks, served.block_size, served.config.dtype)
        needs = Needs(served.rows, served.decoding, served.micro_batches, instances=1)
        self.compute.warm_up_attention(self.half, self.cache, needs)

    def run(self, prompts: list[list[int]], max_tokens: int) -> Answered:
        """Continue all at once, greedily."""
        served = self.served
        scheduler = Scheduler(
            allocator=BlockAllocator(self.cache.num_blocks, served.block_size),
            slots=1,
            max_tokens_per_micro_batch=served.rows,
            max_running_requests=served.requests,
            max_context=served.context,
            eos_token_ids=(),
        )
        answers = _Answers(len(prompts))
        loop = AttentionLoop(self.half, self.cache, scheduler, answers.take, begin=self.compute.begin)
        answers.enough = loop.stop
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        for index, prompt in enumerate(prompts):
            scheduler.add(Request(str(index), tuple(prompt), params))
        answers.started_s = time.perf_counter()
        with torch.inference_mode():
            loop.run(self.wire)
        self._mesh.send(FFN, Header(Kind.STOP, 1, ATTENTION))
        return Answered(answers.tokens, answers.times_s)


class _Answers:
    """Takes tokens, and calls `enough` when all have ended."""

    def __init__(self, requests: int) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(requests)]
        self.times_s: list[list[float]] = [[] for _ in range(requests)]
        self.started_s, self._left = 0.0, requests

    def enough(self) -> None:
        raise NotImplementedError

    def take(self, outputs: list[TokenOutput]) -> None:
        now_s = time.perf_counter() - self.started_s
        for output in outputs:
            index = int(output.request_id)
            if output.token_id is not None:
                self.tokens[index].append(output.token_id)
                self.times_s[index].append(now_s)
            self._left -= output.finish_reason is not None
        if not self._left:
            self.enough()


class ServingFFN(Side):
    rank = FFN

    def load(self) -> None:
        served = self.served
        self.half = self.compute.ffn(random_ffn(served.config, self.device, narrow=served.narrow))
        self.compute.warm_up_ffn(self.half, served.decoding, narrow=served.narrow)

    def run(self) -> None:
        """Until the attention side says that it is over."""
        try:
            with torch.inference_mode():
                FFNLoop(self.half).run(self.wire)
        except RuntimeError as error:
            if "STOP" not in str(error):
                raise
