"""How long do rows take from one actor's GPU memory to another's and back, 896 KB there and 1.75 MB back, beside the bare mechanism?

Two processes on one GPU: 64 rows of Step-3 in bfloat16 there, 128 back. `ipc` and `nccl` are the engine's own links, headers included, as the step
loops use them: the round trip ends when the host knows that the rows are there. The bare mechanism has no headers and no host in it: both
processes order all round trips ahead, and their streams take turns. Rows are checked first. The bound is bytes, each read once and written once, over the
bandwidth of a large sum in the same run. Without MPS two processes share a GPU by time slices, and a wait is as long as a slice: the row says which it was.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch

from afd_ray.handoff.device.device_mesh import DeviceMesh
from afd_ray.handoff.device.ipc import IpcCarrier
from afd_ray.handoff.device.nccl import RECEIVER, SENDER, Library, NcclCarrier
from afd_ray.handoff.device.streams import Device
from afd_ray.handoff.device.words import FULL, attach_words, create_words
from afd_ray.handoff.mesh import Endpoint, open_mesh
from afd_ray.handoff.message import Header, Kind, LinkError, Message
from benchmarks._gpu import ABSENT, heading, measure_limits

THERE, BACK = (64, 7168), (128, 7168)
ROUNDS, QUICK_ROUNDS = 200, 50
WAIT_S, CLOSE_S = 60.0, 10.0
CONTROL_BYTES = 1 << 16
PLACES = 6
COLUMNS = "| link | MPS | bound, us | bare, us | ours, us | ours / bare |"
WARM_ROUNDS = 5


class Tools(NamedTuple):
    """What both processes make of the machine."""

    device: Callable[[], Device]
    library: Callable[[Device], Library]


class Way(ABC):
    """Rows to another process and back."""

    def __init__(self, rank: int, tools: Tools, pipe: Connection) -> None:
        self.rank, self.device, self.pipe = rank, tools.device(), pipe
        self.there = torch.arange(THERE[0] * THERE[1], device=self.device.place).view(THERE).to(torch.bfloat16)
        self.back = torch.arange(BACK[0] * BACK[1], device=self.device.place).view(BACK).to(torch.bfloat16)
        self.set_up(tools)

    @abstractmethod
    def set_up(self, tools: Tools) -> None:
        """With the other process, which does it too."""

    @abstractmethod
    def rounds(self, count: int) -> list[float]:
        """Of rank 0: so many round trips, us each; of rank 1 nothing."""

    @abstractmethod
    def arrived(self) -> torch.Tensor:
        """What the last round trip brought, in host memory."""

    @abstractmethod
    def close(self) -> None: ...

    def is_right(self) -> bool:
        sent = self.back if self.rank == 0 else self.there
        return torch.equal(self.arrived().view(torch.uint8), sent.cpu().view(torch.uint8))

    def swap(self, value: object) -> object:
        self.pipe.send(value)
        return self.pipe.recv()


class Link(Way):
    """By the engine's own mesh."""

    def carrier(self, tools: Tools, peers: dict[int, int]) -> IpcCarrier | NcclCarrier:
        raise NotImplementedError

    def set_up(self, tools: Tools) -> None:
        other = 1 - self.rank
        frames = {other: 4096 + (self.back if self.rank == 0 else self.there).nbytes}
        control = open_mesh(self.rank, 2, 0, secret=b"s", host="127.0.0.1", peers={other: CONTROL_BYTES})
        self._carrier = self.carrier(tools, frames)
        self.mesh = DeviceMesh(control, self._carrier, self.device)
        endpoint = self.swap(self.mesh.endpoint.to_dict())
        assert isinstance(endpoint, dict)
        self.mesh.connect({other: Endpoint.from_dict(endpoint)}, WAIT_S)
        self._last = torch.empty(0)

    def rounds(self, count: int) -> list[float]:
        took = []
        for step in range(count):
            began_s = time.perf_counter()
            if self.rank == 0:
                self.mesh.send(1, Header(Kind.DISPATCH, 0, 0, step=step, rows=THERE[0]), (self.there,))
            self._take(step == count - 1)
            if self.rank == 1:
                self.mesh.send(0, Header(Kind.PARTIAL, 0, 1, step=step, rows=BACK[0]), (self.back,))
            else:
                self.mesh.settle()
                took.append((time.perf_counter() - began_s) * 1e6)
        return took

    def _take(self, keep: bool) -> None:
        message = self._next()
        (rows,) = message.received()
        if keep:
            self._last = rows.clone()
        message.release()

    def _next(self) -> Message:
        while (message := self.mesh.receive()) is None:
            self.mesh.wait(WAIT_S, under_way=True)
        return message

    def arrived(self) -> torch.Tensor:
        self.mesh.settle()
        return self._last.cpu()

    def close(self) -> None:
        """And let what gives memory back in the background finish: this process may be about to end."""
        self.mesh.close()
        self._carrier.wait_closed(CLOSE_S)


class IpcLink(Link):
    def carrier(self, tools: Tools, peers: dict[int, int]) -> IpcCarrier:
        return IpcCarrier(self.device, peers, PLACES)


class NcclLink(Link):
    def carrier(self, tools: Tools, peers: dict[int, int]) -> NcclCarrier:
        return NcclCarrier(self.device, self.rank, peers, PLACES, tools.library(self.device))


class Bare(Way):
    """Streams alone, which take turns."""

    def rounds(self, count: int) -> list[float]:
        began_s = time.perf_counter()
        for _ in range(count):
            self.order()
        self.device.stream().synchronize()
        return [(time.perf_counter() - began_s) / count * 1e6] if self.rank == 0 else []

    @abstractmethod
    def order(self) -> None:
        """One round trip."""


class BareIpc(Bare):
    """A copy into the other's memory and a word, each way."""

    def set_up(self, tools: Tools) -> None:
        own = create_words(self.device, 1)
        self._inbox = self.device.allocate((self.back if self.rank == 0 else self.there).nbytes)
        told = self.swap((own.name, self.device.export(self._inbox), len(self._inbox)))
        assert isinstance(told, tuple)
        self._own, self._theirs = own.words, attach_words(self.device, told[0])
        self._outbox = self.device.open(told[1], told[2])
        self.swap("open")
        own.unlink()
        self._count = 0

    def order(self) -> None:
        self._count += 1
        if self.rank == 0:
            self._give()
        self.device.stream().wait(self._own.address(0, FULL), self._count)
        if self.rank == 1:
            self._give()

    def _give(self) -> None:
        sent = self.there if self.rank == 0 else self.back
        self.device.stream().copy(self._outbox, sent.view(torch.uint8).flatten())
        self.device.stream().write(self._theirs.address(0, FULL), self._count)

    def arrived(self) -> torch.Tensor:
        return self._inbox.cpu()

    def is_right(self) -> bool:
        sent = self.back if self.rank == 0 else self.there
        return torch.equal(self.arrived(), sent.cpu().view(torch.uint8).flatten())

    def close(self) -> None:
        self.device.close(self._outbox)
        self.swap("closed")
        self.device.free(self._inbox)
        for words in (self._own, self._theirs):
            words.close()


class BareNccl(Bare):
    """A send and a receive, each way by a communicator of its own, on the stream that computes."""

    def set_up(self, tools: Tools) -> None:
        library = tools.library(self.device)
        ids = [library.unique_id() for _ in range(2)]
        theirs = self.swap(ids)
        assert isinstance(theirs, list)
        up, down = ids if self.rank == 0 else theirs
        pair = [library.communicator(up, SENDER if self.rank == 0 else RECEIVER)]
        pair += [library.communicator(down, RECEIVER if self.rank == 0 else SENDER)]
        self._out, self._in = pair if self.rank == 0 else pair[::-1]
        self._inbox = self.device.allocate((self.back if self.rank == 0 else self.there).nbytes)

    def order(self) -> None:
        sent = (self.there if self.rank == 0 else self.back).view(torch.uint8).flatten()
        stream = self.device.stream()
        if self.rank == 0:
            self._out.send(sent, stream)
        self._in.receive(self._inbox, stream)
        if self.rank == 1:
            self._out.send(sent, stream)

    def arrived(self) -> torch.Tensor:
        return self._inbox.cpu()

    is_right = BareIpc.is_right

    def close(self) -> None:
        for communicator in (self._out, self._in):
            communicator.abort()
        self.device.free(self._inbox)


WAYS: dict[str, type[Way]] = {"ipc": IpcLink, "nccl": NcclLink, "bare ipc": BareIpc, "bare nccl": BareNccl}


class Timed(NamedTuple):
    us: float
    is_right: bool


def answer(pipe: Connection, tools: Tools) -> None:
    """The other process: what it is told to, until there is nothing more."""
    while order := pipe.recv():
        name, rounds = order
        way = WAYS[name](1, tools, pipe)
        with suppress(LinkError):
            for count in (WARM_ROUNDS, rounds):
                way.rounds(count)
                pipe.send(way.is_right())
                pipe.recv()
        way.close()


@contextmanager
def other_process(tools: Tools) -> Iterator[Connection]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=answer, args=(there, tools), daemon=True)
    process.start()
    there.close()  # so that what it had to say ends with it
    try:
        yield here
        here.send(None)
        process.join(WAIT_S)
    finally:
        process.kill()


def timed(name: str, tools: Tools, pipe: Connection, rounds: int) -> Timed:
    pipe.send((name, rounds))
    way = WAYS[name](0, tools, pipe)
    right, took = True, [0.0]
    try:
        for count in (WARM_ROUNDS, rounds):
            took = way.rounds(count)
            right = way.is_right() and bool(pipe.recv()) and right
            pipe.send("go on")
    finally:
        way.close()
    return Timed(statistics.median(took), right)


def line(link: str, bound_us: float, bare: Timed, ours: Timed, mps: str) -> str:
    return f"| {link} | {mps} | {bound_us:.1f} | {bare.us:.1f} | {ours.us:.1f} | {ours.us / bare.us:.2f} |"


def mps_state() -> str:
    """Whether a control daemon's pipe is where CUDA looks for one."""
    directory = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"))
    return "on" if (directory / "control").exists() else "off"


def cuda_device() -> Device:
    from afd_ray.handoff.gpu.cuda import CudaDevice

    return CudaDevice(torch.device("cuda", 0))


def cuda_library(device: Device) -> Library:
    from afd_ray.handoff.gpu.nccl import CupyNccl

    return CupyNccl(device.place, shares_gpu=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--link", choices=("ipc", "nccl"), action="append", help="one alone; both if not given")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} round trips")
    args = parser.parse_args(argv)
    rounds = QUICK_ROUNDS if args.quick else args.rounds
    if not torch.cuda.is_available():
        print(ABSENT, file=sys.stderr)
        return 2
    limits = measure_limits()
    print(heading(limits, COLUMNS))
    moved = 2 * 2 * (THERE[0] * THERE[1] + BACK[0] * BACK[1])
    right = True
    for link in args.link or ("ipc", "nccl"):
        try:
            with other_process(Tools(cuda_device, cuda_library)) as pipe:
                bare, ours = (timed(name, Tools(cuda_device, cuda_library), pipe, rounds) for name in (f"bare {link}", link))
        except (ImportError, RuntimeError, EOFError, OSError) as error:
            print(f"\n{link} is left out: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            continue
        print(line(link, limits.bound_us(moved, 0, torch.bfloat16), bare, ours, mps_state()), flush=True)
        right = right and bare.is_right and ours.is_right
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
