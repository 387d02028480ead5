"""A CUDA device as what halves compute on."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from afd_ray.engine.compute import Needs
from afd_ray.engine.gpu.captured import AttentionGraphs
from afd_ray.engine.gpu.kv_cache import GPUPagedCache
from afd_ray.engine.gpu.memory import GPUMemory, cache_bytes, graph_bytes, workspace_bytes
from afd_ray.engine.gpu.passage import GPUPassage
from afd_ray.engine.gpu.warm_up import warm_up_attention, warm_up_ffn
from afd_ray.engine.gpu.whole_step import WholeSteps
from afd_ray.engine.kv_cache import PagedCache
from afd_ray.engine.passage import Passage
from afd_ray.engine.sequence import Chunk
from afd_ray.kernels.gpu.capture import Capture, CUDAGraphs
from afd_ray.kernels.gpu.captured_ffn import FFNGraphs
from afd_ray.kernels.gpu.halves import GPUFFN, FedFFN, gpu_attention, gpu_ffn
from afd_ray.kernels.regather import Read, regather
from afd_ray.models.config import ModelConfig
from afd_ray.models.layout import Part
from afd_ray.models.step3 import AttentionHalf, FFNHalf, FFNShard


class GPUCompute:
    """A `Compute` by the Triton kernels."""

    spare_blocks = 1

    def __init__(
        self,
        device: torch.device,
        share: float = 1.0,
        *,
        quantise_experts: bool = False,
        quantise_dense: bool = False,
        quantise_projections: bool = False,
        quantise_rows: bool = False,
        capture: Callable[[], Capture] | None = None,
        stays: bool = False,
    ) -> None:
        """`share` of the GPU that this actor may use; the CPU, where Triton interprets its kernels, is for tests.

        Held in e4m3, whatever they were read as: `quantise_experts`, routed experts; `quantise_dense`, shared experts and dense layers;
        `quantise_projections`, attention's. `quantise_rows`: attention gives what goes to the
        FFN in e4m3 too, as a wire of 8 bits or experts in e4m3 want it. `capture`: makes what captures a set of graphs, at the end of a
        warm-up; None: every step is launched anew. `stays`: rows cross between devices, and are on this one when they come and go.
        """
        self._stays = stays
        self._quantise_rows, self._capture = quantise_rows, capture
        self._graphs: dict[PagedCache, AttentionGraphs | WholeSteps] = {}
        self.device, self._share = device, share
        self._experts, self._dense, self._projections = quantise_experts, quantise_dense, quantise_projections
        self._instances = 0
        """Of the FFN, that attention is warmed up for."""

    @classmethod
    def of_first_gpu(cls, share: float, *, graphs: bool, stays: bool, **quantise: bool) -> "GPUCompute":
        """On the first CUDA GPU that this process sees; `graphs`: steps that only decode are captured."""
        device = torch.device("cuda", 0)
        capture = partial(CUDAGraphs, device) if graphs else None
        return cls(device, share, capture=capture, stays=stays, **quantise)

    @property
    def narrow_parts(self) -> frozenset[Part]:
        asked: dict[Part, bool] = {
            "attention": self._projections,
            "experts": self._experts,
            "shared": self._dense,
            "dense": self._dense,
        }
        return frozenset(part for part, is_asked in asked.items() if is_asked)

    def begin(self, half: AttentionHalf, cache: PagedCache, chunks: Sequence[Chunk], slot: int) -> Passage:
        """By graphs where there are any for these chunks."""
        graphs = self._graphs.get(cache)
        captured = None if graphs is None else graphs.begin(slot, chunks)
        return captured or GPUPassage(half, cache, chunks, self._instances, stays=self._stays)

    def attention(self, half: AttentionHalf) -> AttentionHalf:
        """Raises ValueError in one line for a shape that the kernels do not take."""
        return gpu_attention(half, self.device, quantise=self._quantise_rows, projections=self._projections, dense=self._dense)

    def ffn(self, half: FFNHalf) -> FFNHalf:
        """As `attention`."""
        return FedFFN(self.colocated_ffn(half), self.device, stays=self._stays)

    def regathered_ffn(self, held: FFNHalf, wanted: FFNShard, read: Read) -> FFNHalf:
        """As `attention`."""
        return self.ffn(regather(held, wanted, read))

    def colocated_ffn(self, half: FFNHalf) -> GPUFFN:
        """As `attention`."""
        return gpu_ffn(half, self.device, quantise=self._experts, dense=self._dense)

    def cache_bytes(self, config: ModelConfig, needs: Needs) -> int:
        torch.cuda.empty_cache()  # of what loading needed in between
        free, total = torch.cuda.mem_get_info(self.device)
        memory = GPUMemory(total, free, torch.cuda.memory_reserved(self.device))
        graphs = 0 if self._capture is None else graph_bytes(config, needs)
        return cache_bytes(memory, self._share, workspace_bytes(config, needs.rows) + graphs)

    def cache(self, config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype) -> PagedCache:
        """Raises ValueError in one line for a cache that the kernels do not take, or that has no room."""
        if num_blocks < 1:
            raise ValueError("attention.kv_cache.num_blocks: auto finds no room on this GPU beside the weights")
        if block_size & block_size - 1:
            raise ValueError(f"attention.kv_cache.block_size: must be a power of two on a GPU, got {block_size}")
        if dtype not in (config.dtype, torch.float8_e4m3fn):
            raise ValueError(f"attention.kv_cache.dtype: must be the model's {config.dtype} or fp8 on a GPU, got {dtype}")
        return GPUPagedCache(
            layers=config.num_hidden_layers,
            num_blocks=num_blocks,
            block_size=block_size,
            head_dim=config.head_dim,
            dtype=dtype,
            device=self.device,
            spare=self.spare_blocks,
        )

    def warm_up_attention(self, half: AttentionHalf, cache: PagedCache, needs: Needs, ffn: FFNHalf | None = None) -> None:
        """Kernels are compiled, or read from Triton's own cache, by being launched; what rows write goes to the cache's spare block."""
        needs = needs._replace(instances=max(needs.instances, self._instances))
        with _told_in_one_line("attention"):
            warm_up_attention(half, cache, needs, ffn)
            if self._capture is not None:
                self._capture_attention(half, cache, needs, self._capture, ffn)
        self._instances = needs.instances

    def _capture_attention(
        self, half: AttentionHalf, cache: PagedCache, needs: Needs, capture: Callable[[], Capture], ffn: FFNHalf | None
    ) -> None:
        """Unless the graphs that there are do: they serve fewer slots and instances too."""
        held = self._graphs.get(cache)
        if held is not None:
            if needs.slots <= held.needs.slots and needs.instances <= held.needs.instances:
                return
            needs = needs._replace(slots=max(needs.slots, held.needs.slots))
        if ffn is None:
            self._graphs[cache] = AttentionGraphs(half, cache, needs, capture(), stays=self._stays)
        else:
            self._graphs[cache] = WholeSteps(half, ffn, cache, needs, capture())

    def warm_up_ffn(self, half: FFNHalf, rows: int, narrow: bool) -> None:
        """As `warm_up_attention`."""
        assert isinstance(half, FedFFN)
        with _told_in_one_line("ffn"):
            warm_up_ffn(half)
            if self._capture is not None and half.replayed is None:
                half.replayed = FFNGraphs(half, rows, narrow, self._capture())


@contextmanager
def _told_in_one_line(role: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of Triton, of its assembler or of the driver
        reason = next(iter(str(error).strip().splitlines()), "")
        told = f"{role}.num_gpus: this GPU cannot run the kernels of this model: {type(error).__name__}: {reason}"
        raise RuntimeError(told) from error
