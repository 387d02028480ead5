import io
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import actors
from actors.cli import main
from actors.commands.progress import ProgressLine
from actors.commands.status import render, spans

STATUS = {
    "state": "ready",
    "epoch": 3,
    "model": "demo",
    "attention": [
        {"id": "a-1", "rank": 0, "node": "0123456789abcdef", "address": "[::1]:5", "pid": 9, "state": "running", "running": 2}
        | {"waiting": 0, "kv_used": 4, "kv_total": 100, "pace": None}
    ],
    "ffn": [{"id": "f-1", "rank": 0, "state": "running", "instance": 0, "tp_rank": 0, "experts": [0, 1, 2, 5], "pace": None}],
    "tpot_ms": {"p50": 1.25, "p95": 2.0, "p99": 3.0},
    "ttft_ms": None,
    "stages_us": {"attention": 100},
    "last_resize": None,
}


class Handler(BaseHTTPRequestHandler):
    """A server with one admin key."""

    def do_GET(self) -> None:
        if self.headers.get("Authorization") != "Bearer right":
            self.answer(401, {"error": {"message": "wrong admin key"}})
        elif self.path.startswith("/admin/decisions"):
            self.answer(200, {"policy": "fixed", "decisions": []})
        else:
            self.answer(200, STATUS)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body.get("cancel"):
            self.answer(200, {"outcome": "rolled_back", "reason": "called off by an operator"})
            return
        if self.path == "/admin/scale":
            self.answer(409, {"outcome": "rolled_back", "reason": "no room", "error": {"message": "rolled_back: no room"}})
            return
        self.answer(200, {"traceEvents": [{"name": "attention"}] * body["steps"]} if self.path == "/admin/trace" else {})

    def answer(self, code: int, value: object) -> None:
        content = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def tiny(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert main(["checkpoint", "init", "step3-tiny", str(tmp_path / "tiny"), "--seed", "1"]) == 0
    capsys.readouterr()
    return tmp_path / "tiny"


class Serving:
    """Stands for actors.serve: remembers what it was asked."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def serve(self, config: Any, address: str | None) -> int:
        self.calls.append((config, address))
        return 0

    def generate(self, config: Any, **options: Any) -> int:
        self.calls.append((config, options))
        return 0


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> Serving:
    stand_in = Serving()
    monkeypatch.setitem(sys.modules, "actors.serve", stand_in)
    monkeypatch.setattr(actors, "serve", stand_in, raising=False)
    # Otherwise `--address` would set it, for the rest of the tests too.
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    return stand_in


def fails(capsys: pytest.CaptureFixture[str], code: int, *words: str) -> str:
    """Runs a command that must fail with one line on stderr and nothing on stdout; returns the line."""
    assert main(words) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_help_needs_neither_torch_nor_ray() -> None:
    code = "import sys; from actors.cli import main; main(['--help']); sys.exit(any(m in sys.modules for m in ('torch', 'ray')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    for command in ("serve", "status", "generate", "trace", "checkpoint", "demo"):
        assert command in done.stdout


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (["serv"], 2, "serv"),
        (["serve", "nowhere.yaml"], 2, "nowhere.yaml: no such file"),
        (["serve", "--set", "attention.replica=2"], 2, "attention.replica: unknown key, did you mean attention.replicas?"),
        (["serve", "--set", "model.path=/nowhere"], 2, "model.path: /nowhere is no directory"),
        (
            ["serve", "--set", "handoff.kind=nccl"],
            2,
            "handoff.kind: nccl needs GPUs on both sides, set attention.num_gpus above 0",
        ),
        (["serve", "--port", "70000"], 2, "must be an integer from 0 to 65535, got '70000'"),
        (["serve", "--address", "here"], 2, "must be HOST:PORT or auto, got 'here'"),
        (["generate", "--prompt", ""], 2, "--prompt: must not be empty"),
        (["generate"], 2, "--prompt"),
        (["generate", "--prompt", "x", "--temperature", "nan"], 2, "temperature must be from 0 to 100, got nan"),
        (["status", "--url", "localhost"], 2, "must begin with http://"),
        (["status", "--url", "http://127.0.0.1:99999"], 2, "must be http://HOST:PORT with a port from 1 to 65535"),
        (["status", "--url", "http://"], 2, "must be http://HOST:PORT"),
        (["serve", ""], 2, "CONFIG: must be a YAML file or a bundled name"),
        (["generate", "--prompt", "\udcff"], 2, "--prompt: must be valid UTF-8"),
        (["status", "--url", "http://127.0.0.1:1"], 1, "no server at http://127.0.0.1:1 (Connection refused)"),
        (["trace", "-o", "/nowhere/t.json"], 2, "-o: /nowhere is no directory"),
        (["trace", "-o", "/tmp/t.json", "--steps", "0"], 2, "must be an integer from 1 to 10000, got '0'"),
        (["demo", "questions", "--count", "x"], 2, "must be an integer of at least 1, got 'x'"),
        (["demo", "questions", "--count", str(1 << 63)], 2, "must be below 2^63, got 9223372036854775808"),
        (["checkpoint", "init", "step3-tin"], 2, "PRESET: must be one of step3-tiny, step3-92m, step3, got 'step3-tin'"),
        (["checkpoint", "init", "step3-tiny"], 2, "DIR: missing"),
        (["checkpoint", "init", "step3-tiny", "/etc"], 2, "DIR: must be a new or empty directory, /etc is not"),
        (["checkpoint", "inspect", "/nowhere"], 2, "DIR: /nowhere is no directory"),
        (["checkpoint", "verify", "/nowhere"], 2, "DIR: /nowhere is no directory"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], code: int, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in fails(capsys, code, *words)


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "COMMAND" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("afd-ray ")


def test_serve_passes_the_configuration_on(serving: Serving) -> None:
    assert main(["serve", "--set", "server.port=1", "--port", "2", "--host", "::1", "--address", "a:6379"]) == 0
    ((config, address),) = serving.calls
    assert (config.server.port, config.server.host, address) == (2, "::1", "a:6379")


def test_generate_passes_the_prompt_on(serving: Serving) -> None:
    assert main(["generate", "demo", "--prompt", "Hi", "--max-tokens", "3", "--json"]) == 0
    ((_, options),) = serving.calls
    assert (options["prompt"], options["params"].max_tokens, options["as_json"]) == ("Hi", 3, True)


def test_an_unforeseen_error_is_one_line_or_with_debug_a_traceback(serving: Serving, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(config: object, address: object) -> int:
        raise KeyError("actor")

    serving.serve = broken  # type: ignore[method-assign]
    assert fails(capsys, 1, "serve") == "afd-ray: KeyError: 'actor' (--debug shows where)\n"
    assert main(["serve", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_status_as_json_and_as_tables(url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["status", "--url", url, "--api-key", "right", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == STATUS
    monkeypatch.setenv("AFD_ADMIN_KEY", "right")
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["status", "--url", url]) == 0
    out = capsys.readouterr().out
    for expected in ("demo: ready, epoch 3", "a-1", "[::1]:5", "4/100", "01234567", "0-2,5", "p95 2.0"):
        assert expected in out
    assert "89abcdef" not in out


@pytest.mark.parametrize("form", [["--json"], []])
def test_watch_shows_the_status_until_interrupted(
    form: list[str], url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    periods: list[float] = []

    def sleep(period_s: float) -> None:
        periods.append(period_s)
        if len(periods) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("actors.commands.status.time.sleep", sleep)
    assert main(["status", "--url", url, "--api-key", "right", "--watch", *form]) == 0
    assert len(periods) == 3
    out = capsys.readouterr().out
    assert [json.loads(line) for line in out.splitlines()] == [STATUS] * 3 if form else "demo  ready  epoch 3" in out


def test_a_resize_that_did_not_happen_says_why(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(capsys, 1, "scale", "--url", url, "--attention", "9") == "afd-ray: rolled_back: no room\n"
    assert main(["scale", "--url", url, "--attention", "9", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {"outcome": "rolled_back", "reason": "no room"}


def test_a_resize_can_be_called_off(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scale", "--url", url, "--cancel"]) == 0
    assert capsys.readouterr().out == "rolled_back: called off by an operator\n"
    assert "--cancel stands alone" in fails(capsys, 2, "scale", "--url", url, "--cancel", "--ffn", "2")


def test_who_stops_waiting_for_a_resize_is_told_that_it_goes_on(
    url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("actors.commands.scale.ask", interrupted)
    said = "afd-ray: the resize goes on; to call it off: afd-ray scale --cancel"
    assert fails(capsys, 130, "scale", "--url", url, "--ffn", "2") == f"{said} --url {url}\n"
    assert fails(capsys, 130, "scale", "--ffn", "2") == f"{said}\n"


def test_a_wrong_key_is_one_line(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(capsys, 1, "status", "--url", url, "--api-key", "x") == f"afd-ray: {url}/admin/status: 401, wrong admin key\n"


def test_a_status_with_little_in_it_still_renders() -> None:
    assert render({"state": "starting"})


def shown(status: dict[str, Any], width: int) -> str:
    from rich.console import Console, Group

    stream = io.StringIO()
    Console(file=stream, width=width).print(Group(*render(status)))
    return stream.getvalue()


def test_the_lost_are_told_below_the_table_and_not_counted() -> None:
    reason = "it has not answered for 1 s [silent]"
    dead = {"id": "a-2", "rank": None, "state": "dead", "reason": reason}
    text = shown(STATUS | {"attention": [*STATUS["attention"], dead]}, 80)  # type: ignore[misc]
    assert "attention (1)" in text
    assert f"a-2 is lost: {reason}" in text.splitlines()[-3].rstrip()


def test_a_trace_of_an_idle_server_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"traceEvents": [{"ph": "M", "name": "process_name"}], "otherData": {"overlap": None}}
    monkeypatch.setattr("actors.commands.trace.ask", lambda *_: names)
    assert fails(capsys, 1, "trace", "-o", str(tmp_path / "trace.json")).startswith("afd-ray: no request was in progress")
    assert list(tmp_path.iterdir()) == []


def test_what_a_resize_waits_for_is_told() -> None:
    lines = shown(STATUS | {"state": "resizing", "waiting_for": "nodes: needed: 98 CPUs [pool]"}, 80).splitlines()
    assert [line.strip() for line in lines[:2]] == ["demo: resizing, epoch 3", "waiting for nodes: needed: 98 CPUs [pool]"]


def test_no_figure_is_torn_apart() -> None:
    stages = {"attention": 1234.5, "ffn": 2345.6, "a2f": 345.7, "f2a": 45.8, "attention_wait": 1999.9, "ffn_wait": 1888.8}
    lines = shown(STATUS | {"stages_us": stages}, 40).splitlines()
    assert all(any(f"{stage} {us}" in line for line in lines) for stage, us in stages.items())


def test_the_last_resize_reads_as_a_sentence() -> None:
    counts = {"from": {"attention": 4, "ffn": 1}, "to": {"attention": 2, "ffn": 1}}
    resize = counts | {"outcome": "rolled_back", "reason": "no room", "pause_ms": None, "total_s": 1.25}
    last = shown(STATUS | {"last_resize": resize}, 120).splitlines()[-1]
    assert (
        " ".join(last.split()) == "last resize: 4 attention and 1 ffn to 2 attention and 1 ffn, rolled_back, no room, total_s 1.2"
    )


def test_spans() -> None:
    assert spans([5, 0, 1, 2]) == "0-2,5"
    assert spans([]) == ""


def test_trace_writes_what_the_server_recorded(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "trace.json"
    assert main(["trace", "--url", url, "-o", str(output), "--steps", "7"]) == 0
    assert len(json.loads(output.read_text())["traceEvents"]) == 7
    assert "7 events" in capsys.readouterr().err


def test_demo_questions_are_json_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fresh_questions(seed: int, count: int) -> list[SimpleNamespace]:
        return [SimpleNamespace(question=f"q{seed}", answer="a", kind="copying")] * count

    monkeypatch.setitem(sys.modules, "afd_ray.demo.questions", SimpleNamespace(fresh_questions=fresh_questions))
    assert main(["demo", "questions", "--seed", "4", "--count", "3"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [{"question": "q4", "answer": "a", "kind": "copying"}] * 3


def test_checkpoint_inspect_shows_the_shape_and_what_each_role_loads(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "inspect", str(tiny), "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["shape"]["hidden_size"] == 64
    assert described["bytes"]["attention"] + described["bytes"]["ffn"] == described["stored_bytes"]
    assert main(["checkpoint", "inspect", str(tiny)]) == 0
    assert "attention_side" in capsys.readouterr().out


def test_checkpoint_verify_lists_faults(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "verify", str(tiny)]) == 0
    assert "sound" in capsys.readouterr().out
    file = tiny / "model.safetensors"
    tensors = load_file(file)
    del tensors["lm_head.weight"]
    tensors["model.norm.weight"][3] = float("inf")
    save_file(tensors, file)
    assert main(["checkpoint", "verify", str(tiny)]) == 1
    assert capsys.readouterr().out.splitlines() == ["lm_head.weight: missing", "model.norm.weight: 1 values are not finite"]
    assert "lm_head.weight: missing" in fails(capsys, 1, "checkpoint", "inspect", str(tiny))
    file.write_bytes(file.read_bytes()[:-1])
    (tiny / "config.json").write_text("{")
    assert main(["checkpoint", "verify", str(tiny), "--json"]) == 1
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert [("config.json" in f or "truncated" in f) for f in findings] == [True, True]


def test_checkpoint_verify_reads_the_tokenizer_too(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tiny / "tokenizer.json").write_text("[]")
    assert main(["checkpoint", "verify", str(tiny)]) == 1
    (finding,) = capsys.readouterr().out.splitlines()
    assert finding.startswith(f"{tiny / 'tokenizer.json'}: not a tokenizer")


def test_checkpoint_commands_know_the_bundled_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "verify", "demo"]) == 0
    assert main(["checkpoint", "inspect", "demo", "--json"]) == 0
    assert "sound" in capsys.readouterr().out


def test_the_full_size_preset_only_counts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["checkpoint", "init", "step3", str(tmp_path / "x"), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["parameters"]["attention_per_layer"] == 169_345_024
    assert "nothing was written" in captured.err
    assert list(tmp_path.iterdir()) == []


def test_progress_is_quiet_at_first_then_told_at_intervals() -> None:
    now_s, stream = 0.0, io.StringIO()
    progress = ProgressLine("loading", stream, clock=lambda: now_s)
    for now_s in (0.5, 1.9, 2.1, 2.5, 4.2):
        progress(int(now_s * 10), 100)
    progress.finish()
    assert stream.getvalue() == "loading 21%\nloading 42%\n"
