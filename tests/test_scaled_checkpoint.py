"""Checkpoints in e4m3: what is read is what their blocks stand for, whoever reads which part of it."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from actors.cli import main
from afd_ray.kernels.quantised import (
    PROJECTIONS,
    QuantisedDense,
    QuantisedExperts,
    QuantisedLinear,
    dequantise_weight,
    quantise_weight,
)
from afd_ray.models.checkpoint import (
    Checkpoint,
    CheckpointError,
    load_attention,
    load_ffn,
    load_model,
    read_ffn,
    verify,
    write_checkpoint,
)
from afd_ray.models.config import E4M3, ModelConfig
from afd_ray.models.presets import PRESETS, random_tensors
from afd_ray.models.scaled import NARROW_PARTS, SCALES, scaled_tensors
from afd_ray.models.step3 import CacheScales, FFNShard, Slice

CONFIG = replace(
    PRESETS["step3-tiny"],
    num_hidden_layers=2,
    moe_layers=frozenset({1}),
    moe_num_experts=4,
    hidden_size=128,
    head_dim=64,
    share_q_dim=128,
    moe_intermediate_size=384,
    share_expert_dim=160,
    intermediate_size=512,
    vocab_size=64,
    scaled=True,
)
UP, WQ = "model.layers.1.moe.up_proj.weight", "model.layers.0.self_attn.wq.weight"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("scaled")
    write_checkpoint(directory, CONFIG, scaled_tensors(random_tensors(CONFIG, seed=3)), max_shard_bytes=200_000)
    return directory


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The same numbers in float32."""
    directory = tmp_path_factory.mktemp("wide")
    write_checkpoint(
        directory, replace(CONFIG, scaled=False), ((key, rounded(key, t)) for key, t in random_tensors(CONFIG, seed=3))
    )
    return Checkpoint.open(directory)


def rounded(key: str, tensor: Tensor) -> Tensor:
    if not any(part in key for part in (".self_attn.", ".moe.", ".share_expert.", ".mlp.")) or "norm" in key or ".gate." in key:
        return tensor
    weights = [dequantise_weight(*quantise_weight(weight)) for weight in tensor.view(-1, *tensor.shape[-2:])]
    return torch.stack(weights).view(tensor.shape)


def test_the_model_is_that_of_the_numbers_that_the_blocks_stand_for(written: Path, wide: Checkpoint) -> None:
    checkpoint = Checkpoint.open(written)
    assert checkpoint.config == CONFIG
    assert list(verify(checkpoint)) == []
    assert checkpoint.tensors[UP].dtype == "F8_E4M3"
    assert checkpoint.tensors[UP + SCALES].shape == (4, 3, 1)
    found, right = load_model(checkpoint), load_model(wide)
    for (name, ours), theirs in zip(found.named_parameters(), right.parameters(), strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs), name
    assert found.generate_greedy([1, 2, 3], 8) == right.generate_greedy([1, 2, 3], 8)
    assert load_attention(checkpoint, torch.bfloat16).layer(0).self_attn.wq.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_a_rank_s_slice_has_the_scales_of_the_blocks_that_it_cuts(written: Path, wide: Checkpoint, parts: int) -> None:
    for part in range(parts):
        shard = FFNShard((3, 1), Slice(part, parts), Slice(part, parts))
        ours, theirs = (load_ffn(checkpoint, shard) for checkpoint in (Checkpoint.open(written), wide))
        for (name, found), right in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert torch.equal(found, right), name


def test_what_is_computed_in_e4m3_is_kept_as_it_is(written: Path, wide: Checkpoint) -> None:
    checkpoint, shard = Checkpoint.open(written), FFNShard((2, 0), Slice(1, 3), Slice(1, 2))
    attention = load_attention(checkpoint, keep=NARROW_PARTS)
    for index in range(2):
        for name in PROJECTIONS:
            ours, theirs = (getattr(half.layer(index).self_attn, name) for half in (attention, load_attention(wide)))
            assert isinstance(ours, QuantisedLinear)
            assert torch.equal(dequantise_weight(ours.weight, ours.scales), theirs.weight)
    ours, theirs = load_ffn(checkpoint, shard, keep=NARROW_PARTS), load_ffn(wide, shard)
    moe, mlp = ours.layers[1].moe, ours.layers[0].mlp
    assert isinstance(moe, QuantisedExperts)
    assert isinstance(mlp, QuantisedDense)
    for name in ("gate", "up", "down"):
        right = getattr(theirs.layers[1].moe, f"{name}_proj")
        for expert in range(2):
            values, scales = moe.pair(name)
            assert torch.equal(dequantise_weight(values[expert], scales[expert]), right[expert])
        values, scales = mlp.expert.pair(name)
        assert torch.equal(dequantise_weight(values[0], scales[0]), getattr(theirs.layers[0].mlp, f"{name}_proj").weight)
    assert all(type(part.moe) is not QuantisedExperts for part in load_ffn(checkpoint, shard).layers)


def test_a_slice_that_cuts_a_block_is_made_wider(written: Path, wide: Checkpoint) -> None:
    shard = FFNShard((2, 0), Slice(0, 2), Slice(0, 1))
    ours, theirs = load_ffn(Checkpoint.open(written), shard, keep=NARROW_PARTS), load_ffn(wide, shard)
    assert torch.equal(ours.layers[1].moe.up_proj, theirs.layers[1].moe.up_proj), "192 of 384"
    assert torch.equal(ours.layers[1].share_expert.up_proj.weight, theirs.layers[1].share_expert.up_proj.weight), "160"
    assert isinstance(ours.layers[0].mlp, QuantisedDense)


def test_what_is_not_asked_for_is_not_read(written: Path) -> None:
    half = read_ffn(Checkpoint.open(written), FFNShard((1,)), torch.float32, dense=False, keep=NARROW_PARTS)
    there = {name for name, parameter in half.named_parameters() if not parameter.is_meta}
    assert {name.split(".")[-1] for name in there} == {
        f"{n}_{kind}" for n in ("gate", "up", "down") for kind in ("proj", "scales")
    }
    assert all(name.startswith("layers.1.moe.") for name in there)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """To break."""
    write_checkpoint(tmp_path, CONFIG, scaled_tensors(random_tensors(CONFIG, seed=3)))
    return tmp_path


def change(directory: Path, **changes: Tensor | None) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file) | {key.replace("__", "."): value for key, value in changes.items()}
    save_file({key: value for key, value in tensors.items() if value is not None}, file)


@pytest.mark.parametrize(
    ("key", "make", "expected"),
    [
        (UP + SCALES, lambda _: None, f"{UP}{SCALES}: missing, {UP} is in F8_E4M3"),
        (UP + SCALES, lambda t: t[:, :2], rf"{UP}{SCALES}: must be \[4, 3, 1\] in F32 or BF16, got \[4, 2, 1\] in F32"),
        (WQ, lambda t: t.float(), f"{WQ}{SCALES}: extra, the model has no such tensor"),
        (
            "model.norm.weight",
            lambda t: t.to(torch.float8_e4m3fn),
            "model.norm.weight: dtype must be one of F32, BF16, got F8_E4M3",
        ),
        (
            "model.layers.0.self_attn.k_scale",
            lambda _: torch.ones(2),
            r"k_scale: must be one number in F32 or BF16, got \[2\] in F32",
        ),
        ("model.layers.2.self_attn.k_scale", lambda _: torch.ones(1), "k_scale: extra, the model has no such tensor"),
    ],
)
def test_scales_that_do_not_fit_are_told(
    directory: Path, key: str, make: Callable[[Tensor | None], Tensor | None], expected: str
) -> None:
    held = load_file(directory / "model.safetensors").get(key)
    made = make(held)
    change(directory, **{key: None if made is None else made.contiguous()})
    with pytest.raises(CheckpointError, match=expected):
        Checkpoint.open(directory).require_sound()


def test_scales_that_are_not_numbers_are_found(directory: Path) -> None:
    change(directory, **{UP + SCALES: torch.full((4, 3, 1), float("nan"))})
    assert list(verify(Checkpoint.open(directory))) == [f"{UP}{SCALES}: 12 values are not finite"]


def test_e4m3_without_a_word_of_it_is_refused(directory: Path) -> None:
    (directory / "config.json").write_text(json.dumps(replace(CONFIG, scaled=False).to_dict()))
    with pytest.raises(CheckpointError, match=r"is in F8_E4M3, but config\.json has no quantization_config"):
        Checkpoint.open(directory).require_sound()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"quant_method": "awq"}, "quantization_config.quant_method must be fp8 .* got 'awq'"),
        ({"weight_block_size": [64, 64]}, r"quantization_config.weight_block_size must be \[128, 128\] .* got \[64, 64\]"),
        ({"weight_block_size": None}, r"weight_block_size must be \[128, 128\] .* got null"),
        ({"fmt": "e5m2"}, "quantization_config.fmt must be e4m3"),
        ({"activation_scheme": "static"}, "quantization_config.activation_scheme must be dynamic"),
    ],
)
def test_other_ways_to_quantise_are_refused(given: dict[str, object], told: str) -> None:
    raw = CONFIG.to_dict() | {"quantization_config": E4M3 | given}
    with pytest.raises(ValueError, match=told):
        ModelConfig.from_dict(raw)
    with pytest.raises(ValueError, match="must be an object"):
        ModelConfig.from_dict(raw | {"quantization_config": 8})


def test_what_a_configuration_says_beside_the_blocks_does_not_matter() -> None:
    said = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]}
    outer = {"model_type": "step3_vl", "text_config": replace(CONFIG, scaled=False).to_dict(), "quantization_config": said}
    assert ModelConfig.from_dict(outer) == CONFIG


def test_a_layer_s_scales_of_keys_and_values_are_read(directory: Path) -> None:
    scales = {"model.layers.1.self_attn.k_scale": torch.tensor(0.5), "model.layers.1.self_attn.v_scale": torch.tensor([2.0])}
    change(directory, **scales)
    half = load_attention(Checkpoint.open(directory))
    assert [half.layer(index).self_attn.cache_scales for index in range(2)] == [CacheScales(1.0, 1.0), CacheScales(0.5, 2.0)]
    half.scale_cache(None, 4.0)
    assert [half.layer(index).self_attn.cache_scales for index in range(2)] == [CacheScales(1.0, 4.0), CacheScales(0.5, 4.0)]
    change(directory, **{"model.layers.1.self_attn.k_scale": torch.tensor(0.0)})
    with pytest.raises(CheckpointError, match=r"k_scale: must be above 0, got 0\.0$"):
        load_attention(Checkpoint.open(directory))


def test_the_command_writes_one_and_finds_it_sound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "init", "step3-tiny", str(tmp_path / "made"), "--fp8", "--json"]) == 0
    assert main(["checkpoint", "verify", str(tmp_path / "made")]) == 0
    assert "sound" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "made")
