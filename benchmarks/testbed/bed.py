"""Several hosts on one machine: each a network, PID, mount and UTS namespace with an address, a hostname, /tmp, /dev/shm and home of its own.

Nothing is left behind however the process that made them ends: a host lives as long as the pipe to its first process.
"""

import os
import select
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.testbed.boot import OWN
from benchmarks.testbed.switch import CUT, PERFECT, Link, Switch, network_of, switch

T = TypeVar("T")
SUBNET = "10.77.0"
NAMES = ("head", "attention", "ffn")
NAMESPACES = ("--net", "--pid", "--mount", "--uts")
TOOLS = ("unshare", "nsenter", "mount", "ip")
GONE_TIMEOUT_S = 20.0


def why_not() -> str | None:
    """One line: why there can be no test bed here; None where there can."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"the test bed needs {', '.join(missing)} (packages iproute2, util-linux)"
    if os.geteuid() != 0:
        return "the test bed needs the rights of root: it makes namespaces and network devices"
    if not os.path.exists("/dev/net/tun"):
        return "the test bed needs /dev/net/tun"
    tried = subprocess.run(["unshare", *NAMESPACES, "--fork", "true"], capture_output=True, text=True)
    return f"the test bed cannot make namespaces: {tried.stderr.strip()}" if tried.returncode else None


class _Entered(subprocess.Popen[str]):
    """Waits for a process in a host, and hands on what is signalled."""

    def send_signal(self, number: int) -> None:
        try:
            children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        except OSError:
            return  # both have ended
        if not children:
            super().send_signal(number)
        for child in children:
            os.kill(int(child), number)


class Host:
    """One host, on or off."""

    def __init__(self, name: str, address: str, hosts: str, shared: Sequence[str]) -> None:
        self.name, self.address = name, address
        self._boot = [sys.executable, str(Path(__file__).with_name("boot.py")), name, hosts, *shared]
        self._process: subprocess.Popen[str] | None = None
        self._pid = self._life = 0

    @property
    def is_on(self) -> bool:
        return self._process is not None

    @property
    def pid(self) -> int:
        """Of its first process, as this machine knows it; raises RuntimeError while the host is off."""
        if self._process is None:
            raise RuntimeError(f"host {self.name} is off")
        return self._pid

    def on(self) -> None:
        """Raises RuntimeError when it does not come up."""
        # A session of its own: a Ctrl-C at the terminal must not reach it before whoever made it has cleaned up.
        self._process = subprocess.Popen(
            ["unshare", *NAMESPACES, "--fork", "--kill-child", *self._boot],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        said = self._process.stdout.readline().strip()
        if not said:
            self.off()
            raise RuntimeError(f"host {self.name} did not come up")
        self._pid = int(said)
        self._life = os.pidfd_open(self._pid)

    def off(self) -> None:
        """As if its power were cut: every process of it is killed at once; returns when none is left. Harmless when repeated."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()  # and with it, by the kernel, the host's first process, and all others
        if self._life:
            select.select([self._life], [], [], GONE_TIMEOUT_S)  # it ends when it has buried them
            os.close(self._life)
            self._life = 0
        process.communicate(timeout=GONE_TIMEOUT_S)

    def command(self, command: Sequence[str]) -> list[str]:
        """What runs `command` there."""
        return ["nsenter", "--target", str(self.pid), "--net", "--pid", "--mount", "--uts", f"--wdns={os.getcwd()}", *command]

    def run(self, command: Sequence[str], **options: Any) -> str:
        """Gives its output; `options` are those of subprocess.run. Raises RuntimeError, with what it said, when it fails."""
        done = subprocess.run(self.command(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} on host {self.name}: exit {done.returncode}: {done.stdout}")
        return str(done.stdout)

    def popen(self, command: Sequence[str], **options: Any) -> "subprocess.Popen[str]":
        """`options` are those of subprocess.Popen."""
        return _Entered(self.command(command), **options)

    def pause(self) -> None:
        """Stop every process but the first; the host's kernel goes on acknowledging what it is sent."""
        self.run(["sh", "-c", "kill -STOP -1"])

    def wake(self) -> None:
        """End the pause."""
        self.run(["sh", "-c", "kill -CONT -1"])

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call it in a thread of this process whose sockets are this host's."""
        result: Future[T] = Future()

        def work() -> None:
            try:
                with network_of(self.pid):
                    result.set_result(function(*arguments))
            except BaseException as error:
                result.set_exception(error)

        threading.Thread(target=work, name=f"on-{self.name}", daemon=True).start()
        return result.result()


class Bed:
    """The hosts by name, and the links between them."""

    def __init__(self, hosts: Sequence[Host], wire: Switch) -> None:
        self.hosts = {host.name: host for host in hosts}
        self._wire = wire

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def on(self, name: str) -> None:
        """Boot a host that is off, with all its links up; it remembers nothing."""
        host = self.hosts[name]
        host.on()
        self._wire.attach(host.address, host.pid)
        self.isolate(name, PERFECT)

    def off(self, name: str) -> None:
        """The link goes down first: no peer sees a connection closed."""
        self.isolate(name)
        self.hosts[name].off()
        self._wire.detach(self.hosts[name].address)

    def link(self, first: str, second: str, link: Link) -> None:
        """In both directions."""
        self._wire.link(self.hosts[first].address, self.hosts[second].address, link)

    def isolate(self, name: str, link: Link = CUT) -> None:
        """Every link of this host."""
        for other in self.hosts:
            if other != name:
                self.link(name, other, link)

    def close(self) -> None:
        """Every host is off when this returns. Harmless when repeated."""
        for host in self.hosts.values():
            host.off()


def _hidden(paths: Sequence[Path]) -> list[str]:
    """Those that a host would not see, each once: where this project or its interpreter lies in /tmp or at home, it has to be shared."""
    within = [Path(path) for path in dict.fromkeys(paths) if any(Path(path).is_relative_to(place) for place in OWN)]
    return [str(path) for path in within if not any(path != other and path.is_relative_to(other) for other in within)]


@contextmanager
def bed(names: Sequence[str] = NAMES, *, shared: Sequence[Path] = (), seed: int = 0) -> Iterator[Bed]:
    """Hosts of these names, up and linked. They see all files of this machine but those in `boot.OWN`, unless they are `shared` or this project's own.

    `seed`: of which packets are lost. Raises RuntimeError (one line) where there can be no test bed.
    """
    reason = why_not()
    if reason:
        raise RuntimeError(reason)
    addresses = {name: f"{SUBNET}.{i}" for i, name in enumerate(names, 1)}
    seen = _hidden((Path.cwd(), Path(sys.prefix), Path(sys.base_prefix), *shared))
    known = "".join(f"{address} {name}\n" for name, address in {"localhost": "127.0.0.1", **addresses}.items())
    with switch(seed) as wire:
        made = Bed([Host(name, address, known, seen) for name, address in addresses.items()], wire)
        try:
            for name in names:
                made.on(name)
            yield made
        finally:
            made.close()
