"""Facts of this host alone, or of every host of a Ray cluster and of the links between them."""

import asyncio
import itertools
import secrets
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.controller import NAME, NAMESPACE
from actors.doctor.host import host_facts, listen_error
from actors.doctor.meetings import meet_here
from actors.doctor.witness import Witness
from actors.place import wire_dtype
from actors.roster import awaited, first_line
from afd_ray.config import Config, model_directory
from afd_ray.diagnosis.facts import ClusterFacts, HostFacts, Meeting, Silent
from afd_ray.handoff import shm
from afd_ray.handoff.capacity import inbound_bytes
from afd_ray.handoff.mesh import LinkKind
from afd_ray.membership.epochs import epoch_of
from afd_ray.membership.shape import Shape
from afd_ray.models.checkpoint import Checkpoint
from afd_ray.models.shards import CheckpointError
from placement.demand import groups, separate_nodes
from placement.groups import inventory
from placement.planner import Infeasible, plan

START_TIMEOUT_S = 60.0
ANSWER_TIMEOUT_S = 30.0
CLOCK_LOOKS = 3
AT_ONCE = 32
"""Links tried at a time."""
HEAD = "node:__internal_head__"


class Host(NamedTuple):
    """A node of the cluster, and our actor there."""

    node_id: str
    name: str
    address: str
    labels: dict[str, str]
    is_head: bool
    witness: Any


def examine_here(config: Config, address: str) -> ClusterFacts:
    """This host alone, without Ray; `address`: the one that others know it by."""
    facts = host_facts(config, address)
    return ClusterFacts(
        hosts=(replace(facts, labels=None),),
        meetings=tuple(Meeting(facts.name, facts.name, kind, meet_here(kind, address)) for kind in _kinds(config, within=True)),
        shm_needed_bytes=shared_bytes(config, hosts=1),
        port_error=listen_error(config.server.host, config.server.port),
    )


async def examine_cluster(config: Config) -> ClusterFacts:
    """Every live node of the Ray cluster that this process is connected to."""
    hosts = _hosts(config)
    try:
        seen = await asyncio.gather(*(_facts(host) for host in hosts))
        answering = [host for host, facts in zip(hosts, seen, strict=True) if isinstance(facts, HostFacts)]
        serving = _is_serving()
        placed, placement_error = ({}, None) if serving else _placement(config, hosts)
        return ClusterFacts(
            hosts=tuple(facts for facts in seen if isinstance(facts, HostFacts)),
            silent=tuple(facts for facts in seen if isinstance(facts, Silent)),
            meetings=tuple(await _meet_all(config, answering)),
            shm_needed_bytes=0 if serving else shared_bytes(config, len(answering)),
            port_error=None if serving else await _port_error(config, answering),
            placement_error=placement_error,
            placed=placed,
        )
    finally:
        for host in hosts:
            ray.kill(host.witness)


def shared_bytes(config: Config, hosts: int) -> int:
    """What the members of an epoch, and of the next one beside it, share on each of so many hosts; 0 where that is not known."""
    if config.handoff.kind in ("tcp", "gloo") or not shm.supported():
        return 0
    try:
        model = Checkpoint.open(model_directory(config.model)).config
    except (CheckpointError, ValueError, OSError):
        return 0
    epoch, wire = epoch_of(config, model, Shape.of(config), 1), wire_dtype(config, model)
    rows = config.pipeline.max_tokens_per_micro_batch
    segments = [
        sum(inbound_bytes(epoch, rank, peer, model, wire, rows) for peer in epoch.peers(rank)) for rank in range(epoch.world_size)
    ]
    return 2 * max(*segments, sum(segments) // max(1, hosts))


def _hosts(config: Config) -> list[Host]:
    nodes = [node for node in ray.nodes() if node["Alive"]]
    names = Counter(node["NodeManagerHostname"] for node in nodes)
    hosts = []
    for node in nodes:
        name, address = node["NodeManagerHostname"], node["NodeManagerAddress"]
        strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        options = {"num_cpus": 0, "max_concurrency": 2 * AT_ONCE, "scheduling_strategy": strategy}
        witness = ray.remote(Witness).options(**options).remote(config, address)
        unique = name if names[name] == 1 else f"{name}/{node['NodeID'][:8]}"
        hosts.append(Host(node["NodeID"], unique, address, dict(node["Labels"] or {}), HEAD in node["Resources"], witness))
    return hosts


async def _facts(host: Host) -> HostFacts | Silent:
    try:
        facts: HostFacts = await asyncio.wait_for(awaited(host.witness.facts.remote()), START_TIMEOUT_S)
        ahead_s, doubt_s = await _clock(host)
    except TimeoutError:
        return Silent(host.name, host.address, f"nothing in {START_TIMEOUT_S:g} s")
    except ray.exceptions.RayError as error:
        return Silent(host.name, host.address, first_line(error))
    return replace(facts, name=host.name, labels=host.labels, clock_ahead_s=ahead_s, clock_doubt_s=doubt_s)


async def _clock(host: Host) -> tuple[float, float]:
    """How far its clock is ahead of this one, and the doubt: half the shortest round trip."""
    looks = []
    for _ in range(CLOCK_LOOKS):
        asked_s = time.time()
        theirs_s = await asyncio.wait_for(awaited(host.witness.clock.remote()), ANSWER_TIMEOUT_S)
        doubt_s = (time.time() - asked_s) / 2
        looks.append((doubt_s, theirs_s - asked_s - doubt_s))
    doubt_s, ahead_s = min(looks)
    return ahead_s, doubt_s


async def _meet_all(config: Config, hosts: list[Host]) -> list[Meeting]:
    """Every pair of hosts, and each host with itself, by every kind of link that the configuration may choose."""
    wanted = [(host, host, kind) for host in hosts for kind in _kinds(config, within=True)]
    wanted += [(*pair, kind) for pair in itertools.combinations(hosts, 2) for kind in _kinds(config, within=False)]
    room = asyncio.Semaphore(AT_ONCE)

    async def one(number: int, first: Host, second: Host, kind: LinkKind) -> Meeting:
        async with room:
            return await _meet(number, first, second, kind)

    return list(await asyncio.gather(*(one(number, *each) for number, each in enumerate(wanted))))


def _kinds(config: Config, *, within: bool) -> list[LinkKind]:
    """Those that links within one host, or between two, may be of."""
    kind = config.handoff.kind
    if kind == "auto" or kind == "ipc" or kind == "nccl":  # headers of rows between devices
        return ["shm"] if within and shm.supported() else ["tcp"]
    return [kind]


async def _meet(number: int, first: Host, second: Host, kind: LinkKind) -> Meeting:
    sides = (first.witness, second.witness)
    secret = secrets.token_bytes(32)
    try:
        endpoints = await _both(side.open.remote(number, rank, kind, secret) for rank, side in enumerate(sides))
        errors = await _both(side.meet.remote(number, rank, endpoints[1 - rank]) for rank, side in enumerate(sides))
    except TimeoutError:
        errors = [f"no answer in {ANSWER_TIMEOUT_S:g} s"]
    except ray.exceptions.RayError as error:
        errors = [first_line(error)]
    finally:
        for rank, side in enumerate(sides):
            side.leave.remote(number, rank)
    return Meeting(first.name, second.name, kind, next((error for error in errors if error is not None), None))


async def _both(calls: Iterable[Any]) -> list[Any]:
    return list(await asyncio.wait_for(asyncio.gather(*map(awaited, calls)), ANSWER_TIMEOUT_S))


def _is_serving() -> bool:
    """Whether a server of ours runs there: its actors have the room, and its ingress the port."""
    try:
        ray.get_actor(NAME, namespace=NAMESPACE)
    except ValueError:
        return False
    return True


async def _port_error(config: Config, hosts: list[Host]) -> str | None:
    """On the head: that is where the ingress listens."""
    head = next((host for host in hosts if host.is_head), None)
    if head is None:
        return None
    asked = head.witness.port_error.remote(config.server.host, config.server.port)
    error: str | None = await asyncio.wait_for(awaited(asked), ANSWER_TIMEOUT_S)
    return error


def _placement(config: Config, hosts: list[Host]) -> tuple[dict[str, tuple[str, ...]], str | None]:
    """By role the names of the hosts that its actors would be placed on, or why they have no room."""
    try:
        planned = plan(groups(config), inventory(), separate_nodes(config), config.placement.topology_label)
    except Infeasible as error:
        return {}, str(error)
    names = {host.node_id: host.name for host in hosts}
    placed: dict[str, dict[str, None]] = {}
    for group, node_id in planned:
        placed.setdefault(group.role, {})[names.get(node_id, node_id)] = None
    return {role: tuple(chosen) for role, chosen in placed.items()}, None
