"""A server on a test bed: the head, hosts for attention, one for FFN, and a client on a host of its own."""

import http.client
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks._server import Server
from benchmarks.testbed import Bed, bed
from benchmarks.testbed.ray_hosts import RayHosts
from tests.live_server import until

HEAD, CLIENT, FFN = "head", "client", "ffn"
ATTENTION = ("attention-1", "attention-2")
CPUS = 2
"""On each host with actors: one is left for a replacement."""
DETECT_S = 3.0
DEADLINE_S = 240.0
LABELS = {**{name: {"pool": "attention"} for name in ATTENTION}, FFN: {"pool": "ffn"}}


class Stream:
    """One greedy streaming completion, read by a thread on the client's host."""

    def __init__(self, url: str, prompt: Sequence[int], max_tokens: int) -> None:
        self.tokens: list[int] = []
        self.error: str | None = None
        self._url = urlsplit(url)
        fields = {"prompt": list(prompt), "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        self._body = json.dumps(fields | {"stream": True, "return_token_ids": True})

    def read(self) -> None:
        connection = http.client.HTTPConnection(str(self._url.hostname), self._url.port, timeout=DEADLINE_S)
        try:
            connection.request("POST", "/v1/completions", self._body, {"Content-Type": "application/json"})
            for line in connection.getresponse():
                self._take(line)
        except OSError as error:
            self.error = str(error)
        finally:
            connection.close()

    def _take(self, line: bytes) -> None:
        if not line.startswith(b"data: {"):
            return
        event = json.loads(line.removeprefix(b"data: "))
        if "error" in event:
            self.error = str(event["error"])
        for choice in event.get("choices", ()):
            self.tokens += choice.get("token_ids") or ()


class BedCluster:
    def __init__(self, hosts: Bed, ray: RayHosts, server: Server) -> None:
        self.hosts, self.ray, self.server = hosts, ray, server

    def ask(self, path: str) -> str:
        """From the client's host."""

        def get() -> str:
            url = urlsplit(self.server.url)
            connection = http.client.HTTPConnection(str(url.hostname), url.port, timeout=DEADLINE_S)
            connection.request("GET", path)
            answer = connection.getresponse().read().decode()
            connection.close()
            return answer

        return self.hosts[CLIENT].call(get)

    def status(self) -> dict[str, Any]:
        return dict(json.loads(self.ask("/admin/status")))

    def host_of(self, actor: dict[str, Any]) -> str:
        address = actor["address"].split(":")[0]
        return next(name for name, host in self.hosts.hosts.items() if host.address == address)

    def running(self, role: str) -> list[dict[str, Any]]:
        return [actor for actor in self.status()[role] if actor["state"] == "running"]

    def pause(self, actor: dict[str, Any]) -> None:
        self.hosts[self.host_of(actor)].run(["kill", "-STOP", str(actor["pid"])])

    def stale_epoch_tokens(self) -> float:
        (line,) = [line for line in self.ask("/metrics").splitlines() if line.startswith("afd_stale_epoch_tokens ")]
        return float(line.split()[1])

    def listeners(self) -> list[tuple[str, int, str]]:
        """Every TCP port that other hosts reach: address, port, and the program that listens there."""
        found = []
        for host in self.hosts.hosts.values():
            for line in host.run(["ss", "-Htlnp"]).splitlines():
                address, _, port = line.split()[3].rpartition(":")
                program = line.split('"')[1] if '"' in line else ""
                if not address.strip("[]").startswith(("127.", "::1")):
                    found.append((host.address, int(port), program))
        return found

    def processes(self) -> int:
        """Of attention and FFN actors, on all hosts."""
        script = "ps -ww -eo args | grep -cE '^ray::(Attention|FFN)Actor' || true"
        return sum(int(host.run(["sh", "-c", script])) for host in self.hosts.hosts.values() if host.is_on)

    def stream(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> "Streams":
        return Streams([Stream(self.server.url, prompt, max_tokens) for prompt in prompts], self.hosts[CLIENT].call)


class Streams:
    """All at once."""

    def __init__(self, streams: Sequence[Stream], call: Callable[[Callable[[], None]], None]) -> None:
        self.streams = streams
        self._threads = [threading.Thread(target=call, args=(stream.read,), daemon=True) for stream in streams]
        for thread in self._threads:
            thread.start()

    def under_way(self) -> None:
        """Until each has tokens."""
        until(lambda: all(len(stream.tokens) >= 5 or stream.error for stream in self.streams), DEADLINE_S)

    def ended(self) -> list[list[int]]:
        """The tokens of each, once all are over."""
        for thread in self._threads:
            thread.join(DEADLINE_S)
        assert [stream.error for stream in self.streams] == [None] * len(self.streams)
        return [stream.tokens for stream in self.streams]


@contextmanager
def bed_cluster(checkpoint: Path) -> Iterator[BedCluster]:
    """Two attention actors and an FFN actor, each on a host of its own, ready."""
    config = {
        "model.path": checkpoint,
        "attention.replicas": len(ATTENTION),
        "attention.labels": "{pool: attention}",
        "attention.num_cpus": 1,
        "ffn.labels": "{pool: ffn}",
        "failure.detect_timeout_s": DETECT_S,
    }
    overrides = [word for key, value in config.items() for word in ("--set", f"{key}={value}")]
    with bed((HEAD, *ATTENTION, FFN, CLIENT), shared=[checkpoint]) as hosts:
        ray = RayHosts(hosts, HEAD)
        ray.start(LABELS, CPUS)
        arguments = ["--address", ray.address, "--host", hosts[HEAD].address, *overrides]
        server = Server(arguments, {**os.environ, **ray.environment}, hosts[HEAD].popen)
        try:
            server.await_ready()
            yield BedCluster(hosts, ray, server)
        finally:
            code = server.stop()
        assert code == 0, "".join(server.errors)
