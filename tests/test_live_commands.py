"""`status` and `trace` against the live server, by HTTP and through Ray."""

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.live_server import DEADLINE_S, LiveServer, until

pytestmark = pytest.mark.ray

KEYS = {
    *("state", "epoch", "model", "attention", "ffn", "placement_groups", "tpot_ms", "ttft_ms", "stages_us", "last_resize"),
}
COMMON_KEYS = {"id", "rank", "node", "address", "pid", "placement_group", "state", "pace"}
ATTENTION_KEYS = COMMON_KEYS | {"running", "waiting", "kv_used", "kv_total"}
FFN_KEYS = COMMON_KEYS | {"instance", "tp_rank", "experts"}
STAGES = {"attention", "ffn", "a2f", "f2a", "attention_wait", "ffn_wait"}


def run(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "actors.cli", *words], capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def answer(live: LiveServer, max_tokens: int = 20) -> None:
    body = {"prompt": "Ben has", "max_tokens": max_tokens, "ignore_eos": True}
    httpx.post(f"{live.url}/v1/completions", json=body, timeout=DEADLINE_S, trust_env=False).raise_for_status()


def test_status_has_what_is_promised(live: LiveServer) -> None:
    answer(live)
    status: dict[str, Any] = json.loads(run("status", "--json", "--url", live.url))
    assert set(status) >= KEYS
    assert (status["state"], status["model"], status["last_resize"]) == ("ready", "demo", None)
    assert [set(actor) >= ATTENTION_KEYS for actor in status["attention"]] == [True, True]
    assert [set(rank) >= FFN_KEYS for rank in status["ffn"]] == [True]
    assert all(actor["state"] == "running" for actor in (*status["attention"], *status["ffn"]))
    assert all(set(group) == {"id", "role", "strategy", "state", "nodes"} for group in status["placement_groups"])
    assert [group["role"] for group in status["placement_groups"]] == ["attention", "attention", "ffn"]
    assert set(status["tpot_ms"]) == set(status["ttft_ms"]) == {"p50", "p95", "p99"}
    assert set(status["stages_us"]) == STAGES
    assert len({group["id"] for group in status["placement_groups"]}) == 3
    assert {actor["pid"] for actor in (*status["attention"], *status["ffn"])} <= {process.pid for process in live.processes()}


def test_the_last_minute_is_told_of_every_actor(live: LiveServer) -> None:
    answer(live)
    status = live.status()
    served = [actor for actor in status["attention"] if actor["tpot_ms"]]
    assert served
    assert all(actor["tokens_per_step"] >= 1 and actor["output_tokens_s"] > 0 for actor in served)
    assert all(set(actor["stages_us"]) >= {"attention", "f2a", "head"} for actor in served)
    assert all(0 <= actor["bubble"] < 1 for actor in (*served, *status["ffn"]))
    assert status["targets_ms"] == {"tpot": 50.0, "ttft": 1000.0}


def test_metrics_tell_of_every_actor_and_count_up(live: LiveServer) -> None:
    before = live.metric("afd_output_tokens_total")
    answer(live)
    assert live.metric("afd_output_tokens_total") == before + 20
    lines = live.http.get("/metrics").text.splitlines()
    stages = {(actor["id"], stage) for actor in live.status()["attention"] for stage in actor["stages_us"]}
    for actor, stage in stages:
        assert any(line.startswith(f'afd_stage_runs_total{{actor="{actor}",role="attention",stage="{stage}"}}') for line in lines)
    assert 'afd_cluster_state{state="ready"} 1.0' in lines


def test_status_through_ray_is_the_same(live: LiveServer) -> None:
    by_ray = json.loads(run("status", "--json", "--address", live.ray_address))
    assert [actor["id"] for actor in by_ray["attention"]] == [actor["id"] for actor in live.status()["attention"]]


def test_status_as_a_table(live: LiveServer) -> None:
    text = run("status", "--url", live.url)
    assert "demo: ready, epoch 1" in text
    assert "attention (2)" in text


def test_trace_shows_the_stages_of_every_actor(live: LiveServer, tmp_path: Path) -> None:
    output = tmp_path / "trace.json"
    load = [threading.Thread(target=answer, args=(live, 200)) for _ in range(4)]
    for thread in load:
        thread.start()
    until(lambda: not live.idle())
    run("trace", "-o", str(output), "--steps", "8", "--url", live.url)
    for thread in load:
        thread.join(DEADLINE_S)
    events = json.loads(output.read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert {"attention", "ffn"} <= {span["name"].split()[0] for span in spans}
    assert len({span["pid"] for span in spans}) == 3
    assert all(span["dur"] >= 0 for span in spans)
