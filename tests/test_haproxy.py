"""Serve's HAProxy in front of the ingress replicas (docs/deploy.md): what is promised over HTTP holds there too."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from benchmarks._server import HAPROXY, Server, served
from tests.live_server import DEADLINE_S, until

pytestmark = [pytest.mark.ray, pytest.mark.full]

KEY, ADMIN_KEY = "for-completions", "for-operators"
ASKED = {"prompt": "What is 12 plus 7?", "max_tokens": 64, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("haproxy")
    settings = [
        f"server.api_keys_file={_keys(directory / 'api', KEY)}",
        f"server.admin_keys_file={_keys(directory / 'admin', ADMIN_KEY)}",
    ]
    settings += ["failure.detect_timeout_s=10", "server.max_body_bytes=65536"]
    arguments = [argument for setting in settings for argument in ("--set", setting)]
    with served(*arguments, environment=HAPROXY) as server:
        yield server


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(
        base_url=server.url, timeout=DEADLINE_S, headers={"Authorization": f"Bearer {KEY}"}, trust_env=False
    ) as client:
        yield client


def _keys(file: Path, key: str) -> Path:
    file.write_text(key + "\n")
    return file


def _haproxy(server: Server) -> list[psutil.Process]:
    """The processes of the server's HAProxy."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    return [child for child in children if child.is_running() and child.name() == "haproxy"]


def test_a_stream_is_the_answer_in_pieces(server: Server, http: httpx.Client) -> None:
    assert _haproxy(server)
    whole = http.post("/v1/completions", json=ASKED).json()["choices"][0]["text"]
    with http.stream("POST", "/v1/completions", json={**ASKED, "stream": True}) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    assert "".join(choice["text"] for line in lines[:-1] for choice in json.loads(line)["choices"]) == whole


@pytest.mark.parametrize(
    ("path", "sent", "status"),
    [
        ("/v1/completions", {"headers": {"Authorization": "Bearer somebody"}, "json": ASKED}, 401),
        ("/admin/scale", {"json": {"attention": 1}}, 401),
        ("/v1/completions", {"content": b"x" * 100_000}, 413),
        ("/v1/completions", {"json": {**ASKED, "max_tokens": -1}}, 400),
        ("/v1/nothing", {"json": {}}, 404),
    ],
)
def test_refusals_are_those_of_the_ingress(http: httpx.Client, path: str, sent: dict[str, Any], status: int) -> None:
    response = http.post(path, **sent)
    assert response.status_code == status
    assert response.json()["error"]["message"]


def test_a_client_that_leaves_ends_its_request(http: httpx.Client) -> None:
    asked = {**ASKED, "max_tokens": 1800, "stream": True}
    with http.stream("POST", "/v1/completions", json=asked) as response:
        next(line for line in response.iter_lines() if line.startswith("data: "))

    until(lambda: re.search(r"afd_choices_finished_total\{reason=\"abort\",.*} 1\.0", http.get("/metrics").text) is not None)


def test_an_haproxy_that_is_killed_comes_back(server: Server, http: httpx.Client) -> None:
    before = _haproxy(server)
    assert before
    for process in before:
        process.kill()
    psutil.wait_procs(before, timeout=DEADLINE_S)

    def answers() -> bool:
        try:
            return http.post("/v1/completions", json=ASKED).status_code == 200
        except httpx.TransportError:
            return False

    until(answers)
    assert set(_haproxy(server)).isdisjoint(before)
