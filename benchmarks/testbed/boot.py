"""The first process of a host, in namespaces of its own: mounts what a host has to itself, and is there until its stdin ends.

`boot.py NAME HOSTS SHARED...`: run by path with nothing but the standard library, so that a host is up in an instant. Says its process id as the
outside knows it. With its end the kernel kills every process of the host and takes the mounts away.
"""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

OWN = ("/tmp", "/dev/shm", "/run", os.path.expanduser("~"))


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def settle(name: str, hosts: str, shared: Sequence[str]) -> None:
    """`hosts`: what /etc/hosts says; `shared` directories stay visible although they lie where the host has a directory of its own."""
    mount("--make-rprivate", "/")
    kept = {path: os.open(path, os.O_PATH) for path in shared}
    for place in OWN:
        Path(place).mkdir(parents=True, exist_ok=True)  # a home may lie in /tmp
        mount("-t", "tmpfs", "-o", "mode=1777", name, place)
    for path, descriptor in kept.items():
        Path(path).mkdir(parents=True, exist_ok=True)
        mount("--no-canonicalize", "--bind", f"/proc/{os.getpid()}/fd/{descriptor}", path)
        os.close(descriptor)
    Path("/run/hosts").write_text(hosts)
    mount("--bind", "/run/hosts", "/etc/hosts")
    socket.sethostname(name)


def main(name: str, hosts: str, *shared: str) -> None:
    outer_pid = os.readlink("/proc/self")  # still the outside's /proc
    mount("-t", "proc", "proc", "/proc")
    settle(name, hosts, shared)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # orphans come to the first process: the kernel shall bury them
    print(outer_pid, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
