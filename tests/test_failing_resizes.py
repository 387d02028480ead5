"""Resizes that fail for a real cause, on a live cluster under load: the server serves on, says why, and the next resize works."""

import ctypes
import os
import random
import re
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from actors.cluster import Cluster
from actors.controller import NAMESPACE
from afd_ray.config import parse_config
from afd_ray.membership.steps import NAMES
from afd_ray.models.checkpoint import Checkpoint, load_model
from afd_ray.models.presets import PRESETS
from afd_ray.request import SamplingParams
from tests.cluster_load import Answers, load

pytestmark = [pytest.mark.ray, pytest.mark.full, pytest.mark.usefixtures("two_nodes")]

MODEL = PRESETS["step3-tiny"]
BLOCK_TOKENS = 16
CACHE_BYTES = 8 << 30
"""Of an attention actor's address space: blocks that are never used take no memory."""
PACE = {"base_us": 100_000}
"""So that a micro-batch is in flight for long enough to be met there."""
SHORT = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
TIMEOUT_S = 60.0
PIDFD_GETFD = 438
"""System call: a copy of another process's descriptor."""


@pytest.fixture(scope="module")
def cluster(tiny_directory: Path, two_nodes: None) -> Iterator[Cluster]:
    block_bytes = BLOCK_TOKENS * MODEL.num_hidden_layers * MODEL.kv_width * MODEL.dtype.itemsize
    raw = {
        "model": {"path": str(tiny_directory)},
        "attention": {"replicas": 1, "kv_cache": {"block_size": BLOCK_TOKENS, "num_blocks": CACHE_BYTES // block_bytes}},
        "ffn": {"pace": PACE},
        "failure": {"detect_timeout_s": 3.0},
        "handoff": {"kind": "tcp"},
    }
    with Cluster.start(parse_config(raw), name="afd-failing") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def answers(tiny_directory: Path) -> Answers:
    rng, reference = random.Random(5), load_model(Checkpoint.open(tiny_directory))
    prompts = [rng.choices(range(MODEL.vocab_size), k=rng.randint(1, 40)) for _ in range(4)]
    return Answers(prompts, 4 * [SHORT], [reference.generate_greedy(prompt, 8) for prompt in prompts])


class Growing:
    """A resize to two attention actors, in progress."""

    def __init__(self, cluster: Cluster, timeout_s: float | None = None) -> None:
        self._cluster = cluster
        self._before = pids_of_attention()
        self._answer = cluster.controller.scale.remote(2, timeout_s=timeout_s)

    def answer(self) -> dict[str, Any]:
        return dict(ray.get(self._answer, timeout=TIMEOUT_S))

    def until(self, wanted: Callable[[], Any]) -> Any:
        """What it gives as soon as that is something; never after the resize is over."""
        while not (found := wanted()):
            assert not ray.wait([self._answer], timeout=0)[0], f"the resize is over: {self.answer()}"
        return found

    def until_phase(self, *phases: str) -> None:
        names = tuple(NAMES[phase] for phase in phases)  # type: ignore[index]
        self.until(lambda: ray.get(self._cluster.controller.progress.remote()).startswith(names))

    def new_pid(self) -> int:
        """Of the new actor, as soon as it has a process."""
        (pid,) = self.until(lambda: pids_of_attention() - self._before)
        return int(pid)


def pids_of_attention() -> set[int]:
    """Of all attention actors of this Ray cluster."""
    named = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True) if actor["namespace"] == NAMESPACE]
    found = set()
    for name in named:
        if "-attention-" in name:
            with suppress(ValueError):
                actor_id = ray.get_actor(name, namespace=NAMESPACE)._actor_id.hex()
                found.add(int(ray._private.state.actors(actor_id)["Pid"]))
    return found - {0}


def running_pids(status: dict[str, Any]) -> list[int]:
    return [int(actor["pid"]) for role in ("attention", "ffn") for actor in status[role] if actor["state"] == "running"]


def infeasible(cluster: Cluster) -> dict[str, Any]:
    return cluster.scale(attention=40)


def killed(cluster: Cluster) -> dict[str, Any]:
    growing = Growing(cluster)
    pid = growing.new_pid()
    growing.until_phase("load", "prepare", "connect")
    os.kill(pid, signal.SIGKILL)
    return growing.answer()


def out_of_memory(cluster: Cluster) -> dict[str, Any]:
    """The new actor may have as much address space as the old one has, less half a cache."""
    attention, _ = running_pids(cluster.status())
    limit = psutil.Process(attention).memory_info().vms - CACHE_BYTES // 2
    growing = Growing(cluster)
    resource.prlimit(growing.new_pid(), resource.RLIMIT_AS, (limit, limit))
    return growing.answer()


def late(cluster: Cluster) -> dict[str, Any]:
    return Growing(cluster, timeout_s=0.5).answer()


def link_down(cluster: Cluster) -> dict[str, Any]:
    """A link of the coming epoch, while the old one comes to a step boundary; the FFN actor is stopped so that it does not yet."""
    attention, ffn = running_pids(cluster.status())
    before = links(attention, ffn)
    growing = Growing(cluster)
    growing.until_phase("drain")
    os.kill(ffn, signal.SIGSTOP)
    try:
        cut(attention, min(links(attention, ffn) - before))
        growing.until_phase("resume", "discard")
    finally:
        os.kill(ffn, signal.SIGCONT)
    return growing.answer()


def links(one: int, other: int) -> set[tuple[int, int]]:
    """Ports, here and there, of the connections between two processes of this host."""
    theirs = {(c.raddr.port, c.laddr.port) for c in connections(other)}
    return {ports for c in connections(one) if (ports := (c.laddr.port, c.raddr.port)) in theirs}


def connections(pid: int) -> list[Any]:
    return [c for c in psutil.Process(pid).net_connections("tcp") if c.raddr]


def cut(pid: int, ports: tuple[int, int]) -> None:
    """Shut one connection of another process down; neither of its ends does it."""
    descriptor = next(c.fd for c in connections(pid) if (c.laddr.port, c.raddr.port) == ports)
    with ExitStack() as stack:
        process = os.pidfd_open(pid)
        stack.callback(os.close, process)
        copy = ctypes.CDLL(None, use_errno=True).syscall(PIDFD_GETFD, process, descriptor, 0)
        assert copy >= 0, os.strerror(ctypes.get_errno())
        stack.enter_context(closing(socket.socket(fileno=copy))).shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    ("fail", "reason"),
    [
        (infeasible, r"needed: attention 39 CPUs in 39 group\(s\)"),
        (killed, r"attention-\d+.* died"),
        (out_of_memory, r"attention-\d+: load failed: Unable to allocate 8\.00 GiB"),
        (link_down, r"edge to rank \d: closed by the peer"),
        (late, r"not over in 0\.5 s"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_failed_resize_is_rolled_back_and_the_next_one_works(
    cluster: Cluster, answers: Answers, fail: Callable[[Cluster], dict[str, Any]], reason: str
) -> None:
    before = cluster.status()
    with load(cluster, answers):
        answer = fail(cluster)
        assert answer["outcome"] == "rolled_back"
        assert re.search(reason, answer["reason"])
        after = cluster.status()
        assert (after["state"], after["epoch"], after["last_resize"]) == ("ready", before["epoch"], answer)
        assert running_pids(after) == running_pids(before)
        assert cluster.scale(attention=2)["outcome"] == "committed"
        assert cluster.scale(attention=1)["outcome"] == "committed"
