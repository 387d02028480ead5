"""Another version of the ingress, deployed while streams are under way: they end as if nothing had been, and new requests meet the new settings."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import ray
from ray import serve

from actors.cluster import create_controller
from actors.ingress import build
from actors.serve import APPLICATION, Progress, await_ready, free_port
from afd_ray.config import load_config
from afd_ray.models.checkpoint import Checkpoint, load_model
from tests.live_server import until

pytestmark = [pytest.mark.ray, pytest.mark.full, pytest.mark.usefixtures("two_nodes")]

CONTROLLER = "afd-rolling"
HOST = "127.0.0.1"
PROMPT, TOKENS = [1, 2, 3], 200
"""With the stages below half a minute: a replica that came anew has long been up when such a stream ends."""
TIMEOUT_S = 120.0


class Stream(threading.Thread):
    """One greedy streaming completion."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.url = url
        self.tokens: list[int] = []
        self.start()

    def run(self) -> None:
        asked = {
            "prompt": PROMPT,
            "max_tokens": TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        with httpx.stream("POST", f"{self.url}/v1/completions", json=asked, timeout=TIMEOUT_S, trust_env=False) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    self.tokens += [
                        token for choice in json.loads(line[6:])["choices"] for token in choice.get("token_ids") or ()
                    ]


@pytest.fixture
def overrides(tiny_directory: Path) -> list[str]:
    slow = ["attention.pace={base_us: 30000}", "attention.replicas=1", "server.replicas=2", "failure.drain_timeout_s=60"]
    return [f"model.path={tiny_directory}", *slow]


@pytest.fixture
def url(overrides: list[str]) -> Iterator[str]:
    config, port = load_config(None, overrides), free_port(HOST, 0)
    controller = create_controller(config, CONTROLLER)
    try:
        ray.get(controller.start.remote())
        serve.start(proxy_location="HeadOnly", http_options={"host": HOST, "port": port})
        serve.run(build(CONTROLLER, config), name=APPLICATION, route_prefix="/")
        await_ready(HOST, port, Progress())
        yield f"http://{HOST}:{port}"
    finally:
        serve.shutdown()
        ray.get(controller.shutdown.remote())
        ray.kill(controller)


def test_an_update_of_the_ingress_ends_no_stream(url: str, overrides: list[str], tiny_directory: Path) -> None:
    streams = [Stream(url) for _ in range(4)]
    until(lambda: all(len(stream.tokens) >= 5 for stream in streams))
    serve.run(build(CONTROLLER, load_config(None, [*overrides, "server.max_body_bytes=100"])), name=APPLICATION, route_prefix="/")
    large = httpx.post(f"{url}/v1/completions", content=b"x" * 200, timeout=TIMEOUT_S, trust_env=False)
    assert large.status_code == 413
    for stream in streams:
        stream.join(TIMEOUT_S)
    expected = load_model(Checkpoint.open(tiny_directory)).generate_greedy(PROMPT, TOKENS)
    assert [stream.tokens for stream in streams] == 4 * [expected]
