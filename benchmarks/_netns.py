"""Two hosts on one machine: processes with networks of their own, and a relay between them that delays every packet.

Nothing is left behind however a run ends: a network lives as long as the process in it, a device as long as the relay.
"""

import ctypes
import fcntl
import multiprocessing
import os
import select
import signal
import struct
import subprocess
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection

ADDRESSES = ("10.77.0.1", "10.77.0.2")
DEVICE = "afd0"
MTU = 60_000
"""A message in few packets: the relay is Python."""

_CLONE_NEWNET = 0x40000000
_TUNSETIFF = 0x400454CA
_IFF_TUN_WITHOUT_HEADERS = 0x1001
_libc = ctypes.CDLL(None, use_errno=True)


def leave_network() -> None:
    """Give this process an empty network; before it has other threads. Raises OSError without the right to do so."""
    _check(_libc.unshare(_CLONE_NEWNET), "unshare")


class Relay:
    """The wire between two hosts; `delay` sets how long a packet is under way."""

    def __init__(self, control: Connection) -> None:
        self._control = control

    def delay(self, one_way_ms: float) -> None:
        """From the next packet on."""
        self._control.send(one_way_ms / 1000)
        self._control.recv()


@contextmanager
def relay(pids: tuple[int, int]) -> Iterator[Relay]:
    """Joins the networks of two processes, which have ADDRESSES from then on."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_run, args=(pids, there), daemon=True)
    process.start()
    there.close()
    try:
        here.recv()  # the devices are up
        yield Relay(here)
    finally:
        here.close()  # ends the relay
        process.join(5)
        process.kill()


def _run(pids: tuple[int, int], control: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it, after those that use it
    devices = [_device_in(pid, *ends) for pid, ends in zip(pids, (ADDRESSES, ADDRESSES[::-1]), strict=True)]
    with suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))  # a wire does not wait for a free core
    control.send(None)
    with suppress(EOFError, OSError, KeyboardInterrupt):  # a host is gone, or nobody needs the wire any longer
        _forward(devices, control)


def _forward(devices: list[int], control: Connection) -> None:
    delay_s = 0.0
    under_way: deque[tuple[float, int, bytes]] = deque()  # (due, device, packet), in order: one delay for all
    while True:
        wait_s = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        ready, _, _ = select.select([*devices, control.fileno()], [], [], wait_s)
        for source in ready:
            if source == control.fileno():
                delay_s = control.recv()
                control.send(None)
            else:
                target = devices[source == devices[0]]
                under_way.append((time.monotonic() + delay_s, target, os.read(source, 1 << 16)))
        while under_way and under_way[0][0] <= time.monotonic():
            _, target, packet = under_way.popleft()
            os.write(target, packet)


def _device_in(pid: int, own: str, peer: str) -> int:
    """A TUN device in the network of `pid`, which this thread enters."""
    with open(f"/proc/{pid}/ns/net", "rb") as network:
        _check(_libc.setns(network.fileno(), _CLONE_NEWNET), "setns")
    device = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH14x", DEVICE.encode(), _IFF_TUN_WITHOUT_HEADERS))
    for command in (
        f"ip address add {own} peer {peer} dev {DEVICE}",
        f"ip link set {DEVICE} mtu {MTU} up",
        "ip link set lo up",
    ):
        subprocess.run(command.split(), check=True)
    return device


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
