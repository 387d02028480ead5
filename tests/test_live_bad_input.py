"""Bad input to the live server and to the command line: one clear line each, and nobody else is harmed."""

import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from actors.cli import main
from tests.live_server import DEADLINE_S, LiveServer, until

pytestmark = pytest.mark.ray

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


class Bad(NamedTuple):
    name: str
    body: bytes
    status: int
    said: str
    param: str | None = None
    path: str = COMPLETIONS
    method: str = "POST"


ITEMS = [
    Bad("no body", b"", 400, "body must be valid JSON"),
    Bad("malformed JSON", b'{"prompt": "x"', 400, "body must be valid JSON"),
    Bad("no object", b"[1]", 400, "body must be a JSON object"),
    Bad("invalid UTF-8", b'{"prompt": "\xff\xfe"}', 400, "body must be valid UTF-8, got a wrong byte at position 12"),
    Bad("prompt of a wrong type", b'{"prompt": {"a": 1}}', 400, "prompt must be text", "prompt"),
    Bad("max_tokens of a wrong type", b'{"prompt": "x", "max_tokens": "5"}', 400, "max_tokens is wrong", "max_tokens"),
    Bad("stream of a wrong type", b'{"prompt": "x", "stream": "yes"}', 400, "stream is wrong", "stream"),
    Bad("message of a wrong type", b'{"messages": [{"role": 1, "content": "x"}]}', 400, "wrong", "messages.0.role", CHAT),
    Bad("no prompt", b"{}", 400, "prompt must be given", "prompt"),
    Bad("empty prompt", b'{"prompt": ""}', 400, "prompt must not be empty", "prompt"),
    Bad("empty list of prompts", b'{"prompt": []}', 400, "prompt must not be empty", "prompt"),
    Bad("no messages", b'{"messages": []}', 400, "messages must not be empty", "messages", CHAT),
    Bad("prompt over the context", b'{"prompt": [5%s]}' % (b", 5" * 4000), 400, "context of 2048 tokens", "prompt"),
    Bad("output over the context", b'{"prompt": "x", "max_tokens": 4000}', 400, "context of 2048 tokens", "max_tokens"),
    Bad("token id outside the vocabulary", b'{"prompt": [1, 999999]}', 400, "token ids from 0 to", "prompt"),
    Bad("negative token id", b'{"prompt": [-1]}', 400, "token ids from 0 to", "prompt"),
    Bad("max_tokens 0", b'{"prompt": "x", "max_tokens": 0}', 400, "max_tokens must be at least 1, got 0", "max_tokens"),
    Bad("max_tokens negative", b'{"prompt": "x", "max_tokens": -3}', 400, "must be at least 1, got -3", "max_tokens"),
    Bad("temperature NaN", b'{"prompt": "x", "temperature": NaN}', 400, "NaN is not a JSON number"),
    Bad("temperature infinite", b'{"prompt": "x", "temperature": 1e999}', 400, "from 0 to 100, got inf", "temperature"),
    Bad("unknown model", b'{"prompt": "x", "model": "gpt-4"}', 404, "model 'gpt-4' does not exist", "model"),
    Bad("2 MB body", b'{"prompt": "%s"}' % (b"x" * 2_000_000), 413, "body must be at most 1048576 bytes"),
    Bad("unknown route", b"{}", 404, "unknown route /v1/embeddings", path="/v1/embeddings"),
    Bad("wrong method", b"", 405, "method GET is not allowed", method="GET"),
    Bad("admin scale without counts", b"{}", 400, "attention, ffn or ffn_tensor_parallel, or cancel", path="/admin/scale"),
    Bad("admin trace of no steps", b'{"steps": 0}', 400, "steps must be an integer", "steps", "/admin/trace"),
]


def send(live: LiveServer, item: Bad) -> httpx.Response:
    return live.http.request(item.method, item.path, content=item.body, headers={"content-type": "application/json"})


@pytest.mark.parametrize("item", ITEMS, ids=lambda item: item.name)
def test_bad_input_is_an_openai_error(live: LiveServer, item: Bad) -> None:
    response = send(live, item)
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert item.said in error["message"]
    assert "\n" not in error["message"]
    assert (response.status_code, error["param"]) == (item.status, item.param)
    assert error["type"] == "invalid_request_error"


def test_streamed_bad_input_still_has_its_status(live: LiveServer) -> None:
    response = live.http.post(COMPLETIONS, json={"prompt": "x", "max_tokens": 0, "stream": True})
    assert (response.status_code, response.headers["content-type"]) == (400, "application/json")


LONG: dict[str, Any] = {"prompt": "Ben has", "max_tokens": 500, "temperature": 0, "ignore_eos": True, "stream": True}


class LongStream:
    """A long answer that somebody reads in a thread of their own."""

    def __init__(self, url: str) -> None:
        self.text = ""
        self.chunks = 0
        self._thread = threading.Thread(target=self._read, args=(url,))
        self._thread.start()

    @property
    def going_on(self) -> bool:
        return self._thread.is_alive()

    def whole(self) -> str:
        self._thread.join(DEADLINE_S)
        return self.text

    def _read(self, url: str) -> None:
        with httpx.stream("POST", url + COMPLETIONS, json=LONG, timeout=DEADLINE_S, trust_env=False) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    self.text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
                    self.chunks += 1


def test_a_request_in_flight_is_not_harmed(live: LiveServer) -> None:
    undisturbed = LongStream(live.url).whole()
    stream = LongStream(live.url)
    until(lambda: stream.chunks > 0)
    statuses = [send(live, item).status_code for item in ITEMS]
    assert stream.going_on
    assert statuses == [item.status for item in ITEMS]
    assert stream.whole() == undisturbed
    assert stream.chunks > 100
    until(live.idle)
    assert live.status()["state"] == "ready"


Fails = Callable[..., str]


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Fails:
    """Runs a command that must fail, and tells the one line that it says."""
    # Otherwise `--address` would set it, for the rest of the tests too.
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")

    def run(code: int, *words: str) -> str:
        assert main(words) == code
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        return captured.err

    return run


def test_an_unknown_key_in_a_file_names_the_nearest(fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("attention: {replicsa: 2}\n")
    line = fails(2, "serve", str(tmp_path / "own.yaml"))
    assert "attention.replicsa: unknown key, did you mean attention.replicas?" in line


def test_a_missing_file_is_named(fails: Fails) -> None:
    assert "nowhere.yaml: no such file" in fails(2, "serve", "nowhere.yaml")


def without_a_tensor(directory: Path) -> str:
    _rewrite(directory, lambda tensors: tensors.pop("lm_head.weight"))
    return "lm_head.weight: missing"


def with_a_tensor_too_many(directory: Path) -> str:
    _rewrite(directory, lambda tensors: tensors.update({"model.extra.weight": torch.zeros(2)}))
    return "model.extra.weight"


def with_a_wrong_shape(directory: Path) -> str:
    _rewrite(directory, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(3)}))
    return "model.norm.weight"


def truncated(directory: Path) -> str:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return "truncated"


def with_a_header_beyond_its_end(directory: Path) -> str:
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    return "model.safetensors"


def _rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize(
    "damage", [without_a_tensor, with_a_tensor_too_many, with_a_wrong_shape, truncated, with_a_header_beyond_its_end]
)
def test_a_broken_checkpoint_is_refused(
    fails: Fails, tiny_directory: Path, tmp_path: Path, damage: Callable[[Path], str]
) -> None:
    directory = Path(shutil.copytree(tiny_directory, tmp_path / "model"))
    said = damage(directory)
    assert said in fails(1, "serve", "--port", "0", "--set", f"model.path={directory}")


def test_a_taken_port_is_named(fails: Fails, live: LiveServer) -> None:
    port = live.url.rpartition(":")[2]
    assert f"server.port: cannot listen on 127.0.0.1:{port} (Address already in use)" in fails(1, "serve", "--port", port)


def test_commands_without_a_server_say_so(fails: Fails, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        assert f"no server at {url}" in fails(1, "status", "--url", url)
        assert f"no server at {url}" in fails(1, "trace", "--url", url, "-o", str(tmp_path / "t.json"))
        assert "no Ray cluster at" in fails(1, "status", "--address", url.removeprefix("http://"))
    assert list(tmp_path.iterdir()) == []


def test_more_actors_than_resources(tiny_directory: Path, two_nodes: None) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    overrides = ("--set", "attention.replicas=40", "--set", f"model.path={tiny_directory}")
    command = [sys.executable, "-m", "actors.cli", "serve", "--port", "0", "--address", address, *overrides]
    # As the two nodes do, whatever has become of the token meanwhile.
    env = os.environ | {"RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "disabled")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False, env=env)
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert "needed: attention 40 CPUs in 40 group(s)" in done.stderr.splitlines()[-1]
