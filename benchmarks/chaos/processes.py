"""The processes of one Ray cluster on this machine by what they do, and what they hold."""

import os
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil
import ray
from ray.util.placement_group import placement_group_table

from actors.controller import NAMESPACE
from benchmarks.chaos.schedule import Victim
from benchmarks.soak import sample

TITLES: Mapping[Victim, str] = {
    "attention": "ray::AttentionActor",
    "ffn": "ray::FFNActor",
    "controller": "ray::Controller",
    "ingress": "ray::ServeReplica",
    "proxy": "ray::ProxyActor",
    "serve_controller": "ray::ServeController",
}
"""What the process title of an actor's worker begins with."""

TICKS_PER_S = os.sysconf("SC_CLK_TCK")

Workers = dict[Victim, list[psutil.Process]]


def workers() -> Workers:
    """By role, each in the order of process ids; of the Ray cluster that this process is connected to."""
    found: Workers = {role: [] for role in TITLES}
    for process in _children():
        with suppress(psutil.Error):
            title = " ".join(process.cmdline())
            for role, begin in TITLES.items():
                if title.startswith(begin):
                    found[role].append(process)
    return {role: sorted(processes, key=lambda process: process.pid) for role, processes in found.items()}


def cpu_seconds(raylets: Collection[int]) -> dict[int, float]:
    """Of every worker process of these raylets, by process id: user and system time since its start.

    In 2 ms: whoever measures with this is not to disturb what is measured.
    """
    seconds = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[1]) in raylets:
                seconds[int(stat.parent.name)] = (int(fields[11]) + int(fields[12])) / TICKS_PER_S
    return seconds


def raylets() -> list[int]:
    """Process ids, of the Ray cluster that this process is connected to."""
    mine = f"--gcs-address={ray.get_runtime_context().gcs_address}"
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.name() == "raylet" and mine in process.cmdline():
                found.append(process.pid)
    return found


def _children() -> list[psutil.Process]:
    """Of the cluster's raylets."""
    children = []
    for raylet in raylets():
        with suppress(psutil.Error):
            children += psutil.Process(raylet).children()
    return children


class Held(NamedTuple):
    """What a cluster at rest holds: what must be the same after a storm as before."""

    processes: dict[str, int]
    """By role."""
    actors: int
    """Of ours, by name, in Ray's books."""
    placement_groups: int
    segments: int
    """Of shared memory, as mapped by all processes together."""
    descriptors: dict[str, int]
    """Open files of all processes of a role."""
    threads: dict[str, int]


def held() -> Held:
    """By the cluster that this process is connected to."""
    by_role = {role: [sample(process.pid, 0.0) for process in processes] for role, processes in workers().items()}
    named = [actor for actor in ray.util.list_named_actors(all_namespaces=True) if actor["namespace"] == NAMESPACE]
    groups = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
    return Held(
        {role: len(samples) for role, samples in by_role.items()},
        len(named),
        len(groups),
        sum(one.segments for samples in by_role.values() for one in samples),
        {role: sum(one.descriptors for one in samples) for role, samples in by_role.items()},
        {role: sum(one.threads for one in samples) for role, samples in by_role.items()},
    )


SPARE_PER_PROCESS = 4
"""Connections and threads that Ray opens and closes by itself, in any process."""


def leaks(before: Held, after: Held) -> list[str]:
    """What there is more of after than before, a line each."""
    lines = []
    for what in ("processes", "actors", "placement_groups", "segments"):
        was, now = getattr(before, what), getattr(after, what)
        if now != was:
            lines.append(f"{what}: {now}, were {was}")
    for what in ("descriptors", "threads"):
        for role, was in getattr(before, what).items():
            now = getattr(after, what)[role]
            if now > was + SPARE_PER_PROCESS * before.processes[role]:
                lines.append(f"{what} of {role}: {now}, were {was}")
    return lines
