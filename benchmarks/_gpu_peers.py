"""Other libraries' kernels for the same numbers, where they are installed: timed beside ours, or left out with the reason told once.

None of them is needed: FlashAttention-3 comes with `fa3-fwd`, FlashInfer with `flashinfer-python`, DeepGEMM with `sgl-deep-gemm`.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from afd_ray.handoff.quantise import blocks_of
from afd_ray.kernels.gpu.expert_gemm import Experts
from afd_ray.kernels.gpu.paged_softmax import Rows
from benchmarks._gpu import Line, Run, median_us

Prepare = Callable[[], Run]
"""Imports the library and lays its tensors out; what it returns is timed."""

FLASHINFER_BYTES = 256 << 20
"""Of FlashInfer's workspace."""


class Peers:
    """Times peers, and remembers why some cannot be had."""

    def __init__(self) -> None:
        self._reasons: dict[str, str] = {}

    def times_us(self, peers: Mapping[str, Prepare]) -> dict[str, float | None]:
        """By name; None: left out. One that failed once is not tried again."""
        return {name: self._time_us(name, prepare) for name, prepare in peers.items()}

    def notes(self) -> Iterator[Line]:
        """Why the others are left out, to be printed below the table."""
        for name, reason in self._reasons.items():
            yield Line(f"\n{name} is left out: {reason}", True, None)

    def _time_us(self, name: str, prepare: Prepare) -> float | None:
        if name in self._reasons:
            return None
        try:
            return median_us(prepare())
        except Exception as error:  # whatever another library runs into, ours are measured
            first = str(error).strip().splitlines()[:1]
            self._reasons[name] = f"{type(error).__name__}: {first[0] if first else 'no reason given'}"
            return None


def cells(times_us: Mapping[str, float | None], ours_us: float) -> str:
    """A column each, and how many times as long as ours the quickest takes."""
    known = [time for time in times_us.values() if time is not None]
    columns = ["-" if time is None else f"{time:.0f}" for time in times_us.values()]
    return " | ".join([*columns, f"{min(known) / ours_us:.2f}" if known else "-"])


def flash_attention_3(inputs: Rows, context: int) -> Run:
    """Over the same pages, the query heads packed. e4m3 keys want e4m3 queries, which ours do not."""
    interface = importlib.import_module("fa3_fwd_interface")
    keys, values = inputs.blocks.unbind(3)  # [P, PAGE, G, D]
    q = inputs.q.to(inputs.blocks.dtype)[:, None]
    table = inputs.tables.view(len(q), -1)
    return lambda: interface.flash_attn_with_kvcache(
        q, keys, values, cache_seqlens=inputs.contexts, page_table=table, pack_gqa=True
    )


def flashinfer_decode(inputs: Rows, context: int) -> Run:
    """Its second generation's kernel with tensor cores, over pages that it wants keys and values apart in."""
    library = importlib.import_module("flashinfer")
    rows, heads, dim = inputs.q.shape
    page, key_heads = inputs.blocks.shape[1:3]
    pages = len(inputs.tables) // rows
    ends = torch.arange(0, rows * pages + 1, pages, dtype=torch.int32, device="cuda")
    last = torch.full((rows,), context - (pages - 1) * page, dtype=torch.int32, device="cuda")
    workspace = torch.zeros(FLASHINFER_BYTES, dtype=torch.uint8, device="cuda")
    wrapper = library.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True, backend="fa2")
    dtypes = {"q_data_type": inputs.q.dtype, "kv_data_type": inputs.blocks.dtype}
    wrapper.plan(ends, inputs.tables, last, heads, key_heads, dim, page, **dtypes)
    both = tuple(part.contiguous() for part in inputs.blocks.unbind(3))
    return lambda: wrapper.run(inputs.q, both)


def deep_gemm(experts: Experts, x: Tensor, ids: Tensor) -> Run:
    """Its two grouped products alone, over rows that are sorted, padded and in e4m3 already: no SwiGLU, no weights, no sum."""
    library = importlib.import_module("deep_gemm")
    places, groups = padded_by_expert(ids, len(experts.gate), library.get_mk_alignment_for_contiguous_layout())
    picked = x.view(torch.uint8)[places // ids.shape[1]].view(x.dtype)  # bytes, as e4m3 may not be indexed
    wide, narrow = picked, _e4m3(len(places), experts.gate.shape[1])
    gate_up = torch.cat((experts.gate, experts.up), dim=1), torch.cat((experts.gate_scales, experts.up_scales), dim=1)
    down = experts.down, experts.down_scales
    first = torch.empty(len(places), gate_up[0].shape[1], dtype=torch.bfloat16, device="cuda")
    second = torch.empty(len(places), experts.down.shape[1], dtype=torch.bfloat16, device="cuda")

    rows, inner = (wide, _ones(wide)), (narrow, _ones(narrow))

    def run() -> None:
        library.m_grouped_fp8_gemm_nt_contiguous(rows, gate_up, first, groups, disable_ue8m0_cast=True)
        library.m_grouped_fp8_gemm_nt_contiguous(inner, down, second, groups, disable_ue8m0_cast=True)

    return run


def padded_by_expert(ids: Tensor, experts: int, alignment: int) -> tuple[Tensor, Tensor]:
    """The assignments of experts 0..experts-1 one expert after the other, each one's up to a multiple of `alignment`, and their experts; -1: padding."""
    places, groups = [], []
    for expert in range(experts):
        own = (ids.flatten() == expert).nonzero().squeeze(1)
        padding = -len(own) % alignment
        places.append(F.pad(own, (0, padding)))
        groups.append(F.pad(torch.full_like(own, expert), (0, padding), value=-1))
    return torch.cat(places), torch.cat(groups).int()


def _e4m3(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, device="cuda").to(torch.float8_e4m3fn)


def _ones(rows: Tensor) -> Tensor:
    return torch.ones(len(rows), blocks_of(rows.shape[1]), device="cuda")
