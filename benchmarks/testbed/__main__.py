"""A test bed that stays: `up` in the background, `run HOST COMMAND`, `link HOST HOST`, `off HOST` and `on HOST`, `down`."""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

from benchmarks.testbed.bed import NAMES, Bed, bed, why_not
from benchmarks.testbed.switch import Link

ADDRESS = "\0afd-testbed"
"""A socket without a file: gone with whoever listens."""
UP_TIMEOUT_S = 20.0
POLL_S = 0.05


class Unavailable(RuntimeError):
    """One line."""


def hold(names: Sequence[str], shared: Sequence[Path]) -> None:
    """Be the test bed, until told to end."""
    with bed(names, shared=shared) as hosts, Listener(ADDRESS, "AF_UNIX") as listener:
        while True:
            with listener.accept() as caller:
                order, *arguments = json.loads(caller.recv_bytes())
                if order == "down":
                    hosts.close()  # before the caller is hung up on
                    return
                caller.send_bytes(json.dumps(_obey(hosts, order, *arguments)).encode())


def _obey(hosts: Bed, order: str, *arguments: Any) -> dict[str, Any]:
    try:
        if order == "link":
            first, second, link = arguments
            hosts.link(first, second, Link(**link))
        elif order == "command":
            name, command = arguments
            return {"command": hosts[name].command(command)}
        else:
            getattr(hosts, order)(*arguments)
    except KeyError as error:
        return {"error": f"no host {error.args[0]}, there are {', '.join(hosts.hosts)}"}
    except (OSError, RuntimeError) as error:
        return {"error": str(error)}
    return {}


def tell(*order: Any) -> dict[str, Any]:
    """Raises Unavailable when there is no test bed, or it says why not."""
    try:
        with _caller() as bed_side:
            bed_side.send_bytes(json.dumps(order).encode())
            answer: dict[str, Any] = json.loads(bed_side.recv_bytes())
    except (OSError, EOFError):
        raise Unavailable("no test bed is up: python -m benchmarks.testbed up") from None
    if "error" in answer:
        raise Unavailable(answer["error"])
    return answer


def up(names: Sequence[str], shared: Sequence[Path]) -> None:
    reason = why_not() or ("a test bed is up already" if is_up() else None)
    if reason:
        raise Unavailable(reason)
    command = [sys.executable, "-m", "benchmarks.testbed", "hold", *_hosts_arguments(names, shared)]
    holder = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    until_s = time.monotonic() + UP_TIMEOUT_S
    while not is_up():
        if holder.poll() is not None or time.monotonic() > until_s:
            holder.kill()
            raise Unavailable("the test bed did not come up")
        time.sleep(POLL_S)


def down() -> None:
    """Returns when nothing of it is left; harmless when there is none."""
    with suppress(OSError, EOFError), _caller() as bed_side:
        bed_side.send_bytes(json.dumps(["down"]).encode())
        bed_side.recv_bytes()


def is_up() -> bool:
    try:
        tell("command", NAMES[0], ["true"])
    except Unavailable as error:
        return "no test bed" not in str(error)
    return True


def _caller() -> "Connection[Any, Any]":
    return Client(ADDRESS, "AF_UNIX")


def _hosts_arguments(names: Sequence[str], shared: Sequence[Path]) -> list[str]:
    return ["--hosts", *names, "--share", *(str(path.resolve()) for path in shared)]


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        _do(args)
    except (Unavailable, RuntimeError) as error:
        print(f"testbed: {error}", file=sys.stderr)
        return 1
    return 0


def _do(args: argparse.Namespace) -> None:
    if args.order == "up":
        up(args.hosts, args.share)
    elif args.order == "hold":
        hold(args.hosts, args.share)
    elif args.order == "down":
        down()
    elif args.order == "run":
        command = tell("command", args.host, args.command)["command"]
        os.execvp(command[0], command)
    elif args.order == "link":
        link = {"delay_ms": args.delay, "loss": args.loss, "rate_mbit": args.rate, "up": not args.cut}
        tell("link", args.host, args.other, link)
    else:
        tell(args.order, args.host)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.testbed", description=__doc__)
    orders = parser.add_subparsers(dest="order", required=True, metavar="ORDER")
    for name, about in (("up", "build it, in the background"), ("hold", "build it, and be it until `down`")):
        order = orders.add_parser(name, help=about)
        order.add_argument("--hosts", nargs="+", default=list(NAMES), metavar="NAME")
        order.add_argument("--share", nargs="*", type=Path, default=[], help="directories under /tmp that all hosts see")
    orders.add_parser("down", help="take it down, with every process in it")
    run = orders.add_parser("run", help="run a command on a host")
    run.add_argument("host")
    run.add_argument("command", nargs=argparse.REMAINDER)
    link = orders.add_parser("link", help="how packets get from one host to another, both ways; perfect unless told otherwise")
    link.add_argument("host")
    link.add_argument("other")
    link.add_argument("--delay", type=float, default=0.0, metavar="MS", help="one way")
    link.add_argument("--loss", type=float, default=0.0, metavar="SHARE", help="of the packets, from 0 to 1")
    link.add_argument("--rate", type=float, metavar="MBIT", help="per second")
    link.add_argument("--cut", action="store_true", help="everything is dropped, and nobody is told")
    for name, about in (("off", "cut a host's power"), ("on", "boot a host that is off")):
        orders.add_parser(name, help=about).add_argument("host")
    return parser


if __name__ == "__main__":
    sys.exit(main())
