import json
import shutil
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from afd_ray.models.checkpoint import (
    Checkpoint,
    CheckpointError,
    digest,
    load_attention,
    load_ffn,
    load_model,
    plan_reads,
    verify,
)
from afd_ray.models.layout import Unallocated, count_parameters, elements, expected_shapes, file_key, part_of, text_key
from afd_ray.models.presets import PRESETS, random_tensors
from afd_ray.models.shards import INDEX_NAME, write_checkpoint
from afd_ray.models.step3 import FFNHalf, FFNShard, Routed, Slice

CONFIG = PRESETS["step3-tiny"]
UP = "model.layers.1.moe.up_proj.weight"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(directory, CONFIG, random_tensors(CONFIG, seed=7))
    return directory


@pytest.fixture
def directory(written: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(written, tmp_path / "copy"))


def change(directory: Path, **changes: torch.Tensor | None) -> None:
    """Rewrites the one shard with some tensors replaced (or, None, left out)."""
    file = directory / "model.safetensors"
    tensors = load_file(file) | {key.replace("__", "."): value for key, value in changes.items()}
    save_file({key: value for key, value in tensors.items() if value is not None}, file)


def test_the_model_that_was_written_is_the_one_that_is_read(written: Path) -> None:
    checkpoint = Checkpoint.open(written)
    assert checkpoint.config == CONFIG
    model = load_model(checkpoint)
    stored = dict(random_tensors(CONFIG, seed=7))
    parameters = {file_key(n): p for half in (model.attention, model.ffn) for n, p in half.named_parameters()}
    assert parameters.keys() == stored.keys() == expected_shapes(CONFIG).keys()
    assert all(torch.equal(parameters[key], stored[key]) and not parameters[key].requires_grad for key in stored)
    assert len(set(model.generate_greedy([1, 2, 3], 32))) > 16
    assert list(verify(checkpoint)) == []


def test_shards_hold_the_same_model_as_one_file(written: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIG, random_tensors(CONFIG, seed=7), max_shard_bytes=100_000)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 3
    assert not list(tmp_path.glob("*.tmp"))
    one, many = load_model(Checkpoint.open(written)), load_model(Checkpoint.open(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), many.parameters(), strict=True))


def test_the_ranks_partial_sums_add_up_to_the_whole(written: Path) -> None:
    checkpoint = Checkpoint.open(written)
    whole = load_model(checkpoint).ffn
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, CONFIG.hidden_size, generator=generator)
    experts = torch.stack([torch.randperm(CONFIG.moe_num_experts, generator=generator)[:3] for _ in range(6)])
    moe, dense = Routed(hidden, experts, torch.rand(6, 3, generator=generator)), Routed(hidden, None, None)
    maps = ((0, 3, 5), (1, 2, 4, 6, 7))
    on_the_wire = moe._replace(experts=torch.tensor(sum(maps, ())).argsort()[experts])
    slices = [(instance, Slice(tp_rank, 3)) for instance in range(2) for tp_rank in range(3)]
    shards = [FFNShard(maps[i], part, Slice(i * 3 + part.part, 6), first_id=3 * i) for i, part in slices]
    halves = [load_ffn(checkpoint, shard) for shard in shards]
    assert torch.allclose(sum_partials(halves, 1, on_the_wire), whole(1, moe), atol=1e-5)
    assert torch.allclose(sum_partials(halves, 0, dense), whole(0, dense), atol=1e-5)
    at_home = [load_ffn(checkpoint, FFNShard(maps[i], part, part, first_id=3 * i, at_home=True)) for i, part in slices]
    assert torch.allclose(sum_partials(at_home, 1, on_the_wire), whole(1, moe), atol=1e-5)


def sum_partials(halves: list[FFNHalf], layer: int, routed: Routed) -> torch.Tensor:
    return torch.stack([half(layer, routed) for half in halves]).sum(0)


def test_a_role_reads_its_own_values_only(written: Path) -> None:
    checkpoint = Checkpoint.open(written)
    attention, rank = load_attention(checkpoint), load_ffn(checkpoint, FFNShard((1, 6), routed=Slice(1, 2), dense=Slice(3, 4)))
    assert {part_of(read.stored.key) for read in plan_reads(checkpoint, attention)}.isdisjoint({"experts", "shared", "dense"})
    reads = plan_reads(checkpoint, rank, rank.shard)
    assert {part_of(read.stored.key) for read in reads} == {"experts", "shared", "dense"}
    parts = count_parameters(CONFIG).parts
    assert sum(elements(read.shape) for read in reads) == parts["experts"] * 2 // 8 // 2 + (parts["shared"] + parts["dense"]) // 4
    down = next(read for read in reads if ".moe.down_proj." in read.stored.key)
    assert down.slices == (slice(None), slice(16, 32))


def test_shared_experts_are_read_by_the_role_that_computes_them(written: Path) -> None:
    checkpoint, shard = Checkpoint.open(written), FFNShard(tuple(range(8)), shared=False)
    attention, rank = load_attention(checkpoint, shared=True), load_ffn(checkpoint, shard)
    read = Counter(part_of(read.stored.key) for read in plan_reads(checkpoint, attention))
    assert read["shared"] == 3 * len(CONFIG.moe_layers)
    assert read.keys().isdisjoint({"experts", "dense"})
    assert {part_of(read.stored.key) for read in plan_reads(checkpoint, rank, shard)} == {"experts", "dense"}
    hidden, experts, weights = torch.randn(6, CONFIG.hidden_size), torch.randint(8, (6, 3)), torch.rand(6, 3)
    shared = attention.layer(1).share(hidden)
    assert shared is not None
    assert attention.layer(0).share(hidden) is None, "a dense layer has none"
    whole = load_model(checkpoint).ffn(1, Routed(hidden, experts, weights))
    assert torch.allclose(shared + rank(1, Routed(hidden, experts, weights)), whole, atol=1e-5)


def test_a_module_built_unallocated_takes_no_memory() -> None:
    with Unallocated():
        half = FFNHalf(CONFIG, FFNShard((2, 5)))
        embedding = torch.nn.Embedding(4, 3)
    assert {p.device.type for p in (*half.parameters(), *embedding.parameters())} == {"meta"}


def test_a_dtype_may_be_asked_for_and_progress_is_told(written: Path) -> None:
    seen: list[tuple[int, int]] = []
    half = load_attention(Checkpoint.open(written), torch.bfloat16, lambda done, total: seen.append((done, total)))
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1] == count_parameters(CONFIG).attention_side


def test_a_wrong_shard_is_refused(written: Path) -> None:
    checkpoint = Checkpoint.open(written)
    with pytest.raises(ValueError, match="experts: must be from 0 to 7, got 8"):
        load_ffn(checkpoint, FFNShard((8,)))
    with pytest.raises(ValueError, match="routed: part must be from 0 to 1, got 2"):
        load_ffn(checkpoint, FFNShard((0,), routed=Slice(2, 2)))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({UP: None}, f"{UP}: missing"),
        ({"model.more.weight": torch.zeros(3)}, "model.more.weight: extra, the model has no such tensor"),
        ({"lm_head.weight": torch.zeros(3, 64)}, "lm_head.weight: shape must be [512, 64], got [3, 64]"),
        ({"model.norm.weight": torch.ones(64).half()}, "model.norm.weight: dtype must be one of F32, BF16, got F16"),
        ({"model.norm.weight": torch.ones(64).bfloat16()}, "model.norm.weight: dtype is BF16, config.json says float32"),
        ({"model.norm.weight": torch.full((64,), float("nan"))}, "model.norm.weight: 64 values are not finite"),
    ],
)
def test_verify_names_each_fault(directory: Path, changes: dict[str, torch.Tensor | None], expected: str) -> None:
    change(directory, **{key.replace(".", "__"): value for key, value in changes.items()})
    assert list(verify(Checkpoint.open(directory))) == [expected]


def test_loading_refuses_what_does_not_fit_in_one_line(directory: Path) -> None:
    change(directory, **{UP: None, "model.more.weight": torch.zeros(3)})
    with pytest.raises(CheckpointError, match=r"copy: model\.layers\.1\.moe\.up_proj\.weight: missing \(and 1 more") as caught:
        load_attention(Checkpoint.open(directory))
    assert "\n" not in str(caught.value)


def test_a_truncated_or_corrupt_file_is_named(directory: Path) -> None:
    file = directory / "model.safetensors"
    whole = file.read_bytes()
    broken = {
        "truncated": whole[:-5],
        "truncated, or not": whole[:100],
        "not a safetensors file": b"hello, world, this is no such thing",
        "not JSON": struct.pack("<Q", 20) + b"x" * 40,
        "does not describe": struct.pack("<Q", 17) + b'{"a":{"dtype":1}}' + b"x" * 40,
        "(0 bytes)": b"",
    }
    for expected, content in broken.items():
        file.write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            Checkpoint.open(directory)
        assert expected in str(caught.value)
        assert str(file) in str(caught.value)


def test_a_broken_directory_is_named(tmp_path: Path, directory: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json there"):
        Checkpoint.open(tmp_path / "nowhere")
    index = directory / INDEX_NAME
    for content, expected in [
        ("{}", "it has no weight_map"),
        ('{"weight_map": {"a": "../b"}}', "not a file beside it"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "gone.safetensors: missing"),
    ]:
        index.write_text(content)
        with pytest.raises(CheckpointError, match=expected):
            Checkpoint.open(directory)
    index.unlink()
    (directory / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no model\*\.safetensors there"):
        Checkpoint.open(directory)


def test_a_step3_vl_checkpoint_serves_its_text_part(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    plain = load_model(Checkpoint.open(directory)).generate_greedy([5, 6], 8)
    renamed = {key.replace("model.", "model.language_model.", 1): value for key, value in tensors.items()}
    save_file(renamed | {"vision_model.embeddings.class_embedding": torch.zeros(3)}, directory / "model.safetensors")
    config = {"model_type": "step3_vl", "text_config": CONFIG.to_dict()}
    (directory / "config.json").write_text(json.dumps(config))
    assert load_model(Checkpoint.open(directory)).generate_greedy([5, 6], 8) == plain
    assert text_key("vit_downsampler.weight") is None


def test_the_digest_tells_checkpoints_apart(directory: Path, written: Path) -> None:
    same = digest(Checkpoint.open(written))
    assert digest(Checkpoint.open(directory)) == same
    assert 0 <= same < 2**64
    change(directory)  # rewritten: another header, the same weights
    rewritten = digest(Checkpoint.open(directory))
    change(directory, model__norm__weight=torch.full((64,), 1.5))
    assert digest(Checkpoint.open(directory)) not in (same, rewritten)


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    def failing() -> Iterator[tuple[str, torch.Tensor]]:
        yield from list(random_tensors(CONFIG, 0))[:4]
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_checkpoint(tmp_path, CONFIG, failing(), max_shard_bytes=20_000)
    assert list(tmp_path.iterdir()) == []


def test_parameters_are_those_of_the_paper() -> None:
    counts = count_parameters(PRESETS["step3"])
    assert counts.attention_per_layer == 169_345_024
    assert counts.expert == 110_100_480
    assert counts.dense_per_layer == 396_361_728
    assert counts.parts["router"] == 48 * 7168 * 56
    assert round(counts.total / 1e9, 2) == 316.29
    assert round(counts.ffn_side / 1e9, 2) == 304.10
    assert round(counts.activated / 1e9, 2) == 36.97
    assert counts.attention_side + counts.ffn_side == counts.total


def test_random_weights_depend_on_the_seed_and_the_key_alone() -> None:
    shallow = replace(CONFIG, num_hidden_layers=2, moe_layers=frozenset({1}))
    deep, few = dict(random_tensors(CONFIG, 1)), dict(random_tensors(shallow, 1))
    assert all(torch.equal(deep[key], value) for key, value in few.items())
    assert not torch.equal(deep[UP], dict(random_tensors(CONFIG, 2))[UP])
