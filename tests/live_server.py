"""The server that the live tests share: the demo model, as `afd-ray serve` starts it for anybody."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import psutil

from benchmarks._server import Server

DEADLINE_S = 60.0
PERIOD_S = 0.05


class LiveServer:
    def __init__(self, server: Server) -> None:
        self._server = server
        self.url = server.url
        self.ray_address = server.ray_address
        self.http = httpx.Client(base_url=self.url, timeout=DEADLINE_S, trust_env=False)

    def status(self) -> dict[str, Any]:
        answer = self.http.get("/admin/status")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def metric(self, name: str) -> float:
        """The sum of a metric's samples."""
        lines = [line for line in self.http.get("/metrics").text.splitlines() if line.split("{")[0].split(" ")[0] == name]
        assert lines, f"no metric {name}"
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def processes(self) -> list[psutil.Process]:
        """The server's own and all that came of it."""
        own = psutil.Process(self._server.process.pid)
        return [own, *own.children(recursive=True)]

    def idle(self) -> bool:
        """No request and no KV block is left."""
        return not any(actor[key] for actor in self.status()["attention"] for key in ("running", "waiting", "kv_used"))

    def stop(self) -> int:
        self.http.close()
        return self._server.stop()


@contextmanager
def live_server(*settings: str) -> Iterator[LiveServer]:
    """Checks at the end what the command line promises: one line on stdout, exit code 0, nothing left. `settings`: for `--set`."""
    patient = "failure.detect_timeout_s=10"  # a machine that runs tests is busy
    started = Server(
        [word for setting in (patient, *settings) for word in ("--set", setting)], {**os.environ, "OMP_NUM_THREADS": "1"}
    )
    started.await_ready()
    server = LiveServer(started)
    try:
        yield server
    finally:
        processes = server.processes()
        code = server.stop()
    _, left = psutil.wait_procs(processes, timeout=DEADLINE_S)
    assert code == 0, "".join(started.errors)
    assert "".join(started.output) == f"ready {server.url}\n"
    assert "ServeController" not in "".join(started.errors)
    assert left == []


def until(condition: Callable[[], bool], deadline_s: float = DEADLINE_S) -> None:
    """Asks again and again; fails after the deadline."""
    end_s = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end_s, "the condition did not come true in time"
        time.sleep(PERIOD_S)
