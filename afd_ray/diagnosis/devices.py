"""What would keep actors off their GPUs, or rows from staying there: told before anything starts, by the rules of `actors.device`."""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from afd_ray.config import Config
from afd_ray.diagnosis.facts import ClusterFacts, DeviceFacts, HostFacts
from afd_ray.diagnosis.finding import Finding, by_value, listed, others
from afd_ray.handoff.terms import NCCL_SHARES_GPU

EXTRA = "install this project there with its extra cuda12 or cuda13"


class Seat(NamedTuple):
    """A host that is to hold actors with GPUs."""

    host: HostFacts
    devices: DeviceFacts


def device_findings(config: Config, facts: ClusterFacts) -> Iterator[Finding]:
    asked = {role: gpus for role, gpus in (("attention", config.attention.num_gpus), ("ffn", config.ffn.num_gpus)) if gpus}
    if not asked:
        return
    seats = list(_seats(asked, facts))
    for seat in seats:
        yield from _gpus(asked, seat)
    kind = config.handoff.between_devices
    if kind is None:
        return
    modules = {"ipc": {"cuda.bindings": "cuda-bindings"}, "nccl": {"cuda.bindings": "cuda-bindings", "cupy": "CuPy"}}[kind]
    for host, devices in seats:
        for module, name in modules.items():
            if module in devices.missing:
                yield _link(str(host), f"handoff.kind: {kind} needs {name}, which is not installed there", EXTRA)
    if kind == "ipc":
        yield from _one_host(facts)
    else:
        yield from _nccl(config, seats)
        yield from _drivers(seats)


def _seats(asked: Iterable[str], facts: ClusterFacts) -> Iterator[Seat]:
    """Where the actors would be placed; where that is not known, hosts with a GPU, or the only one that there is."""
    planned = {name for role in asked for name in facts.placed.get(role, ())}
    for host in facts.hosts:
        devices = host.devices
        if devices is None:
            continue
        if host.name in planned if planned else devices.gpus or len(facts.hosts) == 1:
            yield Seat(host, devices)


def _gpus(asked: Mapping[str, float], seat: Seat) -> Iterator[Finding]:
    keys = " and ".join(f"{role}.num_gpus: {gpus:g}" for role, gpus in asked.items())
    needs, (host, devices) = "needs" if len(asked) == 1 else "need", seat
    if not devices.gpus:
        change = "see that `nvidia-smi` lists a GPU there (in a container: that it was given one), or set num_gpus to 0"
        yield Finding("gpus", "error", str(host), f"{keys} {needs} a CUDA GPU: {devices.error}", change)
    if devices.torch_cuda is None:
        change = "install a torch that is built for CUDA there"
        yield Finding("gpus", "error", str(host), f"{keys} {needs} CUDA, and its torch is built without", change)
    if "triton" in devices.missing:
        yield Finding("gpus", "error", str(host), f"{keys} {needs} Triton, which is not installed there", EXTRA)


def _one_host(facts: ClusterFacts) -> Iterator[Finding]:
    addresses = {host.name: host.address for host in facts.hosts}
    if len({addresses.get(name, name) for names in facts.placed.values() for name in names}) > 1:
        planned = "; ".join(f"{role} on {', '.join(names)}" for role, names in facts.placed.items())
        change = "give attention.labels and ffn.labels a label that one host alone carries, or set handoff.kind: nccl"
        yield _link(
            "the cluster", f"handoff.kind: ipc wants all actors on one host, and they would be placed apart: {planned}", change
        )


def _nccl(config: Config, seats: Iterable[Seat]) -> Iterator[Finding]:
    found = {host.name: devices.nccl for host, devices in seats if devices.nccl is not None}
    alike = by_value(found)
    if len(alike) > 1:
        yield _link(others(alike), f"NCCL differs: {listed(alike)}", "install one torch, with its NCCL, everywhere")
    for host, devices in seats:
        if devices.nccl is None:
            if devices.torch_cuda is not None:
                yield _link(str(host), "handoff.kind: nccl needs NCCL, which is not installed there", EXTRA)
        elif config.shares_gpus and _version(devices.nccl) < NCCL_SHARES_GPU:
            least = ".".join(map(str, NCCL_SHARES_GPU))
            said = f"handoff.kind: nccl with actors that share a GPU needs NCCL {least} or later, it has {devices.nccl}"
            yield _link(str(host), said, "set handoff.kind: ipc, or num_gpus to 1")


def _version(text: str) -> tuple[int, ...]:
    """Of "2.30.4" its first two numbers."""
    return tuple(int(part) for part in text.split(".")[:2])


def _drivers(seats: Iterable[Seat]) -> Iterator[Finding]:
    found = by_value({host.name: devices.driver for host, devices in seats if devices.driver is not None})
    if len(found) > 1:
        said = f"NVIDIA's driver differs: {listed(found)}"
        yield Finding("device links", "warning", others(found), said, "install one driver everywhere, if links fail")


def _link(where: str, found: str, change: str) -> Finding:
    return Finding("device links", "error", where, found, change)
