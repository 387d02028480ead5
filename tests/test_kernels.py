"""The compiled kernels equal the plain-torch modules computed in float32, up to bfloat16's rounding of the result."""

import copy
import random
import subprocess
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from afd_ray.engine.kv_cache import BlockAllocator, PagedCache, slot_indices
from afd_ray.engine.local import LocalCluster
from afd_ray.engine.paged_attention import InPlace, attend_paged, plan_attention
from afd_ray.engine.sequence import Chunk, Sequence
from afd_ray.kernels import native
from afd_ray.kernels.packed import PackedAttentionLayer, PackedFFNLayer, PackedLinear, PackedNorm, packed_attention, packed_ffn
from afd_ray.membership.epoch import Epoch
from afd_ray.models.config import ModelConfig
from afd_ray.models.presets import PRESETS
from afd_ray.models.step3 import (
    AttentionHalf,
    AttentionLayer,
    FFNHalf,
    FFNLayer,
    FFNShard,
    Linear,
    Norm,
    Routed,
    Slice,
    attend,
    route,
)
from afd_ray.request import Request, SamplingParams

needs_kernels = pytest.mark.skipif(not native.available(), reason="needs AVX512-BF16 and a C compiler")

ROWS = [1, 2, 5, 12, 13, 25, 40]
CONFIG = replace(PRESETS["step3-92m"], num_hidden_layers=3, moe_layers=frozenset({1}), vocab_size=100, dtype=torch.bfloat16)


def noise(*shape: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) * scale).bfloat16()


def filled(module: torch.nn.Module) -> torch.nn.Module:
    """With random bfloat16 weights."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1.0
        parameter.data = (torch.randn(parameter.shape, generator=generator) * scale).bfloat16()
    return module.requires_grad_(False)


def check(packed: torch.nn.Module, plain: torch.nn.Module, x: Tensor, *others: Tensor) -> None:
    floats = [other.float() if other.is_floating_point() else other for other in others]
    expected = copy.deepcopy(plain).float()(x.float(), *floats)
    assert_close(packed(x, *others), expected)


def assert_close(ours: Tensor, expected: Tensor) -> None:
    """Within bfloat16's rounding (2 ** -8) of the largest of the values that were summed."""
    torch.testing.assert_close(ours.float(), expected, atol=0.01 * float(expected.abs().max()), rtol=0.01)


@needs_kernels
@pytest.mark.parametrize("rows", ROWS)
def test_a_packed_matrix_equals_the_plain_one(rows: int) -> None:
    plain = filled(Linear(70, 96))
    check(PackedLinear(plain), plain, noise(rows, 96))


def ffn_layer(index: int, experts: int = 5, inner: int = 64, shared: int = 64, **shard: object) -> FFNLayer:
    """Layer 1 has experts, the others are dense; the first expert held is number 2 on the wire."""
    config = replace(CONFIG, hidden_size=96, moe_intermediate_size=inner, share_expert_dim=shared, intermediate_size=shared)
    layer = filled(FFNLayer(config, index, FFNShard(tuple(range(experts)), first_id=2, **shard)))
    assert isinstance(layer, FFNLayer)
    return layer


@needs_kernels
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("inner", "shared"), [(64, 64), (43, 100)])
@pytest.mark.parametrize("at_home", [False, True])
def test_packed_experts_equal_the_plain_ones(rows: int, inner: int, shared: int, at_home: bool) -> None:
    plain = ffn_layer(1, inner=inner, shared=shared, at_home=at_home)
    chosen = torch.stack([torch.randperm(9)[:3] for _ in range(rows)])  # four experts are held elsewhere
    check(PackedFFNLayer(plain), plain, noise(rows, 96), chosen, noise(rows, 3).abs())


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_expert_ids_may_be_narrow(dtype: torch.dtype) -> None:
    packed = PackedFFNLayer(ffn_layer(1))
    x, chosen, weights = noise(9, 96), torch.arange(27).view(9, 3) % 9, noise(9, 3)
    assert torch.equal(packed(x, chosen.to(dtype), weights), packed(x, chosen, weights))


@needs_kernels
def test_rows_whose_experts_are_all_elsewhere_are_zeros() -> None:
    packed = PackedFFNLayer(ffn_layer(1, experts=2, at_home=True))
    assert not packed(noise(3, 96), torch.tensor([[0, 1], [4, 5], [1, 4]]), noise(3, 2)).any()


@needs_kernels
def test_no_rows_give_no_rows() -> None:
    chosen, weights = torch.empty(0, 3, dtype=torch.int64), noise(0, 3)
    assert PackedLinear(filled(Linear(70, 96)))(noise(0, 96)).shape == (0, 70)
    assert PackedFFNLayer(ffn_layer(1))(noise(0, 96), chosen, weights).shape == (0, 96)


@needs_kernels
@pytest.mark.parametrize("rows", ROWS)
def test_a_packed_dense_ffn_equals_the_plain_one(rows: int) -> None:
    plain = ffn_layer(0, shared=43, at_home=True)
    x = noise(rows, 96)
    assert_close(PackedFFNLayer(plain)(x, None, None), copy.deepcopy(plain).float()(x.float(), None, None))


@needs_kernels
def test_a_large_gate_neither_overflows_nor_loses_its_sign() -> None:
    plain = ffn_layer(0)
    x = noise(4, 96, scale=100.0)
    assert_close(PackedFFNLayer(plain)(x, None, None), copy.deepcopy(plain).float()(x.float(), None, None))


@needs_kernels
def test_a_packed_norm_equals_the_plain_one_also_over_a_part_of_wider_rows() -> None:
    plain = filled(Norm(64, 1e-5))
    check(PackedNorm(plain), plain, noise(5, 160)[:, 32:96])


@needs_kernels
@pytest.mark.parametrize("threads", [1, 2])
def test_results_do_not_depend_on_the_number_of_threads(threads: int) -> None:
    packed = PackedFFNLayer(ffn_layer(1))
    x, local, weights = noise(9, 96), torch.arange(18).view(9, 2) % 8, noise(9, 2)
    expected = packed(x, local, weights)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(packed(x, local, weights), expected)
    finally:
        torch.set_num_threads(before)


@needs_kernels
@pytest.mark.parametrize("block_size", [16, 5, 24])
@pytest.mark.parametrize("heads", [8, 3, 20])
@pytest.mark.parametrize("dim", [32, 64, 128])
def test_attention_over_the_cache_equals_the_reference(block_size: int, heads: int, dim: int) -> None:
    cache = PagedCache(layers=2, num_blocks=80, block_size=block_size, head_dim=dim, dtype=torch.bfloat16)
    cache.blocks.fill_(torch.nan)  # what lies beyond a context must not be seen
    allocator, rng = BlockAllocator(80, block_size), random.Random(0)
    chunks, queries, expected = [], [], []
    for i, (start, count) in enumerate([(0, 1), (1, 1), (14, 1), (15, 1), (16, 1), (0, 7), (33, 9), (99, 1)]):
        sequence = Sequence(Request(f"r{i}", tuple(range(start + count))))
        sequence.block_table = allocator.allocate(allocator.blocks_for(start + count)) or []
        rng.shuffle(sequence.block_table)
        k, v = noise(start + count, dim), noise(dim, start + count).T
        cache.write(1, torch.tensor(slot_indices(sequence.block_table, 0, start + count, block_size)), k, v)
        chunks.append(Chunk(sequence, start, count, samples=True))
        queries.append(noise(count, heads, dim))
        expected.append(attend(queries[-1].float(), k.float(), v.float(), start))
    plan = plan_attention(chunks, cache)
    assert isinstance(plan.keys, InPlace)
    out = attend_paged(cache, 1, plan, torch.cat(queries))
    assert_close(out, torch.cat(expected))


@needs_kernels
@pytest.mark.parametrize("rows", [1, 9, 40])
def test_a_packed_attention_half_equals_the_plain_one(rows: int) -> None:
    plain = filled(AttentionHalf(CONFIG))
    assert isinstance(plain, AttentionHalf)
    packed = packed_attention(copy.deepcopy(plain))
    plain.float()
    residual, rotary = noise(rows, CONFIG.hidden_size), plain.rotary(torch.arange(rows))
    context = noise(rows, CONFIG.num_attention_heads, CONFIG.head_dim)
    for index in range(CONFIG.num_hidden_layers):
        for ours, reference in zip(
            packed.layer(index).before(residual, *rotary), plain.layer(index).before(residual.float(), *rotary), strict=True
        ):
            assert_close(ours, reference)
        ours, routed = packed.layer(index).after(residual, context)
        reference, expected = plain.layer(index).after(residual.float(), context.float())
        assert_close(ours, reference)
        assert_close(routed.hidden, expected.hidden)
        assert (routed.experts is None, routed.weights is None) == (expected.experts is None,) * 2
    assert_close(packed.logits(residual), plain.logits(residual.float()))


@needs_kernels
@pytest.mark.parametrize("rows", ROWS)
def test_a_packed_shared_expert_at_attention_equals_the_plain_one(rows: int) -> None:
    plain = filled(AttentionLayer(CONFIG, 1, shared=True))
    assert isinstance(plain, AttentionLayer)
    x = noise(rows, CONFIG.hidden_size)
    ours = PackedAttentionLayer(plain).share(x)
    assert ours is not None
    assert_close(ours, plain.float().share(x.float()))


@needs_kernels
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize(("experts", "top_k"), [(3, 2), (16, 3), (50, 8)])
def test_packed_routing_equals_the_plain_one(experts: int, top_k: int, normalise: bool) -> None:
    config = replace(CONFIG, moe_num_experts=experts, moe_top_k=top_k, norm_expert_weight=normalise)
    plain = filled(AttentionLayer(config, 1))
    assert isinstance(plain, AttentionLayer)
    _, ours = PackedAttentionLayer(plain).after(noise(30, 512), noise(30, 8, 64))
    assert plain.moe is not None
    chosen, weights = route(plain.moe["gate"].float()(ours.hidden.float()), top_k, normalise)
    assert ours.experts is not None
    assert ours.weights is not None
    assert torch.equal(ours.experts, chosen)
    assert_close(ours.weights, weights)


@needs_kernels
def test_scores_that_are_not_numbers_still_choose_an_expert() -> None:
    plain = filled(AttentionLayer(CONFIG, 1))
    assert isinstance(plain, AttentionLayer)
    _, routed = PackedAttentionLayer(plain).after(torch.full((2, 512), torch.nan).bfloat16(), noise(2, 8, 64))
    assert routed.experts is not None
    assert routed.weights is not None
    assert routed.experts.lt(CONFIG.moe_num_experts).all()
    assert routed.weights.isnan().all()


@needs_kernels
@pytest.mark.parametrize(
    "shard",
    [
        FFNShard(tuple(range(16))),
        FFNShard((3, 4), Slice(1, 3), Slice(2, 3), first_id=3),
        FFNShard((3, 4, 9), Slice(1, 3), Slice(1, 3), first_id=7, at_home=True),
        FFNShard((3, 4, 9), Slice(1, 3), Slice(1, 3), first_id=7, at_home=True, shared=False),
        FFNShard((3, 4), Slice(0, 1), Slice(0, 1), first_id=3, shared=False),
    ],
)
def test_a_packed_ffn_half_equals_the_plain_one(shard: FFNShard) -> None:
    plain = filled(FFNHalf(CONFIG, shard))
    assert isinstance(plain, FFNHalf)
    packed = packed_ffn(copy.deepcopy(plain))
    plain.float()
    hidden, experts, weights = noise(20, CONFIG.hidden_size), torch.randint(16, (20, 3)), noise(20, 3).abs()
    for layer in range(CONFIG.num_hidden_layers):
        routed = Routed(hidden, experts, weights) if layer == 1 else Routed(hidden, None, None)
        expected = Routed(hidden.float(), routed.experts, None if routed.weights is None else weights.float())
        assert_close(packed(layer, routed), plain(layer, expected))


@needs_kernels
@pytest.mark.parametrize(("attention", "expert_parallel"), [(1, 0), (1, 1), (2, 1)])
def test_tokens_do_not_depend_on_batch_mates_chunks_or_who_computes_the_ffn(attention: int, expert_parallel: int) -> None:
    half, ffn = filled(AttentionHalf(CONFIG)), filled(FFNHalf(CONFIG, FFNShard.whole(CONFIG)))
    assert isinstance(half, AttentionHalf)
    assert isinstance(ffn, FFNHalf)
    half, ffn = packed_attention(half), packed_ffn(ffn)

    def tokens(requests: list[Request], epoch: Epoch, budget: int) -> list[list[int | None]]:
        with LocalCluster(half, lambda _: ffn, epoch, num_blocks=100, max_tokens_per_micro_batch=budget) as local:
            outputs = local.generate(requests)
        return [[output.token_id for output in outputs[request.id]] for request in requests]

    rng, params = random.Random(0), SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    requests = [Request(f"r{i}", tuple(rng.choices(range(100), k=rng.randint(1, 40))), params) for i in range(8)]
    alone = [tokens([request], Epoch(1, 1, 1, 0, 1), budget=64)[0] for request in requests]
    assert tokens(requests, Epoch(1, attention, 1, expert_parallel, 2), budget=24) == alone


@needs_kernels
def test_packed_weights_take_the_place_of_the_plain_ones() -> None:
    half = filled(AttentionHalf(CONFIG))
    assert isinstance(half, AttentionHalf)
    plain_bytes = sum(p.nbytes for p in half.parameters())
    assert sum(p.nbytes for p in packed_attention(half).parameters()) <= 1.02 * plain_bytes  # panels are padded


@pytest.mark.parametrize("change", [{"dtype": torch.float32}, {"hidden_size": 500}])
def test_a_model_that_the_kernels_cannot_run_stays_plain(change: dict[str, object]) -> None:
    config: ModelConfig = replace(CONFIG, **change)
    half = packed_ffn(FFNHalf(config, FFNShard((0,))))
    assert all(isinstance(layer, FFNLayer) for layer in half.layers)


def test_without_a_compiler_plain_torch_computes(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    def no_compiler(command: list[str]) -> None:
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "_run", no_compiler)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(native, "_library", native._library.__wrapped__)
    assert not native.available.__wrapped__()
