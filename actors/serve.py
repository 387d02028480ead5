"""The main job: a cluster, its ingress, and one line when it can be talked to."""

import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from functools import partial
from types import FrameType
from typing import Any, TextIO
from urllib.parse import parse_qsl, urlsplit

import ray
from ray import serve as ray_serve
from ray._private import services

from actors.cluster import Cluster, ClusterError, start_ray
from actors.controller import NAME, NAMESPACE
from actors.draining import Replicas, drain
from actors.fit import check_fits
from actors.http.auth import Keys
from actors.ingress import build as build_ingress
from actors.joining import joined
from actors.reporting import report
from actors.roster import first_line
from afd_ray.config import Config, ConfigError, model_directory
from afd_ray.diagnosis.findings import open_doors
from afd_ray.models.checkpoint import Checkpoint
from afd_ray.request import SamplingParams
from afd_ray.text import Tokenizer

READY_TIMEOUT_S = 60.0
POLL_S = 0.05
WATCH_PERIOD_S = 0.5
FLUSH_S = 0.2
APPLICATION = "afd"
SERVE_ENVIRONMENT = {
    # A request crosses from Serve's proxy to the replica by gRPC, some 2 ms sooner than by actor call,
    # and the proxy's router shares its event loop: a hop between threads for each token is a third of what the proxy costs.
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    # Serve starts another proxy after three failed looks at the one there was: by default half a minute without anybody who listens.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "actors.http.guard.middlewares",
}
"""Of whatever starts Ray where Serve's controller and proxies will run: they inherit it. `configs/cluster` says the same."""
INTERRUPTED = 130
"""Exit code of a server that was told to stop before it was ready."""


def serve(config: Config, address: str | None = None) -> int:
    """Serve until SIGINT, SIGTERM or SIGHUP, then finish what is in progress (`failure.drain_timeout_s`); a second one stops at once. Prints `ready http://H:P` and nothing else to stdout.

    Gives the exit code: 0, or 130 where a signal came before it was ready.
    Raises ClusterError (one line) for a taken port, too few resources, or a bring-up that fails.
    """
    # First what can be known without Ray: a mistake is told at once.
    check_fits(config, Checkpoint.open(model_directory(config.model)))
    for keys_file in (config.server.api_keys_file, config.server.admin_keys_file):
        Keys.from_file(keys_file)
    for finding in open_doors(config):
        report(f"warning: {finding.found}; {finding.change}")
    host = config.server.host
    port = free_port(host, config.server.port)
    started_s = time.monotonic()
    # Ray prints what it finds worth telling to stdout: that line is ours.
    with own_stdout() as stdout, ray_cluster(config, address), stop_signals() as (stop, at_once), suppress(Stopped):
        progress = Progress(stop)
        with Cluster.start(config, on_progress=progress) as cluster:
            progress("starting the ingress")
            with ingress(config, host, port, at_once, keeps_ray=address is not None) as replicas:
                await_ready(host, port, progress)
                report(f"up in {time.monotonic() - started_s:.1f} s")
                print(f"ready http://{bracketed(host)}:{port}", file=stdout, flush=True)
                watch(cluster, stop)
                finish(replicas, at_once, config.failure.drain_timeout_s)
            report("stopping")
        return 0
    report("stopped before it was ready")
    return INTERRUPTED


def generate(config: Config, *, prompt: str, params: SamplingParams, address: str | None = None, as_json: bool = False) -> int:
    """One prompt through a cluster of its own; prints the text, or a JSON object."""
    checkpoint = Checkpoint.open(model_directory(config.model))
    check_fits(config, checkpoint)
    tokenizer = Tokenizer.from_directory(checkpoint.directory)
    if tokenizer is None:
        raise ValueError(f"--prompt: {config.model.path} has no tokenizer, text cannot be turned into tokens")
    check_room(len(tokenizer.encode(prompt)), params.max_tokens, config.context_limit(checkpoint.config.max_position_embedding))
    with own_stdout(), ray_cluster(config, address), Cluster.start(config, on_progress=Progress()) as cluster:
        (answer,) = cluster.generate([prompt], params)
    if as_json:
        print(json.dumps({"text": answer.text, "token_ids": answer.token_ids, "finish_reason": answer.finish_reason}))
    else:
        print(answer.text)
    return 0


def check_room(prompt_tokens: int, max_tokens: int | None, context: int) -> None:
    """Raises ValueError (one line) for a prompt, or so many tokens after it, that the context is too short for."""
    room = context - prompt_tokens
    if room < 1:
        raise ValueError(f"--prompt: must leave room for a token in the context of {context} tokens, got {prompt_tokens} tokens")
    if max_tokens is not None and max_tokens > room:
        raise ValueError(
            f"--max-tokens: must be at most {room}, for the prompt has {prompt_tokens} of the context's {context} tokens, "
            f"got {max_tokens}"
        )


def ask_controller(address: str, path: str, body: dict[str, Any] | None, timeout_s: float) -> dict[str, Any]:
    """What `/admin/*` would answer, from the controller in the Ray cluster at `address`. Raises ClusterError (one line)."""
    parts = urlsplit(path)
    method, named = parts.path.removeprefix("/admin/"), {key: int(value) for key, value in parse_qsl(parts.query)} | (body or {})
    with joined(address):
        try:
            controller = ray.get_actor(NAME, namespace=NAMESPACE)
            answer: dict[str, Any] = ray.get(getattr(controller, method).remote(**named), timeout=timeout_s)
        except ValueError:
            raise ClusterError(f"no afd-ray server in the Ray cluster at {address}") from None
        except ray.exceptions.RayError as error:
            raise ClusterError(first_line(error)) from error
    return answer


@contextmanager
def own_stdout() -> Iterator[TextIO]:
    """The real stdout; what anybody else prints meanwhile goes to stderr."""
    stdout = sys.stdout
    with redirect_stdout(sys.stderr):
        yield stdout


@contextmanager
def ray_cluster(config: Config, address: str | None) -> Iterator[None]:
    """A Ray of our own, or the one at `address`; left again at the end."""
    if address is not None:
        with joined(address):
            yield
        return
    report("starting Ray")
    for name, value in SERVE_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not sys.stderr.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    with hangup_held(), group_of_its_own():
        start_ray(config)
    report(f"Ray is at {ray.get_runtime_context().gcs_address}")
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def hangup_held() -> Iterator[None]:
    """SIGHUP waits meanwhile, and does not reach processes started in here: a terminal that closes sends it to all of them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def group_of_its_own() -> Iterator[None]:
    """Ray's processes that are started in here are in process groups of their own: what is sent to ours, as by `timeout`, would end Ray before us."""
    ray_services: Any = services
    before = ray_services.ConsolePopen
    ray_services.ConsolePopen = partial(before, process_group=0)
    try:
        yield
    finally:
        ray_services.ConsolePopen = before


@contextmanager
def ingress(config: Config, host: str, port: int, at_once: threading.Event, *, keeps_ray: bool) -> Iterator[Replicas]:
    """The Serve application, in front of the cluster that is up; Stopped where a signal has set `at_once` before it is there. Serve is shut down where Ray goes on without us (`keeps_ray`).

    A Ray that ends takes Serve with it. Serve's own shutdown kills its controller while calls to it are pending, and Ray prints each as a failure.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # it has a `ready` line of its own
    try:
        with cut_short_by(at_once):
            ray_serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
            replicas = Replicas(ray_serve.run(build_ingress(NAME, config), name=APPLICATION, route_prefix="/"))
        yield replicas
    finally:
        if keeps_ray:
            ray_serve.shutdown()


@contextmanager
def stop_signals() -> Iterator[tuple[threading.Event, threading.Event]]:
    """Two events: the first SIGINT, SIGTERM or SIGHUP sets one, the next the other. Ray installs handlers of its own at init: this must come after.

    A SIGHUP that is ignored, as under nohup, stays so.
    """
    stop, at_once = threading.Event(), threading.Event()

    def note(*_: object) -> None:
        (at_once if stop.is_set() else stop).set()

    hangup = () if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (signal.SIGHUP,)
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM, *hangup)}
    try:
        yield stop, at_once
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def cut_short_by(at_once: threading.Event) -> Iterator[None]:
    """Raises Stopped out of whatever goes on in here as soon as a signal sets `at_once`: for what cannot be asked to end."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def note(number: int, frame: FrameType | None) -> None:
        handler = before[signal.Signals(number)]
        if callable(handler):
            handler(number, frame)
        if at_once.is_set():
            raise Stopped

    for number, handler in before.items():
        if callable(handler):
            signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def await_ready(host: str, port: int, progress: "Progress") -> None:
    """Until the ingress says that it can serve. Raises ClusterError when it never does, Stopped as `progress` does."""
    url = f"http://{bracketed(loopback_of(host))}:{port}/ready"
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while True:
        progress("waiting for the ingress")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            if time.monotonic() > deadline_s:
                raise ClusterError(f"the ingress at {url} was not ready in {READY_TIMEOUT_S:g} s") from None
        progress.stop.wait(POLL_S)


def watch(cluster: Cluster, stop: threading.Event) -> None:
    """Until `stop`; reports when the cluster's state changes, which actors it lost, and when the controller is: requests go on without it."""
    seen = cluster.state()
    news = News(seen[1])
    lost = False
    change = cluster.controller.changed.remote(*seen)
    while not stop.wait(WATCH_PERIOD_S):
        if not ray.wait([change], timeout=0)[0]:
            continue
        try:
            seen = ray.get(change)
            for line in news.of(seen[1], cluster.losses()):
                report(line)
            lost = False
        except ray.exceptions.RayError as error:
            if not lost:
                report(f"the controller is lost, requests go on without it: {first_line(error)}")
            lost = True
        change = cluster.controller.changed.remote(*seen)


class News:
    """What is new in the cluster's state since it was told last."""

    def __init__(self, state: str) -> None:
        self._state = state
        self._losses: set[str] = set()

    def of(self, state: str, losses: list[str]) -> list[str]:
        """Lines to report: each loss once, the state where it is another."""
        lines = [line for line in losses if line not in self._losses]
        if state != self._state:
            lines.append(f"the cluster is {state}")
        self._state, self._losses = state, set(losses)
        return lines


def finish(replicas: Replicas, at_once: threading.Event, timeout_s: float) -> None:
    """As `drain`; an ingress that does not answer has nothing to wait for."""
    try:
        drain(replicas, at_once, timeout_s)
    except ClusterError as error:
        report(str(error))
    # What has just been answered must still get from the proxy to the client.
    at_once.wait(FLUSH_S)


class Stopped(Exception):
    """A signal came before the server was up."""


class Progress:
    """Reports each new phase of a bring-up once, and ends it when `stop` is set."""

    def __init__(self, stop: threading.Event | None = None) -> None:
        self.stop = stop or threading.Event()
        self._told = ""

    def __call__(self, doing: str) -> None:
        """Raises Stopped once `stop` is set."""
        if self.stop.is_set():
            raise Stopped
        if doing and doing != self._told:
            report(doing)
            self._told = doing


def free_port(host: str, port: int) -> int:
    """`port`, or any free one for 0. Raises ClusterError when it is taken: Serve itself would say so late and at length."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except socket.gaierror as error:
            raise ConfigError(f"server.host: {host} is no address of this machine ({error.strerror})") from None
        except OSError as error:
            raise ClusterError(f"server.port: cannot listen on {host}:{port} ({os.strerror(error.errno or 0)})") from None
        return int(probe.getsockname()[1])


def loopback_of(host: str) -> str:
    """Where a client on this machine reaches a server that listens on `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
