"""`ray up configs/cluster/local.yaml`, `serve deploy`, tokens to another host, a resize and `ray down`, as docs/deploy.md walks through it."""

import http.client
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from afd_ray.config import Model, model_directory
from afd_ray.models.checkpoint import Checkpoint, load_model
from benchmarks.testbed import Bed, bed
from benchmarks.testbed.ssh import let_in, why_no_ssh
from tests.bed_cluster import Stream, Streams
from tests.live_server import until

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]

ROOT = Path(__file__).parent.parent
OPERATOR, HEAD, ATTENTION, FFN = "operator", "head", "attention", "ffn"
CLUSTER = "/tmp/cluster.yaml"
DEADLINE_S = 300.0
STEP_TIMEOUT_S = 300.0
TOKENS, LONG = 24, 400
NODES = """
import json, sys, time, ray
ray.init(address=sys.argv[1], log_to_driver=False, configure_logging=False)
until_s = time.monotonic() + float(sys.argv[3])
while time.monotonic() < until_s and len(alive := [node for node in ray.nodes() if node["Alive"]]) < int(sys.argv[2]):
    time.sleep(0.5)
print(json.dumps({node["NodeManagerHostname"]: node["Labels"].get("pool") for node in alive}))
"""


class Operator:
    """Whoever types the commands, on a host of its own."""

    def __init__(self, hosts: Bed) -> None:
        self.hosts = hosts
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

    def sees(self, nodes: int) -> dict[str, str | None]:
        """The pools of the nodes by name, once there are so many: asked on the head, for only a node of a cluster can join it."""
        address = f"{self.hosts[HEAD].address}:6379"
        command = [sys.executable, "-c", NODES, address, str(nodes), str(DEADLINE_S)]
        said = self.hosts[HEAD].run(command, env=self._environment, timeout=2 * DEADLINE_S)
        return dict(json.loads(said.splitlines()[-1]))

    def runs_on_the_head(self, command: str) -> str:
        return self.types("ray", "exec", CLUSTER, command)

    def raylets(self) -> int:
        """On all hosts."""
        script = "ps -eo args | grep -c '[r]aylet/raylet ' || true"
        return sum(int(host.run(["sh", "-c", script])) for host in self.hosts.hosts.values())

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


@pytest.fixture(scope="module")
def operator(needs_testbed: None) -> Iterator[Operator]:
    """Before the first command: machines with `sshd` and this project's environment, which takes minutes to install."""
    reason = why_no_ssh()
    if reason:
        (pytest.fail if os.environ.get("AFD_RAY_NEEDS_TEST_BED") else pytest.skip)(reason)
    machines = (HEAD, ATTENTION, FFN)
    with bed((*machines, OPERATOR)) as hosts:
        for name in machines:
            hosts[name].run(["sh", "-c", f"mkdir -p ~/afd-ray && ln -s {sys.prefix} ~/afd-ray/.venv"])
        let_in(hosts, OPERATOR, machines, {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
        operator = Operator(hosts)
        operator.prepares()
        yield operator


def test_the_walk_from_nothing_to_tokens_to_a_resize_to_nothing(operator: Operator) -> None:
    operator.types("ray", "up", "--yes", "--no-config-cache", CLUSTER)
    assert operator.sees(3) == {HEAD: None, ATTENTION: "attention", FFN: "ffn"}
    assert operator.raylets() == 3

    operator.runs_on_the_head("serve deploy ~/afd-ray/configs/serve/demo.yaml")
    until(lambda: operator.asks("GET", "/ready")[0] == 200, DEADLINE_S)
    prompt = [5, 6, 7]
    asked = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    _, answer = operator.asks("POST", "/v1/completions", asked)
    reference = load_model(Checkpoint.open(model_directory(Model())))
    assert answer["choices"][0]["token_ids"] == reference.generate_greedy(prompt, TOKENS)

    url = f"http://{operator.hosts[HEAD].address}:8000"
    _, status = operator.asks("GET", "/admin/status")
    hosts = {role: {actor["address"].split(":")[0] for actor in status[role]} for role in (ATTENTION, FFN)}
    assert hosts == {role: {operator.hosts[role].address} for role in (ATTENTION, FFN)}
    with pytest.raises(RuntimeError, match="401, wrong API key"):
        operator.calls_us("status", "--url", url, "--api-key", "wrong")
    assert "1 attention and 1 FFN ranks" in operator.calls_us(
        "scale", "--attention", "1", "--url", url, "--api-key", operator.key
    )
    assert operator.asks("POST", "/v1/completions", asked)[1]["choices"] == answer["choices"]

    streams = Streams([Stream(url, prompt, LONG)], operator.hosts[OPERATOR].call)
    streams.under_way()
    assert "nothing is in progress" in operator.runs_on_the_head("python -m actors.cli drain")
    assert operator.asks("POST", "/v1/completions", asked)[0] == 503
    assert streams.ended() == [reference.generate_greedy(prompt, LONG)]

    operator.types("ray", "down", "--yes", CLUSTER)
    until(lambda: operator.raylets() == 0, DEADLINE_S)
