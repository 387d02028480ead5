"""A real `afd-ray serve` in a process of its own, for benchmarks and tests."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

READY_TIMEOUT_S = 240.0
HAPROXY = MappingProxyType({"RAY_SERVE_ENABLE_HA_PROXY": "1"})
"""Environment for Serve's HAProxy in place of its proxy in Python (docs/deploy.md)."""
STOP_TIMEOUT_S = 60.0


class Server:
    """A started server. `output` and `errors` grow as it writes."""

    def __init__(
        self, arguments: list[str], environment: dict[str, str], popen: Callable[..., "subprocess.Popen[str]"] = subprocess.Popen
    ) -> None:
        """`popen` starts it: subprocess.Popen, or the method of a test bed's host."""
        command = [sys.executable, "-m", "actors.cli", "serve", "--port", "0", *arguments]
        # A session of its own: a Ctrl-C at the terminal must not reach it before whoever started it has cleaned up.
        self.process = popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
        )
        self.output: list[str] = []
        self.errors: list[str] = []
        self._told = threading.Event()
        self._readers = [
            threading.Thread(target=self._read, args=(self.process.stdout, self.output, True), daemon=True),
            threading.Thread(target=self._read, args=(self.process.stderr, self.errors, False), daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    @property
    def url(self) -> str:
        return self.output[0].split()[1]

    @property
    def ray_address(self) -> str:
        """HOST:PORT of the Ray that the server started."""
        found = re.search(r"Ray is at (\S+)", "".join(self.errors))
        assert found, "the server told no Ray address"
        return found[1]

    def await_ready(self) -> None:
        """Raises RuntimeError, with what the server said, when it is not ready in time."""
        self._told.wait(READY_TIMEOUT_S)
        if not self.output or not self.output[0].startswith("ready "):
            self.stop()
            raise RuntimeError(f"the server is not ready: {''.join(self.output + self.errors)}")

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Stops it; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            code = self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        for reader in self._readers:
            reader.join(STOP_TIMEOUT_S)
        return code

    def _read(self, pipe: Any, lines: list[str], decides: bool) -> None:
        with pipe:
            for line in pipe:
                lines.append(line)
                if decides:
                    self._told.set()
        if decides:
            self._told.set()


@contextmanager
def served(*arguments: str, environment: Mapping[str, str] = MappingProxyType({})) -> Iterator[Server]:
    """`afd-ray serve ARGUMENTS` on a free port, ready; stopped again at the end. `environment` adds to this process' own."""
    server = Server(list(arguments), {**os.environ, "OMP_NUM_THREADS": "1", **environment})
    try:
        server.await_ready()
        yield server
    finally:
        server.stop()
