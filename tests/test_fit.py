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
        ({"ffn": {"expert_parallel": 9}}, "ffn.expert_parallel must be at most the model's 8 experts, got 9"),
    ],
)
def test_a_setting_that_the_model_cannot_have(checkpoint: Checkpoint, raw: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_fits(parse_config(raw), checkpoint)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_broken_tokenizer(checkpoint: Checkpoint) -> None:
    check_fits(Config(), checkpoint)
    (checkpoint.directory / "tokenizer.json").write_text(json.dumps([]))
    with pytest.raises(TokenizerError, match="not a tokenizer"):
        check_fits(Config(), checkpoint)


def test_a_small_cache_shortens_the_context() -> None:
    config = parse_config({"attention": {"kv_cache": {"num_blocks": 4, "block_size": 16}}})
    assert (config.context_limit(1024), Config().context_limit(1024)) == (64, 1024)
    assert parse_config({"model": {"max_context": 9}}).context_limit(1024) == 9
