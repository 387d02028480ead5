"""A Ray cluster over the hosts of a test bed, with token authentication."""

import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.testbed.bed import Bed

PORT = 6379
STORE_BYTES = 100 << 20
START_TIMEOUT_S = 240.0


class RayHosts:
    """Started host by host; there is nothing to stop: Ray ends with the hosts."""

    def __init__(self, hosts: Bed, head: str) -> None:
        self.hosts, self.head = hosts, head
        self.address = f"{hosts[head].address}:{PORT}"
        own = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
            "RAY_worker_niceness": "0",
            "OMP_NUM_THREADS": "1",
        }
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        root = str(Path(__file__).resolve().parents[2])
        self.environment = {**os.environ, **own, "PATH": path, "PYTHONPATH": root}
        self.environment.pop("RAY_ADDRESS", None)

    def start(self, workers: Mapping[str, Mapping[str, str]], cpus: int) -> None:
        """The head, without CPUs for actors, then the others; labels by host. Raises RuntimeError.

        One after the other: Ray gives a host 30 s to start, and they share this machine's cores.
        """
        self._start(self.head, "--head", f"--port={PORT}", "--include-dashboard=false", "--no-monitor", "--num-cpus=0")
        for name, labels in workers.items():
            self.join(name, labels, cpus)

    def join(self, name: str, labels: Mapping[str, str], cpus: int, environment: Mapping[str, str] | None = None) -> None:
        """Have this host join the cluster, with `environment` beside what the others have. Raises RuntimeError."""
        listed = ",".join(f"{key}={value}" for key, value in labels.items())
        words = [f"--address={self.address}", f"--num-cpus={cpus}", *([f"--labels={listed}"] if listed else [])]
        self._start(name, *words, environment=environment)

    def _start(self, name: str, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        host = self.hosts[name]
        own: Sequence[str] = [
            f"--node-ip-address={host.address}",
            f"--object-store-memory={STORE_BYTES}",
            "--disable-usage-stats",
        ]
        host.run(["ray", "start", *arguments, *own], env={**self.environment, **(environment or {})}, timeout=START_TIMEOUT_S)
