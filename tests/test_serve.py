"""The main job's decisions, without a cluster: what is new, what leaves no room, which signals stop it."""

import os
import signal
from pathlib import Path

import psutil
import pytest
import ray
from ray._private import services

from actors import serve
from actors.cluster import ClusterError, start_ray
from actors.serve import News, Stopped, check_room, cut_short_by, group_of_its_own, stop_signals
from afd_ray.config import Config, parse_config
from afd_ray.request import SamplingParams
from benchmarks._server import Server
from tests.live_server import DEADLINE_S, until


def test_a_loss_is_told_once_and_a_state_when_it_changes() -> None:
    news = News("ready")
    assert news.of("ready", []) == []
    assert news.of("recovering", ["a-1 is lost: killed"]) == ["a-1 is lost: killed", "the cluster is recovering"]
    assert news.of("recovering", ["a-1 is lost: killed"]) == []
    assert news.of("ready", ["a-1 is lost: killed", "a-2 is lost: silent"]) == ["a-2 is lost: silent", "the cluster is ready"]


@pytest.mark.parametrize(
    ("prompt_tokens", "max_tokens", "said"),
    [
        (2048, None, "--prompt: must leave room for a token in the context of 2048 tokens, got 2048 tokens"),
        (48, 99_999, "--max-tokens: must be at most 2000, for the prompt has 48 of the context's 2048 tokens, got 99999"),
    ],
)
def test_what_the_context_is_too_short_for(prompt_tokens: int, max_tokens: int | None, said: str) -> None:
    check_room(48, 2000, 2048)
    with pytest.raises(ValueError, match=r"^--") as caught:
        check_room(prompt_tokens, max_tokens, 2048)
    assert str(caught.value) == said


def test_generate_refuses_too_many_tokens_before_ray_starts() -> None:
    with pytest.raises(ValueError, match="--max-tokens: must be at most"):
        serve.generate(Config(), prompt="Q: Hi", params=SamplingParams(max_tokens=99_999))


def test_serve_reads_the_tokenizer_before_ray_starts(tiny_directory: Path, tmp_path: Path) -> None:
    for file in tiny_directory.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(RuntimeError, match=r"tokenizer\.json: not a tokenizer"):
        serve.serve(parse_config({"model": {"path": str(tmp_path)}}))


def test_a_terminal_that_closes_stops_the_server() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where these tests run under nohup
    try:
        with stop_signals() as (stop, at_once):
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.is_set()
            assert not at_once.is_set()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_under_nohup_it_goes_on() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals() as (stop, _):
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.is_set()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_ray_that_does_not_come_up_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed_out(**options: object) -> None:
        raise Exception("The current node timed out during startup.\nThis could happen because ...")

    monkeypatch.setattr(ray, "init", timed_out)
    with pytest.raises(ClusterError, match=r"^Ray did not start: The current node timed out during startup\.$"):
        start_ray(Config())


def test_a_second_signal_cuts_short_what_cannot_be_asked_to_end() -> None:
    with stop_signals() as (stop, at_once):
        with cut_short_by(at_once):
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.is_set()
        with pytest.raises(Stopped), cut_short_by(at_once):
            os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_to_our_process_group_does_not_reach_the_processes_of_ray() -> None:
    def group() -> int:
        with services.ConsolePopen(["sleep", "60"]) as child:
            try:
                return os.getpgid(child.pid)
            finally:
                child.kill()

    with group_of_its_own():
        assert group() != os.getpgrp()
    assert group() == os.getpgrp()


@pytest.mark.full
@pytest.mark.ray
def test_two_signals_of_which_one_goes_to_the_whole_group() -> None:
    server = Server([], {**os.environ, "OMP_NUM_THREADS": "1"})
    until(lambda: "starting the ingress" in "".join(server.errors))
    children = psutil.Process(server.process.pid).children(recursive=True)
    server.process.send_signal(signal.SIGTERM)
    os.killpg(server.process.pid, signal.SIGTERM)
    assert server.process.wait(DEADLINE_S / 2) == 130
    server.stop()
    _, left = psutil.wait_procs(children, timeout=DEADLINE_S)
    assert (left, server.output) == ([], [])
    said = "".join(server.errors)
    assert "stopped before it was ready" in said
    assert not any(word in said for word in ("Unhandled", "Traceback", "raylet", "GCS"))


@pytest.mark.full
@pytest.mark.ray
@pytest.mark.parametrize("doing", ["Ray is at", "starting the ingress"])
def test_a_server_that_is_interrupted_before_it_is_ready_says_so_and_nothing_more(doing: str) -> None:
    server = Server([], {**os.environ, "OMP_NUM_THREADS": "1"})
    until(lambda: doing in "".join(server.errors))
    children = psutil.Process(server.process.pid).children(recursive=True)
    assert server.stop(signal.SIGINT) == 130
    _, left = psutil.wait_procs(children, timeout=DEADLINE_S)
    assert (left, server.output) == ([], [])
    said = "".join(server.errors)
    assert "stopped before it was ready" in said
    assert not any(word in said for word in ("Unhandled", "Traceback", "raylet"))
