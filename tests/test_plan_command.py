"""`afd-ray plan` as a user meets it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from actors.cli import main
from afd_ray.config import check_supported, load_config

SMALL = ("--hardware", "h100", "--max-gpus", "32", "--micro-batches", "3")


def output(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["plan", *words]) == 0
    return capsys.readouterr().out


def test_the_configuration_is_one_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "cluster.yaml"
    plan = json.loads(output(capsys, *SMALL, "--json", "-o", str(file), "--checkpoint", "/models/step3"))["plan"]
    config = load_config(file)
    assert config.model.path == "/models/step3"
    assert config.attention.replicas == plan["attention"]["ranks"]
    assert config.ffn.ranks == plan["ffn"]["ranks"]
    assert config.pipeline.micro_batches == plan["micro_batches"] == 3
    assert config.pipeline.max_running_requests * config.attention.replicas == plan["batch"]


@pytest.mark.parametrize(("asked", "written"), [("fp8", "fp8"), ("bf16", "bfloat16")])
def test_what_is_planned_in_8_bits_is_configured_so(tmp_path: Path, asked: str, written: str) -> None:
    file = tmp_path / "cluster.yaml"
    assert main(["plan", *SMALL, "--kv-dtype", asked, "-o", str(file)]) == 0
    config = load_config(file)
    assert (config.attention.kv_cache.dtype, config.ffn.expert_dtype) == (written, "fp8")
    assert (config.attention.projection_dtype, config.ffn.dense_dtype) == ("fp8", "fp8")
    check_supported(config)


def test_a_plan_says_ratio_batch_memory_latency_price_and_what_binds(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, *SMALL)
    for word in ("A:F", "micro-batches", "GB each", "TPOT", "for each GPU", "USD for a million tokens", "binding constraint"):
        assert word in text
    assert "tensor_parallel: 8" in text


def test_a_price_and_a_cache_precision_change_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    usual, dear, wide = (
        json.loads(output(capsys, *SMALL, "--json", *more))["plan"]["usd_per_million_tokens"]
        for more in ([], ["--price", "h100=5"], ["--kv-dtype", "bf16"])
    )
    assert dear == pytest.approx(2 * usual, rel=1e-3)
    assert wide > usual


def test_a_model_that_is_not_served_gets_a_layout_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    answer = json.loads(output(capsys, *SMALL, "--model", "qwen3-32b", "--json"))
    assert "this is the layout alone" in answer["configuration"]
    assert answer["at_peaks"]["usd_per_million_tokens"] < answer["plan"]["usd_per_million_tokens"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--model", "step4"], "did you mean step3"),
        (["--hardware", "h100,h900"], "must be one of"),
        (["--hardware", ","], "at least one accelerator"),
        (["--tpot-ms", "0"], "must be a number above 0"),
        (["--tpot-ms", "nan"], "must be a number above 0"),
        (["--context", "-1"], "must be an integer"),
        (["--micro-batches", "5"], "from 1 to 4"),
        (["--price", "h20"], "must be NAME=USD"),
        (["--price", "b200=1"], "price: must be one of"),
        (["--tpot-ms", "1", "--hardware", "h100", "--max-gpus", "32"], "cannot be met"),
    ],
)
def test_bad_input_is_one_line(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert expected in captured.err


def test_reproduce_prints_every_table_beside_the_papers(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "--reproduce")
    for table in ("Table 2", "Table 3", "Table 5", "Table 6", "Table 7", "Table 8", "Section 6"):
        assert table in text
    assert "209 of 209 figures within tolerance" in text
    assert len(json.loads(output(capsys, "--reproduce", "--json"))) == 209


def test_planning_imports_neither_torch_nor_ray() -> None:
    code = "import sys; from actors.cli import main; main(['plan', '--reproduce', '--json']); assert not {'torch', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
