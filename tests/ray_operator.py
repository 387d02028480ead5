"""Whoever deploys on a test bed: machines with `sshd`, and a host that types what docs/deploy.md says."""

import http.client
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.testbed import Bed, bed
from benchmarks.testbed.ssh import KEY, let_in, why_no_ssh
from tests.live_server import until

ROOT = Path(__file__).parent.parent
OPERATOR, HEAD, ATTENTION, FFN = "operator", "head", "attention", "ffn"
MACHINES = (HEAD, ATTENTION, FFN)
CLUSTER = "/tmp/cluster.yaml"
OTHER_PACKAGES = "/tmp/packages"
"""On each machine its own: what is there comes before what is installed."""
DEADLINE_S = 300.0
STEP_TIMEOUT_S = 300.0
LOGIN = {
    "PYTHONPATH": f"{ROOT}:{OTHER_PACKAGES}",
    "OMP_NUM_THREADS": "1",
    # The head's monitor looks every second for machines to set up, not every five.
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
}


class Operator:
    """Whoever types the commands, on a host of its own."""

    def __init__(self, hosts: Bed) -> None:
        self.hosts = hosts
        self.url = f"http://{hosts[HEAD].address}:8000"
        self.key = ""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self._environment = {
            **os.environ,
            "PATH": path,
            "PYTHONPATH": str(ROOT),
            "RAY_AUTH_MODE": "token",
            "OMP_NUM_THREADS": "1",
        }
        for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
            self._environment.pop(name, None)

    def types(self, *command: str, **options: Any) -> str:
        """What it says."""
        return self.hosts[OPERATOR].run(command, env=self._environment, timeout=STEP_TIMEOUT_S, **options)

    def calls_us(self, *words: str) -> str:
        """`afd-ray`."""
        return self.types(sys.executable, "-m", "actors.cli", *words)

    def prepares(self) -> None:
        """The token, a key for the admin calls, and the cluster's file with the addresses filled in."""
        self.types("ray", "get-auth-token", "--generate")
        self.types("mkdir", "-p", "/root/.afd-ray")
        made = self.types(
            sys.executable, "-m", "actors.cli", "keys", "add", "/root/.afd-ray/admin-keys", "--name", "operator", "--json"
        )
        self.key = json.loads(made)["key"]
        self.types("tee", CLUSTER, input=filled_in(self.hosts))

    def brings_up(self) -> None:
        self.types("ray", "up", "--yes", "--no-config-cache", CLUSTER)

    def runs_on_the_head(self, command: str) -> str:
        return self.types("ray", "exec", CLUSTER, command)

    def awaits_failure(self, *words: str) -> None:
        """Until `serve status` says that the deployment failed, and these words."""

        def failed() -> bool:
            said = " ".join(self.runs_on_the_head("serve status").split())
            return all(word in said for word in ("DEPLOY_FAILED", *words))

        until(failed, DEADLINE_S)

    def stops_ray_on(self, names: Sequence[str]) -> None:
        """By ssh, on all at once."""
        login = f"ssh -i {KEY} -o StrictHostKeyChecking=no root@"
        stops = "".join(f"{login}{self.hosts[name].address} afd-ray/.venv/bin/ray stop & " for name in names)
        self.types("sh", "-c", f"{stops} wait")

    def running(self, pattern: str) -> list[str]:
        """The machines with a process whose command line has it."""
        return [name for name in MACHINES if pattern in self.hosts[name].run(["ps", "-ww", "-eo", "args"])]

    def handoff_sockets(self) -> list[str]:
        """Between the FFN actor and the host with attention: nothing else connects these two."""
        connected = self.hosts[FFN].run(["ss", "-Htnp", "state", "established", "dst", self.hosts[ATTENTION].address])
        return [line for line in connected.splitlines() if "ray::FFNActor" in line]

    def asks(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        """Over HTTP, from its own host; status 0 where nobody answers."""

        def request() -> tuple[int, dict[str, Any]]:
            connection = http.client.HTTPConnection(self.hosts[HEAD].address, 8000, timeout=DEADLINE_S)
            try:
                headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
                connection.request(method, path, None if body is None else json.dumps(body), headers)
                response = connection.getresponse()
                return response.status, json.loads(response.read())
            except (OSError, ValueError):
                return 0, {}
            finally:
                connection.close()

        return self.hosts[OPERATOR].call(request)


def filled_in(hosts: Bed) -> str:
    """configs/cluster/local.yaml for these hosts; nothing else of it is changed."""
    text = (ROOT / "configs" / "cluster" / "local.yaml").read_text()
    text = text.replace("10.0.0.10 ", f"{hosts[HEAD].address} ").replace("ssh_user: ubuntu", "ssh_user: root")
    text = text.replace("    - 10.0.0.13\n", "").replace("10.0.0.11 10.0.0.12;", f"{hosts[ATTENTION].address};")
    return text.replace("10.0.0.11", hosts[ATTENTION].address).replace("10.0.0.12", hosts[FFN].address)


@contextmanager
def deployer() -> Iterator[Operator]:
    """Before the first command: machines with this project's environment, which takes minutes to install. Skips where there can be no `sshd`."""
    reason = why_no_ssh()
    if reason:
        (pytest.fail if os.environ.get("AFD_RAY_NEEDS_SSH") else pytest.skip)(reason)
    with bed((*MACHINES, OPERATOR)) as hosts:
        for name in MACHINES:
            hosts[name].run(["sh", "-c", f"mkdir -p ~/afd-ray && ln -s {sys.prefix} ~/afd-ray/.venv"])
        let_in(hosts, OPERATOR, MACHINES, LOGIN)
        operator = Operator(hosts)
        operator.prepares()
        yield operator
