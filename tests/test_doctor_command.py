"""`afd-ray doctor`: this host, and every host of a live Ray cluster."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from actors.cli import main


def examined(capsys: pytest.CaptureFixture[str], code: int, *words: str) -> dict[str, Any]:
    assert main(["doctor", "--json", *words]) == code
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


def errors(answer: dict[str, Any]) -> list[tuple[str, str]]:
    return [(finding["check"], finding["found"]) for finding in answer["findings"] if finding["severity"] == "error"]


def test_this_host_is_fit_to_serve_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    answer = examined(capsys, 0, "--set", "server.port=0")
    assert errors(answer) == []
    (host,) = answer["examined"]["hosts"]
    assert host["name"] == socket.gethostname()
    assert [link["error"] for link in answer["examined"]["links"]] == [None]


def test_faults_of_this_host_are_found(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        answer = examined(capsys, 1, "--set", f"server.port={port}", "--set", f"model.path={tmp_path / 'none'}")
    assert sorted(check for check, _ in errors(answer)) == ["model", "ports"]


def test_it_says_what_to_change(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["doctor", "--set", f"model.path={tmp_path / 'none'}", "--set", "server.port=0"]) == 1
    out = capsys.readouterr().out
    assert "error: model" in out
    assert "change: put the checkpoint at" in out


def test_without_a_cluster_at_the_address(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    answer = examined(capsys, 1, "--address", address)
    assert answer["examined"] is None
    assert errors(answer) == [("addresses", f"no Ray cluster at {address} (Connection refused)")]


@pytest.mark.ray
async def test_every_host_of_a_cluster_is_looked_at_and_every_pair_meets(two_nodes: None) -> None:
    from actors.doctor.examination import examine_cluster
    from afd_ray.config import load_config
    from afd_ray.diagnosis.findings import diagnose

    config = load_config(None, ["attention.labels={pool: nowhere}", "server.port=0"])
    facts = await examine_cluster(config)
    assert len(facts.hosts) == 2
    assert sorted((link.kind, link.error) for link in facts.meetings) == [("shm", None), ("shm", None), ("tcp", None)]
    assert facts.silent == ()
    assert "labels" in [finding.check for finding in diagnose(config, facts)]
    assert facts.placed == {}


@pytest.mark.ray
async def test_where_actors_would_be_placed_is_known(two_nodes: None) -> None:
    from actors.doctor.examination import examine_cluster
    from afd_ray.config import load_config

    facts = await examine_cluster(load_config(None, ["server.port=0"]))
    (attention,), (ffn,) = facts.placed["attention"], facts.placed["ffn"]
    assert {attention, ffn} == {host.name for host in facts.hosts}
