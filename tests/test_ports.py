"""What another host finds at the ports of a running cluster: what docs/security.md says, and nothing that acts for a stranger."""

import json
import random
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import pytest

from tests.bed_cluster import CLIENT, BedCluster, bed_cluster
from tests.strangers import knock, noise

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]

SECURITY = Path(__file__).parent.parent / "docs" / "security.md"
HEADING = "## What a port scan finds"
SCAN_TIMEOUT_S = 600.0
FRAMES = 10_000
PROMPTS = [[1 + i, 2, 3 + i] for i in range(4)]
MAX_TOKENS = 120
REFUSALS = {"UNAUTHENTICATED", "401"}
Found = set[tuple[str, str]]
"""(program, as the kernel shortens its name; what a stranger gets)."""


@pytest.fixture(scope="module")
def cluster(needs_testbed: None, tiny_directory: Path) -> Iterator[BedCluster]:
    with bed_cluster(tiny_directory) as cluster:
        yield cluster


def verdict(heard: Mapping[str, str]) -> str:
    """Of one port."""
    if not heard:
        return "says nothing"
    return "refuses" if set(heard.values()) <= REFUSALS else "answers"


def documented() -> Found:
    """The first and the last column of the table."""
    rows = [line.split("|")[1:-1] for line in SECURITY.read_text().partition(HEADING)[2].splitlines() if line.startswith("| `")]
    return {(row[0].strip(" `"), row[-1].strip()) for row in rows}


def scanned(cluster: BedCluster) -> Found:
    """By a scan of every port of every host, from a host that is none of the cluster's."""
    addresses = [host.address for name, host in cluster.hosts.hosts.items() if name != CLIENT]
    command = [sys.executable, "-m", "tests.port_scan", *addresses]
    said = cluster.hosts[CLIENT].run(command, env=cluster.ray.environment, timeout=SCAN_TIMEOUT_S)
    programs = {
        (address, str(port)): re.sub(r"^python[\d.]*$", "python", program) for address, port, program in cluster.listeners()
    }
    hosts: dict[str, dict[str, dict[str, str]]] = json.loads(said.splitlines()[-1])
    return {(programs[address, port], verdict(heard)) for address, ports in hosts.items() for port, heard in ports.items()}


def test_a_port_scan_finds_what_the_documentation_says(cluster: BedCluster) -> None:
    assert scanned(cluster) == documented()


def test_ten_thousand_malformed_frames_change_nothing(cluster: BedCluster) -> None:
    before, epoch = cluster.stream(PROMPTS, MAX_TOKENS).ended(), cluster.status()["epoch"]
    ours = [
        (address, port) for address, port, program in cluster.listeners() if program.startswith(("ray::Attentio", "ray::FFN"))
    ]
    rng = random.Random(0)

    def flood() -> None:
        for _ in range(FRAMES):
            with suppress(OSError):
                knock(rng.choice(ours), lambda _: noise(rng), rng=rng)

    streams = cluster.stream(PROMPTS, MAX_TOKENS)
    cluster.hosts[CLIENT].call(flood)
    assert streams.ended() == before
    assert cluster.stream(PROMPTS, MAX_TOKENS).ended() == before
    assert (cluster.status()["state"], cluster.status()["epoch"]) == ("ready", epoch)
