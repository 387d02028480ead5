"""What is refused before Ray starts, because the model is known by then."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from actors.fit import check_fits
from afd_ray.config import Config, ConfigError, parse_config
from afd_ray.models.checkpoint import Checkpoint
from afd_ray.text import TokenizerError


@pytest.fixture
def checkpoint(tiny_directory: Path, tmp_path: Path) -> Checkpoint:
    return Checkpoint.open(Path(shutil.copytree(tiny_directory, tmp_path / "copy")))


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"model": {"max_context": 4096}}, "model.max_context: 4096 must be at most the model's 1024"),
        ({"model": {"max_context": 1}}, "model.max_context: 1 must be at least 2"),
        ({"attention": {"kv_cache": {"num_blocks": 1, "block_size": 1}}}, "num_blocks: 1 must hold at least 2 tokens"),
        ({"ffn": {"redundant_experts": 10_000}}, "ffn.redundant_experts: 10000 must be at most 24"),
        (
            {"attention": {"num_gpus": 1, "projection_dtype": "fp8"}},
            "attention.projection_dtype: fp8 needs projections whose outputs are multiples of 64 and whose inputs",
        ),
        ({"ffn": {"num_gpus": 1, "expert_dtype": "fp8"}}, "ffn.expert_dtype: fp8 needs hidden_size and what one rank holds of"),
        (
            {"ffn": {"num_gpus": 1, "dense_dtype": "fp8"}},
            "ffn.dense_dtype: fp8 needs hidden_size to be a multiple of 128, got 64",
        ),
        ({"ffn": {"expert_parallel": 9}}, "ffn.expert_parallel must be at most the model's 8 experts, got 9"),
    ],
)
def test_a_setting_that_the_model_cannot_have(checkpoint: Checkpoint, raw: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_fits(parse_config(raw), checkpoint)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"autoscaling": {"policy": "balanced"}}, "autoscaling.policy: balanced is not known, use fixed, queue, tpot, balance"),
        ({"autoscaling": {"policy": "no_such:policy"}}, "autoscaling.policy: no_such:policy cannot be loaded"),
        ({"autoscaling": {"policy": "json:nothing"}}, "autoscaling.policy: json:nothing cannot be loaded"),
        ({"autoscaling": {"policy": "json:__doc__"}}, "autoscaling.policy: json:__doc__ is no function"),
        (
            {"autoscaling": {"policy": "tpot"}, "ffn": {"colocated": True}},
            "autoscaling.policy: tpot must be fixed with ffn.colocated",
        ),
        (
            {"autoscaling": {"policy": "tpot", "max": {"ffn": 3}}, "ffn": {"tensor_parallel": 4}},
            "autoscaling.max.ffn: 3 must be at least ffn.tensor_parallel, 4",
        ),
        (
            {"autoscaling": {"policy": "tpot", "max": {"ffn": 9}}},
            "autoscaling.max: 4 attention and 9 x 1 FFN ranks are more than",
        ),
    ],
)
def test_a_policy_that_cannot_be_or_bounds_that_it_cannot_come_to(checkpoint: Checkpoint, raw: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=r"^autoscaling\.") as caught:
        check_fits(parse_config(raw), checkpoint)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


def test_a_module_that_fails_when_it_is_imported_is_one_line(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "failing_policies.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="failing_policies:any cannot be loaded: division by zero"):
        check_fits(parse_config({"autoscaling": {"policy": "failing_policies:any"}}), checkpoint)


def test_bounds_do_not_matter_to_the_fixed_policy(checkpoint: Checkpoint) -> None:
    check_fits(parse_config({"autoscaling": {"max": {"ffn": 9}}}), checkpoint)


def test_a_broken_tokenizer(checkpoint: Checkpoint) -> None:
    check_fits(Config(), checkpoint)
    (checkpoint.directory / "tokenizer.json").write_text(json.dumps([]))
    with pytest.raises(TokenizerError, match="not a tokenizer"):
        check_fits(Config(), checkpoint)


def test_a_small_cache_shortens_the_context() -> None:
    config = parse_config({"attention": {"kv_cache": {"num_blocks": 4, "block_size": 16}}})
    assert (config.context_limit(1024), Config().context_limit(1024)) == (64, 1024)
    assert parse_config({"model": {"max_context": 9}}).context_limit(1024) == 9
