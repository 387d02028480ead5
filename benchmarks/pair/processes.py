"""The two processes, told what to do by name, on this host or each with a network of its own."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from afd_ray.engine.stage_costs import StageTimes
from afd_ray.handoff.mesh import LinkKind
from benchmarks.pair.answering import ATTENTION
from benchmarks.pair.halves import TIMEOUT_S, AttentionSide, FFNSide, Load
from benchmarks.testbed.switch import Switch, leave_network, switch

ADDRESSES = ("10.77.0.1", "10.77.0.2")
"""Of both, where they are on two hosts."""


class Worker:
    """A process of the pair, told what to do by name: `start` a method, take its `result`."""

    def __init__(self, role: Callable[[Any], object], given: object, apart: bool = False) -> None:
        """`role`, called with `given`, makes what is told; its first result is None, when that is made. `apart`: with a network of its own."""
        context = multiprocessing.get_context("spawn")
        self.pipe, there = context.Pipe()
        self.process = context.Process(target=_serve, args=(role, given, apart, there), daemon=True)
        self.process.start()
        there.close()

    def start(self, method: str, *arguments: Any) -> None:
        self.pipe.send((method, arguments))

    def result(self) -> Any:
        answer, error = self.pipe.recv()
        if error:
            raise RuntimeError(error)
        return answer

    def close(self) -> None:
        """The process ends once its pipe has."""
        self.pipe.close()
        self.process.join(TIMEOUT_S)
        self.process.kill()


class Pair:
    """Both processes; every method returns when both have done their part."""

    def __init__(self, directory: Path, apart: bool) -> None:
        self.workers = (Worker(AttentionSide, directory, apart), Worker(FFNSide, directory, apart))
        self.results()

    @property
    def pids(self) -> tuple[int, int]:
        first, second = (worker.process.pid or 0 for worker in self.workers)
        return first, second

    def both(self, method: str, *arguments: Any) -> list[Any]:
        return self.each(method, arguments, arguments)

    def each(self, method: str, *arguments: Sequence[Any]) -> list[Any]:
        """`method` on both at once, each with its own arguments."""
        for worker, own in zip(self.workers, arguments, strict=True):
            worker.start(method, *own)
        return self.results()

    def results(self) -> list[Any]:
        """Of both; raises RuntimeError as soon as either has failed."""
        results: dict[int, Any] = {}
        while len(results) < len(self.workers):
            left = {worker.pipe: rank for rank, worker in enumerate(self.workers) if rank not in results}
            for rank in [left[pipe] for pipe in wait(list(left)) if isinstance(pipe, Connection)]:
                results[rank] = self.workers[rank].result()
        return [results[rank] for rank in range(len(self.workers))]

    def load(self, load: Load) -> None:
        self.both("load", load)

    def unlinked(self, slots: int, seconds: float) -> StageTimes:
        """Stage times (us) with both computing at once, each on recorded inputs, so that neither waits and both contend."""
        attention = self.workers[ATTENTION]
        attention.start("record", slots)
        self.both("replay", slots, attention.result())
        return StageTimes(*_pairwise(self.both("alone", slots, seconds)))

    def linked(self, slots: int, kind: LinkKind, hosts: tuple[str, str], steps: int) -> tuple[float, float]:
        """(us for a layer of all micro-batches, us of transfer both ways) while tokens are made over a mesh of this kind."""
        endpoints = self.each("open", (slots, kind, hosts[0]), (slots, kind, hosts[1]))
        self.both("connect", dict(enumerate(endpoints)))
        transfer_us, _ = self.both("ping")
        period_us, _ = self.each("run", (steps,), ())
        self.both("leave")
        return period_us, transfer_us

    def close(self) -> None:
        for worker in self.workers:
            worker.close()


@contextmanager
def pair(directory: Path) -> Iterator[Pair]:
    """A pair on this host."""
    made = Pair(directory, apart=False)
    try:
        yield made
    finally:
        made.close()


@contextmanager
def pair_of_hosts(directory: Path) -> Iterator[tuple[Pair, Switch]]:
    """A pair of which each has a network of its own, and the wire between them; needs the rights of root."""
    made = Pair(directory, apart=True)
    try:
        with switch() as wire:
            for address, pid in zip(ADDRESSES, made.pids, strict=True):
                wire.attach(address, pid)
            yield made, wire
    finally:
        made.close()


def _pairwise(busy_us: list[float]) -> tuple[float, float, float, float]:
    attention, ffn = busy_us
    return attention, 0.0, ffn, 0.0


def _serve(role: Callable[[Any], object], given: object, apart: bool, pipe: Connection) -> None:
    """A worker's life: what it is told, until the pipe ends."""
    torch.set_num_threads(1)
    with suppress(EOFError, ConnectionError, KeyboardInterrupt):
        made, error = _try(_settle, role, given, apart)
        pipe.send((None, error))
        while True:
            method, arguments = pipe.recv()
            pipe.send(_try(getattr(made, method), *arguments))


def _settle(role: Callable[[Any], object], given: object, apart: bool) -> object:
    if apart:
        leave_network()
    return role(given)


def _try(function: Callable[..., Any], *arguments: Any) -> tuple[Any, str]:
    """(result, "") or (None, the error in one line)."""
    try:
        return function(*arguments), ""
    except Exception as error:  # told to the parent, who raises it
        return None, f"{function.__name__}: {type(error).__name__}: {error}"
