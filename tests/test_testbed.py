"""The test bed: hosts that share nothing but files, links that do what they are told, and nothing left behind."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.testbed import CUT, PERFECT, Bed, Link, __main__, bed
from benchmarks.testbed.bed import why_not
from tests.live_server import until

WAIT_S = 20.0
PORT = 5000


@pytest.fixture(scope="module")
def hosts(needs_testbed: None) -> Iterator[Bed]:
    with bed(("one", "two", "three")) as hosts:
        yield hosts


class Echo:
    """A datagram there and back, from `one` to `two`."""

    def __init__(self, hosts: Bed) -> None:
        self._there = hosts["two"].call(_bound, hosts["two"].address)
        self._here = hosts["one"].call(_bound, hosts["one"].address)
        self._here.connect(self._there.getsockname())
        self._thread = threading.Thread(target=self._answer, daemon=True)
        self._thread.start()

    def _answer(self) -> None:
        while True:
            data, sender = self._there.recvfrom(1 << 16)
            if not data:
                return
            self._there.sendto(data, sender)

    def came_back(self, count: int, wait_s: float = WAIT_S, size: int = 1) -> int:
        """How many of `count` datagrams did; waits for the rest for so long."""
        for _ in range(count):
            self._here.send(bytes(size))
        self._here.settimeout(wait_s)
        for came in range(count):
            try:
                self._here.recv(1 << 16)
            except TimeoutError:
                return came
        return count

    def close(self) -> None:
        """The link must be whole by then."""
        self._here.send(b"")
        self._thread.join(WAIT_S)
        self._here.close()
        self._there.close()


def _bound(address: str) -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    made.bind((address, 0))
    return made


@pytest.fixture
def echo(hosts: Bed) -> Iterator[Echo]:
    echo = Echo(hosts)
    yield echo
    hosts.link("one", "two", PERFECT)
    echo.close()


def test_a_host_has_its_own_name_address_files_and_processes(hosts: Bed, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    script = f"hostname; hostname -i; echo $$; ls /dev/shm; test -e {tmp_path} || echo hidden; touch /tmp/mine"
    name, address, pid, hidden = hosts["two"].run(["sh", "-c", script]).split()
    assert (name, address, hidden) == ("two", hosts["two"].address, "hidden")
    assert int(pid) < 1000, "counted from the host's own first process"
    assert "mine" not in hosts["one"].run(["ls", "/tmp"]).split()
    assert not Path("/tmp/mine").exists()


def test_a_shared_directory_is_the_same_everywhere(needs_testbed: None, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("seen")
    with bed(("one",), shared=[tmp_path]) as hosts:
        assert hosts["one"].run(["cat", str(tmp_path / "file")]) == "seen"


def test_a_signal_reaches_what_runs_in_the_host(hosts: Bed) -> None:
    process = hosts["one"].popen(
        ["sh", "-c", "trap 'exit 7' TERM; echo on; while :; do sleep 0.01; done"], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline()
    process.terminate()
    assert process.wait(WAIT_S) == 7
    process.stdout.close()


def test_packets_take_as_long_as_the_link_says(hosts: Bed, echo: Echo) -> None:
    hosts.link("one", "two", Link(delay_ms=30))
    began_s = time.monotonic()
    assert echo.came_back(1) == 1
    assert time.monotonic() - began_s >= 0.06


def test_a_link_sends_no_more_than_its_rate(hosts: Bed, echo: Echo) -> None:
    hosts.link("one", "two", Link(rate_mbit=1))
    began_s = time.monotonic()
    assert echo.came_back(10, size=1000) == 10
    assert time.monotonic() - began_s >= 0.08


def test_a_lossy_link_loses_some_and_not_all(hosts: Bed, echo: Echo) -> None:
    hosts.link("one", "two", Link(loss=0.3))
    assert 10 < echo.came_back(100, wait_s=0.2) < 90


def test_a_cut_link_is_silent_until_it_is_healed_and_the_others_are_whole(hosts: Bed, echo: Echo) -> None:
    hosts.link("one", "two", CUT)
    assert echo.came_back(1, wait_s=0.1) == 0
    listener = hosts["three"].call(socket.create_server, (hosts["three"].address, PORT))
    hosts["one"].call(socket.create_connection, listener.getsockname(), WAIT_S).close()
    listener.close()
    hosts.link("one", "two", PERFECT)
    assert echo.came_back(1) == 1


def test_a_host_without_power_is_gone_with_its_processes_and_says_nothing(needs_testbed: None) -> None:
    with bed(("one", "two")) as hosts:
        sleeping = hosts["two"].popen(["sleep", "1000"])
        listener = hosts["two"].call(socket.create_server, (hosts["two"].address, PORT))
        connection = hosts["one"].call(socket.create_connection, listener.getsockname(), WAIT_S)
        hosts.off("two")
        sleeping.wait(WAIT_S)
        connection.settimeout(0.1)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        assert hosts["one"].run(["hostname"]).strip() == "one"
        with pytest.raises(RuntimeError, match="host two is off"):
            hosts["two"].run(["true"])
        hosts.on("two")
        assert hosts["two"].run(["hostname"]).strip() == "two"
        listener.close()
        connection.close()


CRASHING = """
import subprocess, sys, time
from benchmarks.testbed import bed
with bed(("one", "two")) as hosts:
    processes = [host.popen(["sleep", "1000"]) for host in hosts.hosts.values()]
    print(*(host.pid for host in hosts.hosts.values()), flush=True)
    time.sleep(1000)
"""


def test_nothing_is_left_when_its_owner_is_killed(needs_testbed: None) -> None:
    owner = subprocess.Popen([sys.executable, "-c", CRASHING], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    pids = [int(pid) for pid in owner.stdout.readline().split()]
    namespaces = {os.readlink(f"/proc/{pid}/ns/{kind}") for pid in pids for kind in ("net", "pid", "mnt", "uts")}
    assert len(namespaces) == 8
    owner.kill()
    owner.communicate()
    until(lambda: not namespaces & _namespaces_in_use(), WAIT_S)


def _namespaces_in_use() -> set[str]:
    used = set()
    for process in Path("/proc").glob("[0-9]*"):
        for kind in ("net", "pid", "mnt", "uts"):
            try:
                used.add(os.readlink(process / "ns" / kind))
            except OSError:
                continue
    return used


def test_the_command_line_builds_it_and_takes_it_down(needs_testbed: None, capfd: pytest.CaptureFixture[str]) -> None:
    def order(*words: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run([sys.executable, "-m", "benchmarks.testbed", *words], capture_output=True, text=True, timeout=60)

    try:
        assert order("up", "--hosts", "head", "a", "b").returncode == 0
        assert order("up").stderr == "testbed: a test bed is up already\n"
        assert order("run", "a", "hostname").stdout == "a\n"
        assert order("run", "c", "hostname").stderr == "testbed: no host c, there are head, a, b\n"
        assert order("link", "a", "b", "--cut").returncode == 0
        assert order("off", "a").returncode == 0
        assert order("run", "a", "hostname").stderr == "testbed: host a is off\n"
    finally:
        assert order("down").returncode == 0
    assert order("run", "a", "hostname").stderr == "testbed: no test bed is up: python -m benchmarks.testbed up\n"


def test_without_the_rights_it_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert __main__.main(["up"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setenv("PATH", "")
    assert str(why_not()).startswith("the test bed needs unshare, nsenter, mount, ip ")
