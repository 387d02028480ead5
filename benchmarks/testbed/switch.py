"""The wire between hosts: a process that hands on every packet between their networks, late, seldom or not at all where it is told to.

A device lives as long as this process, and this process as long as the one that started it.
"""

import ctypes
import fcntl
import heapq
import json
import os
import random
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any, TextIO

DEVICE = "afd0"
PREFIX_BITS = 24
MTU = 60_000
"""A message in few packets: the switch is Python."""
QUEUE_S = 0.5
"""A packet that would wait longer than this for its turn on a link with a rate is dropped."""

ACCEPTED = "accepted\n"
_CLONE_NEWNET = 0x40000000
_TUNSETIFF = 0x400454CA
_IFF_TUN_WITHOUT_HEADERS = 0x1001
_IPV4 = 4
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Link:
    """How packets get from one host to another."""

    delay_ms: float = 0.0
    """One way."""
    loss: float = 0.0
    """Share of the packets that is dropped, from 0 to 1."""
    rate_mbit: float | None = None
    """Per second; None: as fast as the switch is."""
    up: bool = True
    """A link that is down drops everything, and tells nobody."""


PERFECT = Link()
CUT = Link(up=False)


def leave_network() -> None:
    """Give this thread, and those that it starts, an empty network. Raises OSError without the right to do so."""
    _check(_libc.unshare(_CLONE_NEWNET), "unshare")


@contextmanager
def network_of(pid: int) -> Iterator[None]:
    """Meanwhile this thread has the network of that process: sockets that it opens are there. Raises OSError when that has ended."""
    with open("/proc/thread-self/ns/net", "rb") as own, open(f"/proc/{pid}/ns/net", "rb") as network:
        _check(_libc.setns(network.fileno(), _CLONE_NEWNET), "setns")
        try:
            yield
        finally:
            _check(_libc.setns(own.fileno(), _CLONE_NEWNET), "setns")


class Switch:
    """Hosts are known by their IPv4 addresses here."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._orders, self._answers = process.stdin, process.stdout

    def attach(self, address: str, pid: int) -> None:
        """Put a device with this address into the network of `pid`. Raises OSError when that fails."""
        self._tell("attach", address, pid)

    def detach(self, address: str) -> None:
        """Take the device away; harmless when there is none."""
        self._tell("detach", address)

    def link(self, first: str, second: str, link: Link) -> None:
        """What packets between these two meet from now on, in both directions."""
        self._tell("link", first, second, asdict(link))

    def _tell(self, *order: object) -> None:
        assert self._orders is not None
        assert self._answers is not None
        self._orders.write(json.dumps(order) + "\n")
        self._orders.flush()
        answer = self._answers.readline()
        if answer != ACCEPTED:
            raise OSError(f"the switch: {answer.strip() or 'it has ended'}")


@contextmanager
def switch(seed: int = 0) -> Iterator[Switch]:
    """`seed`: of what is lost."""
    command = [sys.executable, __file__, str(seed)]
    # A session of its own: a Ctrl-C at the terminal must not reach it before those that use it have ended.
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        yield Switch(process)
    finally:
        process.kill()
        process.communicate()


class _Forwarding:
    """The process' side: one thread that waits for packets, for their time, and for orders."""

    def __init__(self, orders: TextIO, rng: random.Random) -> None:
        self._orders, self._rng = orders, rng
        self._devices: dict[bytes, int] = {}
        """Descriptor by address, packed."""
        self._links: dict[tuple[bytes, bytes], Link] = {}
        self._free_at_s: dict[tuple[bytes, bytes], float] = {}
        """When a link with a rate has sent what it was given."""
        self._under_way: list[tuple[float, int, bytes, bytes]] = []
        """(due, number, target, packet): a heap."""
        self._taken = 0
        self._poll = select.poll()
        self._poll.register(orders, select.POLLIN)

    def run(self) -> None:
        """Until the orders end."""
        while True:
            wait_ms = max(0.0, self._under_way[0][0] - time.monotonic()) * 1000 if self._under_way else None
            for descriptor, _ in self._poll.poll(wait_ms):
                if descriptor != self._orders.fileno():
                    self._take(descriptor)
                elif order := self._orders.readline():
                    print(self._obey(*json.loads(order)), flush=True)
                else:
                    return
            while self._under_way and self._under_way[0][0] <= time.monotonic():
                _, _, target, packet = heapq.heappop(self._under_way)
                self._deliver(target, packet)

    def _obey(self, order: str, *arguments: Any) -> str:
        try:
            getattr(self, order)(*arguments)
        except (OSError, subprocess.CalledProcessError) as error:
            return str(error)
        return ACCEPTED.strip()

    def attach(self, address: str, pid: int) -> None:
        self.detach(address)
        with network_of(pid):
            device = _device(address)
        self._devices[socket.inet_aton(address)] = device
        self._poll.register(device, select.POLLIN)

    def detach(self, address: str) -> None:
        device = self._devices.pop(socket.inet_aton(address), None)
        if device is not None:
            self._poll.unregister(device)
            os.close(device)

    def link(self, first: str, second: str, link: dict[str, Any]) -> None:
        ends = socket.inet_aton(first), socket.inet_aton(second)
        self._links[ends] = self._links[ends[::-1]] = Link(**link)

    def _take(self, device: int) -> None:
        try:
            packet = os.read(device, 1 << 16)
        except OSError:  # its network is going
            self._poll.unregister(device)
            return
        if packet[0] >> 4 != _IPV4:
            return
        source, target = packet[12:16], packet[16:20]
        link = self._links.get((source, target), PERFECT)
        if link == PERFECT:
            self._deliver(target, packet)
        elif link.up and not (link.loss and self._rng.random() < link.loss):
            self._send(link, source, target, packet)

    def _send(self, link: Link, source: bytes, target: bytes, packet: bytes) -> None:
        now_s = sent_s = time.monotonic()
        if link.rate_mbit is not None:
            begun_s = max(now_s, self._free_at_s.get((source, target), now_s))
            if begun_s - now_s > QUEUE_S:
                return
            sent_s = self._free_at_s[source, target] = begun_s + len(packet) * 8e-6 / link.rate_mbit
        self._taken += 1
        heapq.heappush(self._under_way, (sent_s + link.delay_ms / 1000, self._taken, target, packet))

    def _deliver(self, target: bytes, packet: bytes) -> None:
        device = self._devices.get(target)
        if device is not None:
            with suppress(OSError):
                os.write(device, packet)


def _device(address: str) -> int:
    """A TUN device in this thread's network."""
    device = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH14x", DEVICE.encode(), _IFF_TUN_WITHOUT_HEADERS))
    for command in (
        f"ip address add {address}/{PREFIX_BITS} dev {DEVICE}",
        f"ip link set {DEVICE} mtu {MTU} up",
        f"ip route add default dev {DEVICE}",
        "ip link set lo up",
    ):
        subprocess.run(command.split(), check=True)
    return device


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def main(seed: str) -> None:
    with suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))  # a wire does not wait for a free core
    _Forwarding(sys.stdin, random.Random(int(seed))).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
