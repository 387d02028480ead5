"""Keys, values and experts in e4m3 through the engine: the reference with the same rounding, interpreted on a CPU or on a GPU."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from afd_ray.engine.gpu.compute import GPUCompute
from afd_ray.engine.sequence import Chunk, Sequence
from afd_ray.handoff.quantise import dequantise, quantise
from afd_ray.handoff.rows import pack_rows
from afd_ray.kernels.gpu.quantise_rows import quantise_rows
from afd_ray.kernels.quantised import QuantisedExperts, quantise_dense, quantise_experts
from afd_ray.membership.epoch import Epoch
from afd_ray.models.checkpoint import Checkpoint, load_attention, load_ffn, read_ffn
from afd_ray.models.step3 import FFNHalf, FFNLayer, FFNShard, Narrow, Routed, Slice, Step3Model
from afd_ray.request import Request
from tests.gpu_cluster import E4M3, HERE, MAX_TOKENS, PROMPTS, WIDE, cluster, requests, rounded_model, rounding, served, written
from tests.triton_device import CLOSE, COMPILED, DEVICE, DTYPES, error, noise

CLOSE_ENOUGH = CLOSE[E4M3]
TURNED = 6e-2 if COMPILED else CLOSE_ENOUGH
"""Of logits where every product is in e4m3: Hopper adds these products up with some 14 bits, and then roundings behind them turn."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    directory: Path = tmp_path_factory.mktemp("wide")
    return written(directory, WIDE)


def narrow() -> GPUCompute:
    return GPUCompute(HERE, quantise_experts=True)


def narrowest(*, rows: bool = False) -> GPUCompute:
    return GPUCompute(HERE, quantise_experts=True, quantise_dense=True, quantise_projections=True, quantise_rows=rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 128), (2, 300), (2, 7168)])
def test_rows_are_quantised_as_the_wire_has_them(dtype: torch.dtype, rows: int, width: int) -> None:
    x = (torch.randn(rows, width, generator=noise(width)) * 1e3).to(dtype)
    x[0, 0] = 0
    found, right = quantise_rows(x.to(DEVICE)), quantise(x)
    for ours, theirs in zip(found, right, strict=True):
        assert torch.equal(ours.cpu().view(torch.uint8), theirs.view(torch.uint8))


def test_no_rows_and_rows_that_the_kernel_does_not_take() -> None:
    assert [len(tensor) for tensor in quantise_rows(torch.empty(0, 128, device=DEVICE))] == [0, 0]
    with pytest.raises(ValueError, match="no kernel for rows"):
        quantise_rows(torch.zeros(1, 128, dtype=torch.float64, device=DEVICE))
    with pytest.raises(ValueError, match="contiguous"):
        quantise_rows(torch.zeros(128, 2, device=DEVICE).t())


@pytest.mark.parametrize("at_home", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_an_ffn_layer_equals_the_plain_one_with_the_same_weights(checkpoint: Checkpoint, at_home: bool, shared: bool) -> None:
    shard = FFNShard((1, 3), first_id=2, at_home=at_home, shared=shared)
    generator = noise(3)
    hidden, weights = torch.randn(5, WIDE.hidden_size, generator=generator), torch.rand(5, 2, generator=generator)
    routed = Routed(hidden, torch.tensor([[2, 3], [1, 2], [3, 4], [0, 1], [4, 0]], dtype=torch.uint8), weights)
    assert error(narrow().ffn(load_ffn(checkpoint, shard))(1, routed), plain(checkpoint, shard)(1, routed)) < CLOSE_ENOUGH
    found = narrowest().ffn(load_ffn(checkpoint, shard))(1, routed)
    assert error(found, plain(checkpoint, shard, dense=True)(1, routed)) < CLOSE_ENOUGH


@pytest.mark.parametrize("part", [Slice(0, 1), Slice(1, 2)], ids=["whole", "half a block"])
def test_a_dense_layer_equals_the_plain_one_with_the_same_weights(checkpoint: Checkpoint, part: Slice) -> None:
    shard = FFNShard((0,), dense=part)
    routed = Routed(torch.randn(5, WIDE.hidden_size, generator=noise(3)), None, None)
    right = plain(checkpoint, shard, dense=True)(0, routed)
    assert error(narrowest().ffn(load_ffn(checkpoint, shard))(0, routed), right) < CLOSE_ENOUGH
    assert 1e-3 < error(right, load_ffn(checkpoint, shard)(0, routed)) < 0.1


def test_a_shared_expert_at_attention_equals_the_plain_one(checkpoint: Checkpoint) -> None:
    held = narrowest().attention(load_attention(checkpoint, shared=True))
    plain_layer = load_attention(checkpoint, shared=True).layer(1)
    quantise_dense(plain_layer)
    hidden = torch.randn(3, WIDE.hidden_size, generator=noise(3))
    found, right = held.layers[1].share(hidden.to(DEVICE)), plain_layer.share(hidden)
    assert right is not None
    assert error(found, right) < CLOSE_ENOUGH


@pytest.mark.parametrize("quantises", [False, True])
@pytest.mark.parametrize("layer", [0, 1], ids=["dense", "with experts"])
def test_rows_may_come_in_8_bits(checkpoint: Checkpoint, layer: int, quantises: bool) -> None:
    half = GPUCompute(HERE, quantise_experts=quantises).ffn(load_ffn(checkpoint, whole()))
    hidden = torch.randn(4, WIDE.hidden_size, generator=noise(6))
    packed = Narrow(*quantise(hidden))
    wide, ids = dequantise(*packed, WIDE.dtype), torch.tensor([[2, 3], [0, 1], [3, 1], [1, 2]], dtype=torch.uint8)
    choice = (ids, torch.rand(4, 2, generator=noise(7))) if layer else (None, None)
    found, right = half(layer, Routed(packed.values, *choice, packed)), half(layer, Routed(wide, *choice))
    assert error(found, right) < 1e-6
    assert found.dtype == WIDE.dtype


def test_what_the_norm_made_is_what_goes_on_the_wire(checkpoint: Checkpoint) -> None:
    """The same bytes as when the host quantises the rows, which it then does not get."""
    sent = []
    for compute in (GPUCompute(HERE, quantise_rows=True), GPUCompute(HERE)):
        attention = compute.attention(load_attention(checkpoint))
        cache = compute.cache(WIDE, num_blocks=2, block_size=4, dtype=WIDE.dtype)
        sequence = Sequence(Request("one", (1, 2, 3)))
        sequence.block_table = [1]
        passage = compute.begin(attention, cache, [Chunk(sequence, 0, 3, samples=True)], slot=0)
        passage.attend(0)
        passage.add(torch.ones(3, WIDE.hidden_size, device=DEVICE))
        sent.append(pack_rows(passage.to_host(passage.attend(1)), E4M3, torch.uint8))
    assert [tensor.dtype for tensor in sent[0]] == [E4M3, torch.uint8, torch.uint8, WIDE.dtype]
    for ours, theirs in zip(*sent, strict=True):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize("dense", [Slice(), Slice(1, 2)], ids=["experts alone", "dense layers too"])
def test_a_half_for_another_shard_takes_over_what_is_held(checkpoint: Checkpoint, dense: Slice) -> None:
    compute, wanted = narrowest(), FFNShard((0, 3), first_id=2, dense=dense)
    held = compute.ffn(load_ffn(checkpoint, FFNShard((1, 3))))
    half = compute.regathered_ffn(held, wanted, lambda shard, dense: read_ffn(checkpoint, shard, WIDE.dtype, dense=dense))
    ours, theirs = dict(half.named_parameters()), dict(compute.ffn(load_ffn(checkpoint, wanted)).named_parameters())
    assert ours.keys() == theirs.keys()
    assert {tensor.dtype for name, tensor in ours.items() if name.endswith("_proj")} == {E4M3}
    assert len([name for name in ours if name.endswith("_proj")]) == 9
    for name, tensor in ours.items():
        assert torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8)), name
    routed = Routed(
        torch.randn(3, WIDE.hidden_size, generator=noise(4)), torch.tensor([[2, 3], [0, 1], [3, 1]]), torch.ones(3, 2)
    )
    assert error(half(1, routed), plain(checkpoint, wanted, dense=True)(1, routed)) < CLOSE_ENOUGH


def plain(checkpoint: Checkpoint, shard: FFNShard, *, dense: bool = False) -> FFNHalf:
    """On the host, with the experts rounded; `dense`: all else too."""
    half = load_ffn(checkpoint, shard)
    for layer in half.layers:
        assert isinstance(layer, FFNLayer)
        quantise_experts(layer)
        if dense:
            quantise_dense(layer)
    return half


@pytest.mark.parametrize("whole_model", [False, True], ids=["experts", "all"])
def test_chunks_and_decoding_rows_give_the_reference_s_logits(checkpoint: Checkpoint, whole_model: bool) -> None:
    """A prompt in two chunks, the second over what the first has cached, beside rows that decode over the end of a block.

    Where every product rounds its rows, what float16 leaves over in attention to e4m3 keys would turn too many of these roundings.
    """
    compute = narrowest() if whole_model else narrow()
    attention, ffn = compute.attention(load_attention(checkpoint)), compute.colocated_ffn(load_ffn(checkpoint, whole()))
    cache = compute.cache(WIDE, num_blocks=16, block_size=4, dtype=WIDE.dtype if whole_model else E4M3)
    generator = noise(5)
    prompts = [torch.randint(WIDE.vocab_size, (count,), generator=generator).tolist() for count in (14, 6, 1)]
    sequences = [Sequence(Request(str(index), tuple(prompt))) for index, prompt in enumerate(prompts)]
    for index, sequence in enumerate(sequences):
        sequence.block_table = list(range(4 * index + 3, 4 * index - 1, -1))
    steps = [[(0, 0, 9), (1, 0, 5)], [(1, 5, 1), (0, 9, 4), (2, 0, 1)], [(0, 13, 1)]]
    model = rounded_model(checkpoint, whole=whole_model, cache=not whole_model)
    for step in steps:
        chunks = [Chunk(sequences[index], start, count, samples=True) for index, start, count in step]
        passage = compute.begin(attention, cache, chunks, slot=0)
        for layer in range(WIDE.num_hidden_layers):
            passage.add(ffn(layer, passage.attend(layer)))
        right = torch.stack([last_logits(model, prompts[index][: start + count]) for index, start, count in step])
        assert error(passage.logits(), right) < (TURNED if whole_model else CLOSE_ENOUGH)


def whole() -> FFNShard:
    return FFNShard.whole(WIDE)


def last_logits(model: Step3Model, tokens: list[int]) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor(tokens))[-1]
    return logits


@pytest.mark.parametrize(
    ("epoch", "wire"),
    [
        (Epoch(1, 1, 1, 2, 2, dispatch="routed"), E4M3),
        pytest.param(Epoch(1, 1, 1, 2, 2, dispatch="routed"), None, marks=pytest.mark.full),
        pytest.param(Epoch(1, 2, 1, 1, 3), E4M3, marks=pytest.mark.full),
        pytest.param(Epoch(1, 1, 1, 2, 2, shared_at_attention=True), E4M3, marks=pytest.mark.full),
        pytest.param(Epoch(1, 1, 1, 0, 2), None, marks=pytest.mark.full),
    ],
    ids=["routed", "on a wide wire", "broadcast", "shared at attention", "colocated"],
)
def test_the_engine_s_tokens_are_those_that_the_reference_finds_likeliest(
    checkpoint: Checkpoint, epoch: Epoch, wire: torch.dtype | None
) -> None:
    """Or about as likely: rounding in another order may turn a close choice. What returns over a wire in 8 bits is bfloat16."""
    asked = requests(PROMPTS, MAX_TOKENS)
    model = rounded_model(checkpoint, wire=wire is E4M3 and not epoch.shared_at_attention, whole=True)
    compute = narrowest(rows=wire is E4M3 or not epoch.ffn)
    with cluster(checkpoint, epoch, compute, cache_dtype=E4M3, wire_dtype=wire) as local:
        found = served(local, asked)
        assert local.attention[0].cache.blocks.dtype == E4M3
    for request in asked:
        tokens = list(request.prompt_token_ids)
        for token in found[request.id]:
            logits = last_logits(model, tokens)
            assert token is not None
            assert logits[token] > logits.max() - CLOSE_ENOUGH * logits.norm()
            tokens.append(token)


def test_a_checkpoint_in_e4m3_is_computed_as_it_is_stored(tmp_path: Path) -> None:
    """Nothing is quantised again: what the device holds are the bytes of the files."""
    held = written(tmp_path, replace(WIDE, scaled=True))
    compute = narrowest()
    attention = compute.attention(load_attention(held, keep=compute.narrow_parts))
    ffn = compute.colocated_ffn(load_ffn(held, whole(), keep=compute.narrow_parts))
    stored = load_file(tmp_path / "model.safetensors")
    down, wq = stored["model.layers.1.moe.down_proj.weight"], stored["model.layers.0.self_attn.wq.weight"]
    assert torch.equal(ffn.layers[1].moe.down_proj.cpu().view(torch.uint8), down.view(torch.uint8))
    assert torch.equal(attention.layers[0].projections.wide_q.values.cpu().view(torch.uint8), wq.view(torch.uint8))
    cache = compute.cache(held.config, num_blocks=4, block_size=4, dtype=held.config.dtype)
    sequence = Sequence(Request("one", (5, 6, 7, 8, 9)))
    sequence.block_table = [2, 0]
    passage = compute.begin(attention, cache, [Chunk(sequence, 0, 5, samples=True)], slot=0)
    for layer in range(held.config.num_hidden_layers):
        passage.add(ffn(layer, passage.attend(layer)))
    right = last_logits(rounded_model(held, whole=True, cache=False), [5, 6, 7, 8, 9])
    assert error(passage.logits(), right[None]) < TURNED


def test_a_half_for_another_shard_takes_bytes_from_a_checkpoint_in_e4m3(tmp_path: Path) -> None:
    held, compute, wanted = written(tmp_path, replace(WIDE, scaled=True)), narrowest(), FFNShard((0, 3), first_id=2)
    keep = compute.narrow_parts
    served = compute.ffn(load_ffn(held, FFNShard((1, 3)), keep=keep))
    half = compute.regathered_ffn(served, wanted, lambda shard, dense: read_ffn(held, shard, WIDE.dtype, dense=dense, keep=keep))
    ours, theirs = dict(half.named_parameters()), dict(compute.ffn(load_ffn(held, wanted, keep=keep)).named_parameters())
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8)), name


@pytest.mark.parametrize("scale", [None, 0.5, 200.0])
def test_keys_and_values_in_e4m3_have_scales(checkpoint: Checkpoint, scale: float | None) -> None:
    """200: most of them lose digits then, and the reference's the same ones."""
    read, model = load_attention(checkpoint), rounded_model(checkpoint, cache=False)
    for half in (read, model.attention):
        half.scale_cache(scale, scale)
    for index in range(WIDE.num_hidden_layers):
        layer = model.attention.layer(index)
        layer.before = rounding(layer.before, layer.self_attn.cache_scales)  # type: ignore[method-assign]
    compute = narrow()
    attention, ffn = compute.attention(read), compute.colocated_ffn(load_ffn(checkpoint, whole()))
    cache = compute.cache(WIDE, num_blocks=4, block_size=4, dtype=E4M3)
    sequence = Sequence(Request("one", (5, 6, 7, 8, 9)))
    sequence.block_table = [2, 0]
    logits = []
    for start, count in ((0, 4), (4, 1)):
        passage = compute.begin(attention, cache, [Chunk(sequence, start, count, samples=True)], slot=0)
        for layer in range(WIDE.num_hidden_layers):
            passage.add(ffn(layer, passage.attend(layer)))
        logits.append(passage.logits())
    for found, count in zip(logits, (4, 5), strict=True):
        assert error(found, last_logits(model, [5, 6, 7, 8, 9][:count])[None]) < CLOSE_ENOUGH
    unscaled = error(logits[1], last_logits(rounded_model(checkpoint), [5, 6, 7, 8, 9])[None])
    assert (unscaled > 5 * CLOSE_ENOUGH) is (scale == 200.0)


def test_experts_on_the_device_are_in_e4m3(checkpoint: Checkpoint) -> None:
    half = narrow().colocated_ffn(load_ffn(checkpoint, whole()))
    assert isinstance(half.layers[1].moe, QuantisedExperts)
    held = sum(tensor.nbytes for name, tensor in half.named_parameters() if ".moe." in name)
    wide = sum(tensor.nbytes for name, tensor in load_ffn(checkpoint, whole()).named_parameters() if ".moe." in name)
    assert wide / 4 <= held < wide / 3.9


def test_projections_on_the_device_are_in_e4m3_and_counted_among_the_weights(checkpoint: Checkpoint) -> None:
    held, wide = (compute.attention(load_attention(checkpoint)) for compute in (narrowest(), GPUCompute(HERE)))
    sizes = [sum(tensor.nbytes for tensor in half.layers[0].projections.parameters()) for half in (held, wide)]
    assert sizes[1] / 4 <= sizes[0] < sizes[1] / 3.8
