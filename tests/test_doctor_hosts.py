"""The doctor on a cluster of several hosts, each with a fault planted on it: every one is found, and a sound cluster has none."""

import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.testbed import CUT, PERFECT, Bed, bed
from benchmarks.testbed.ray_hosts import RayHosts

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]

HEAD, SOUND, FAULTY = "head", "sound", "faulty"
MODEL = "/tmp/model"
PORT = 8000
TIMEOUT_S = 240.0
OTHER_PACKAGE = "/tmp/packages/msgpack-9.9.9.dist-info"


class Clinic:
    """A cluster of three hosts, and the doctor run on its head."""

    def __init__(self, hosts: Bed, ray: RayHosts) -> None:
        self.hosts, self.ray = hosts, ray

    def examine(self, *overrides: str, environment: dict[str, str] | None = None) -> dict[str, Any]:
        settings = [word for one in (f"model.path={MODEL}", *overrides) for word in ("--set", one)]
        command = [sys.executable, "-m", "actors.cli", "doctor", "--json", "--address", self.ray.address, *settings]
        # It exits with 1 when it finds an error: what it found is what counts here.
        said = self.hosts[HEAD].run(
            ["sh", "-c", '"$@" 2>/dev/null || true', "sh", *command],
            env={**self.ray.environment, **(environment or {})},
            timeout=TIMEOUT_S,
        )
        return dict(json.loads(said))

    def findings(self, *overrides: str, environment: dict[str, str] | None = None) -> list[tuple[str, str, str]]:
        found = self.examine(*overrides, environment=environment)["findings"]
        return [(finding["check"], finding["where"], finding["found"]) for finding in found]


@pytest.fixture(scope="module")
def clinic(needs_testbed: None, tiny_directory: Path) -> Iterator[Clinic]:
    """`faulty` has another version of msgpack, to all appearances, and no checkpoint."""
    with bed((HEAD, SOUND, FAULTY), shared=[tiny_directory]) as hosts:
        for name in (HEAD, SOUND):
            hosts[name].run(["cp", "-r", str(tiny_directory), MODEL])
        metadata = "Metadata-Version: 2.1\nName: msgpack\nVersion: 9.9.9\n"
        hosts[FAULTY].run(["sh", "-c", f"mkdir -p {OTHER_PACKAGE} && cat > {OTHER_PACKAGE}/METADATA"], input=metadata)
        ray = RayHosts(hosts, HEAD)
        ray.start({SOUND: {"pool": "attention"}}, cpus=2)
        packages = f"{Path(OTHER_PACKAGE).parent}:{ray.environment['PYTHONPATH']}"
        ray.join(FAULTY, {"pool": "fnn"}, 2, {"PYTHONPATH": packages})
        yield Clinic(hosts, ray)


def test_the_standing_faults_are_found(clinic: Clinic) -> None:
    found = clinic.findings("attention.labels={pool: attention}", "ffn.labels={pool: ffn}", "server.port=0")
    assert [(check, where) for check, where, _ in found] == [
        ("versions", FAULTY),
        ("labels", "the cluster"),
        ("model", f"{FAULTY} ({clinic.hosts[FAULTY].address})"),
    ]
    said = " ".join(text for _, _, text in found)
    assert "msgpack differs" in said
    assert "there is pool=fnn" in said


def test_a_wrong_token_is_named(clinic: Clinic) -> None:
    answer = clinic.examine(environment={"RAY_AUTH_TOKEN": "f" * 32})
    (finding,) = answer["findings"]
    assert (answer["examined"], finding["check"]) == (None, "token")


@pytest.fixture(scope="module")
def cured(clinic: Clinic, tiny_directory: Path) -> None:
    """Without the standing faults."""
    clinic.hosts[FAULTY].run(["sh", "-c", f"rm -rf {Path(OTHER_PACKAGE).parent}; cp -r {tiny_directory} {MODEL}"])


@pytest.mark.usefixtures("cured")
class TestPlanted:
    """One fault at a time, on hosts that are otherwise sound."""

    def found(self, clinic: Clinic, *overrides: str) -> list[str]:
        return [f"{check}: {where}" for check, where, _ in clinic.findings(*overrides)]

    def test_nothing_is_wrong(self, clinic: Clinic) -> None:
        assert self.found(clinic) == []

    def test_a_cut(self, clinic: Clinic) -> None:
        clinic.hosts.link(SOUND, FAULTY, CUT)
        found = self.found(clinic)
        clinic.hosts.link(SOUND, FAULTY, PERFECT)
        assert found == [f"reachability: {SOUND} and {FAULTY}"]

    def test_little_shared_memory(self, clinic: Clinic) -> None:
        clinic.hosts[FAULTY].run(["mount", "-o", "remount,size=8m", "/dev/shm"])
        found = self.found(clinic, "pipeline.max_tokens_per_micro_batch=16384")
        clinic.hosts[FAULTY].run(["mount", "-o", "remount,size=2g", "/dev/shm"])
        assert found == [f"shared memory: {FAULTY} ({clinic.hosts[FAULTY].address})"]

    def test_a_taken_port(self, clinic: Clinic) -> None:
        head = clinic.hosts[HEAD]
        listener: socket.socket = head.call(socket.create_server, ("127.0.0.1", PORT))
        with listener:
            assert self.found(clinic) == [f"ports: 127.0.0.1:{PORT}"]

    def test_no_room(self, clinic: Clinic) -> None:
        assert self.found(clinic, "attention.replicas=9") == ["room: the cluster"]

    def test_an_open_admin_interface(self, clinic: Clinic) -> None:
        address = clinic.hosts[HEAD].address
        assert self.found(clinic, f"server.host={address}") == 2 * [f"access: {address}"]
