"""How fast does it serve over HTTP, beside vLLM's CPU server? step3-92m, streamed completions, the same client, prompts and cores, in turn.

All streams of a row begin at once. Compared is tokens/s over the whole row, prefill included.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from actors.serve import free_port
from benchmarks._machine import hardware
from benchmarks._server import HAPROXY, served
from benchmarks._streams import stream_all
from benchmarks.overlap import preset_in
from benchmarks.peers import environments
from benchmarks.peers.catalogue import vllm_environment
from benchmarks.serving import Load, Row, report, result, row

HOST = "127.0.0.1"
MODEL = "step3-92m"
SERVERS = ("afd", "afd-haproxy", "vllm-compiled", "vllm-eager")
READY_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 20.0
POLL_S = 0.5


@contextmanager
def ours(checkpoint: Path, environment: Mapping[str, str]) -> Iterator[str]:
    """The URL of `afd-ray serve` with one attention and one FFN actor."""
    settings = (f"model.path={checkpoint}", f"model.name={MODEL}", "attention.replicas=1")
    with served(*(argument for setting in settings for argument in ("--set", setting)), environment=environment) as server:
        yield server.url


@contextmanager
def vllm(checkpoint: Path, threads: int, *, eager: bool) -> Iterator[str]:
    """The URL of vLLM's OpenAI server, without tokenizer and prefix cache. Raises RuntimeError when it does not come up."""
    port = free_port(HOST, 0)
    options = ["--model", str(checkpoint), "--served-model-name", MODEL, "--host", HOST, "--port", str(port)]
    options += ["--skip-tokenizer-init", "--no-enable-prefix-caching", "--max-model-len", "4096", "--max-num-seqs", "256"]
    options += ["--enforce-eager"] if eager else []
    command = [str(environments.vllm()), "-m", "vllm.entrypoints.openai.api_server", *options]
    # The server's engine is a process of its own.
    environment = {**os.environ, **vllm_environment(threads), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    server = subprocess.Popen(command, env=environment, stdout=sys.stderr, start_new_session=True)
    try:
        url = f"http://{HOST}:{port}"
        await_health(url, server)
        yield url
    finally:
        stop(server)


def stop(server: "subprocess.Popen[bytes]") -> None:
    """With its engine's processes; one that is still starting does not obey SIGTERM."""
    server.terminate()
    try:
        server.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def await_health(url: str, server: "subprocess.Popen[bytes]") -> None:
    """Raises RuntimeError when the server ends, or is not up in time."""
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while server.poll() is None and time.monotonic() < deadline_s:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(POLL_S)
    raise RuntimeError(f"no vLLM server at {url}, see its output")


def measure(name: str, url: str, loads: Sequence[Load]) -> Iterator[Row]:
    """One server, alone on the machine, under every load."""
    stream_all(url, MODEL, Load(8, 128, 16).job())
    for load in loads:
        yield row(name, load, stream_all(url, MODEL, load.job()))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a step3-92m checkpoint (default: made in a temporary directory)")
    parser.add_argument("--servers", nargs="+", choices=SERVERS, default=SERVERS)
    parser.add_argument("--streams", nargs="+", type=int, default=(32, 96), help="at once")
    parser.add_argument("--context", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens a stream")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="cores for vLLM")
    parser.add_argument("--quick", action="store_true", help="a small run of what needs no installation")
    args = parser.parse_args(argv)
    if args.quick:
        args.servers, args.streams, args.tokens = ["afd"], (16,), 32
    machine, rows = hardware(), list[Row]()
    loads = [Load(streams, args.context, args.tokens) for streams in args.streams]
    with tempfile.TemporaryDirectory() as made:
        checkpoint = args.model or preset_in(Path(made) / MODEL)
        ways = {
            "afd": lambda: ours(checkpoint, {}),
            "afd-haproxy": lambda: ours(checkpoint, HAPROXY),
            "vllm-compiled": lambda: vllm(checkpoint, args.threads, eager=False),
            "vllm-eager": lambda: vllm(checkpoint, args.threads, eager=True),
        }
        for name in args.servers:
            with ways[name]() as url:
                rows += measure(name, url, loads)
    report(rows, loads)
    print(json.dumps(result("serving_http", machine, args.threads, rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
