"""What a step tells a GPU, what goes there and comes back, and the room for keys and values."""

import importlib.util

import pytest
import torch

from actors.device import compute_for
from afd_ray.config import parse_config
from afd_ray.engine.compute import HostCompute
from afd_ray.engine.gpu.compute import GPUCompute
from afd_ray.engine.gpu.memory import GPUMemory, cache_bytes, workspace_bytes
from afd_ray.engine.gpu.passage import write_parts
from afd_ray.engine.gpu.step import describe
from afd_ray.engine.kv_cache import PagedCache
from afd_ray.engine.passage import Part
from afd_ray.engine.sequence import Chunk, Sequence
from afd_ray.kernels.gpu.transfers import ALIGNMENT, Staging, download, upload
from afd_ray.models.presets import PRESETS
from afd_ray.request import Request
from tests.triton_device import DEVICE

HERE = torch.device(DEVICE)


def chunk(name: str, table: list[int], start: int, count: int, samples: bool = True) -> Chunk:
    sequence = Sequence(Request(name, tuple(range(100, 100 + start + count))))
    sequence.block_table = table
    return Chunk(sequence, start, count, samples)


def test_rows_that_decode_are_described_before_chunks() -> None:
    cache = PagedCache(layers=1, num_blocks=10, block_size=4, head_dim=16, dtype=torch.float32)
    chunks = [chunk("a", [7, 2], 3, 3, samples=False), chunk("b", [5], 2, 1), chunk("c", [1], 0, 2), chunk("d", [3, 4], 4, 1)]
    described = describe(chunks, cache, heads=32)
    assert {name: field.tolist() for name, field in described._asdict().items() if name != "decoding"} == {
        "token_ids": [102, 104, 103, 104, 105, 100, 101],
        "positions": [2, 4, 3, 4, 5, 0, 1],
        "slots": [22, 16, 31, 8, 9, 4, 5],
        "starts": [0, 1, 3, 3, 3, 5, 5],
        "sample_rows": [0, 6, 1],  # b, c, d
        "tables": [5, 3, 4, 7, 2, 1],
        "first_rows": [2, 0, 3],  # 64 queries are two rows of 32 heads
        "row_counts": [1, 2, 2],
    }
    assert described.decoding == 2


def test_a_step_that_only_decodes_has_no_tiles() -> None:
    cache = PagedCache(layers=1, num_blocks=10, block_size=4, head_dim=16, dtype=torch.float32)
    described = describe([chunk("a", [7, 2], 4, 1)], cache, heads=4)
    assert (described.decoding, len(described.first_rows), len(described.row_counts)) == (1, 0, 0)


def test_parts_lie_one_after_the_other_and_rows_know_where() -> None:
    parts = [
        Part(0, slice(0, 2), torch.full((2, 3), 1.0, dtype=torch.bfloat16)),
        Part(0, slice(2, 4), torch.full((2, 3), 2.0, dtype=torch.bfloat16)),
        Part(2, torch.tensor([3, 1]), torch.full((2, 3), 4.0, dtype=torch.bfloat16)),
    ]
    sums, places = torch.empty(6, 3), torch.empty(3, 4, dtype=torch.int32)
    write_parts(parts, sums, places)
    assert sums[:, 0].tolist() == [1, 1, 2, 2, 4, 4]
    assert places.tolist() == [[0, 1, 2, 3], [-1, -1, -1, -1], [-1, 5, -1, 4]]


def test_tensors_of_any_dtype_go_to_the_device_and_back() -> None:
    tensors = [
        torch.arange(5, dtype=torch.uint8),
        torch.randn(3, 2),
        torch.empty(0, dtype=torch.int32),
        torch.randn(2, 3).t().bfloat16(),
    ]
    sent = upload(tensors, HERE)
    for tensor, there, back in zip(tensors, sent, download(sent), strict=True):
        assert torch.equal(tensor, back)
        assert there.device.type == HERE.type
        assert there.is_contiguous()
        assert there.data_ptr() % 64 == 0 or not there.numel()


def test_what_is_staged_may_be_written_until_it_is_sent() -> None:
    staging = Staging(HERE, (torch.float32, (2,)), (torch.int32, (1,)))
    staging.tensors[0].fill_(3.0)
    staging.tensors[1].fill_(7)
    floats, ints = staging.send()
    assert (floats.tolist(), ints.tolist()) == ([3.0, 3.0], [7])
    assert ALIGNMENT % 16 == 0


GIB = 1 << 30


@pytest.mark.parametrize(
    ("memory", "share", "expected_gib"),
    [
        (GPUMemory(total=100 * GIB, free=80 * GIB, held=15 * GIB), 1.0, 70),  # free less what is left alone, less the workspace
        (GPUMemory(total=100 * GIB, free=80 * GIB, held=15 * GIB), 0.5, 29),  # half of it, less its weights
        (GPUMemory(total=100 * GIB, free=20 * GIB, held=15 * GIB), 0.5, 14),  # others took more than their share
        (GPUMemory(total=100 * GIB, free=5 * GIB, held=90 * GIB), 1.0, 0),
    ],
)
def test_keys_and_values_get_what_is_left(memory: GPUMemory, share: float, expected_gib: int) -> None:
    assert cache_bytes(memory, share, 2 * GIB) // GIB == expected_gib


def test_a_step_at_step_3_s_size_needs_no_more_than_a_few_gigabytes() -> None:
    config = PRESETS["step3"]
    assert 0.2 * GIB < workspace_bytes(config, 512) < 2 * GIB
    assert workspace_bytes(config, 1024) > workspace_bytes(config, 512)


@pytest.mark.parametrize(
    ("num_blocks", "block_size", "dtype", "reason"),
    [
        (0, 16, torch.float32, r"num_blocks: auto finds no room"),
        (4, 12, torch.float32, r"block_size: must be a power of two on a GPU, got 12"),
        (4, 16, torch.bfloat16, r"dtype: must be the model's torch\.float32 or fp8 on a GPU"),
    ],
)
def test_a_cache_that_the_kernels_do_not_take_is_refused(
    num_blocks: int, block_size: int, dtype: torch.dtype, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        GPUCompute(HERE).cache(PRESETS["step3-tiny"], num_blocks, block_size, dtype)


def test_there_is_room_for_four_times_as_many_blocks_in_e4m3_as_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the spare block."""
    pytest.importorskip("ray")
    from actors.attention import build_cache

    compute, model = GPUCompute(HERE), PRESETS["step3-tiny"]
    block_bytes = 16 * model.num_hidden_layers * model.kv_width
    monkeypatch.setattr(GPUCompute, "cache_bytes", lambda *arguments: 40 * block_bytes)
    blocks = {}
    for name in ("auto", "fp8"):
        asked = {"kv_cache": {"dtype": name, "block_size": 16}, "num_gpus": 1}
        cache, allocator = build_cache(parse_config({"attention": asked}), model, compute)
        blocks[name] = allocator.total
        assert cache.nbytes <= 40 * block_bytes
        assert cache.token_bytes * 16 * (allocator.total + 1) == cache.nbytes
    assert blocks == {"auto": 10 - 1, "fp8": 40 - 1}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_an_actor_that_finds_no_gpu_says_so_in_one_line() -> None:
    with pytest.raises(RuntimeError, match=r"^attention\.num_gpus: 0\.5 needs a CUDA GPU, and torch .* finds none") as error:
        compute_for("attention", 0.5)
    assert "\n" not in str(error.value)
    assert isinstance(compute_for("ffn", 0.0), HostCompute)


def test_without_triton_an_actor_says_which_extra_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"^ffn\.num_gpus: 1 needs Triton, .* cuda12"):
        compute_for("ffn", 1.0)
