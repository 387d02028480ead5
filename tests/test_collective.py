"""The AFD backend answers as collectives should, on every rank, for tensors larger than its rings."""

import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from ray.util.collective.backend_registry import _global_registry
from ray.util.collective.types import (
    AllReduceOptions,
    Backend,
    BroadcastOptions,
    RecvOptions,
    ReduceOp,
    ReduceOptions,
    ReduceScatterOptions,
    SendOptions,
)

from actors.collective import AFDGroup, epoch_of, register_backend
from afd_ray.handoff.mesh import LinkError

WORLD = 3
RING_BYTES = 4096
LARGE = 5000  # elements: several times the ring


def run_all(groups: list[AFDGroup], work: Callable[[AFDGroup], object]) -> list[object]:
    """What `work` returns on every member, run at once; its first exception is raised."""
    results: list[object] = [None] * len(groups)
    failures: list[BaseException] = []

    def run_one(group: AFDGroup) -> None:
        try:
            results[group.rank] = work(group)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run_one, args=(group,)) for group in groups]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return results


@pytest.fixture(scope="module", params=["shm", "tcp", "gloo"])
def groups(request: pytest.FixtureRequest) -> Iterator[list[AFDGroup]]:
    members = [AFDGroup(WORLD, rank, "afd-test-e7") for rank in range(WORLD)]
    for member in members:
        peers = {peer: RING_BYTES for peer in range(WORLD) if peer != member.rank}
        member.open(secret=b"s", host="127.0.0.1", peers=peers, kind=request.param)
    endpoints = {member.rank: member.endpoint for member in members}
    run_all(members, lambda member: member.connect(endpoints, timeout_s=10))
    yield members
    for member in members:
        member.destroy_group()


def values(rank: int) -> torch.Tensor:
    return torch.arange(LARGE, dtype=torch.float64) * 0.1 + rank


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        (ReduceOp.SUM, values(0) + values(1) + values(2)),
        (ReduceOp.PRODUCT, values(0) * values(1) * values(2)),
        (ReduceOp.MIN, values(0)),
        (ReduceOp.MAX, values(2)),
    ],
)
def test_allreduce_combines_in_rank_order(groups: list[AFDGroup], operation: ReduceOp, expected: torch.Tensor) -> None:
    def work(group: AFDGroup) -> torch.Tensor:
        tensor = values(group.rank)
        options = AllReduceOptions()
        options.reduceOp = operation
        group.allreduce([tensor], options)
        return tensor

    assert all(torch.equal(result, expected) for result in run_all(groups, work) if isinstance(result, torch.Tensor))


def test_reduce_leaves_the_others_alone(groups: list[AFDGroup]) -> None:
    def work(group: AFDGroup) -> list[float]:
        tensor = torch.full((2,), float(group.rank + 1))
        options = ReduceOptions()
        options.root_rank = 1
        group.reduce([tensor], options)
        return tensor.tolist()

    assert run_all(groups, work) == [[1.0, 1.0], [6.0, 6.0], [3.0, 3.0]]


def test_broadcast_reaches_arrays_too(groups: list[AFDGroup]) -> None:
    def work(group: AFDGroup) -> float:
        array = np.full(LARGE, group.rank, dtype=np.float32)
        options = BroadcastOptions()
        options.root_rank = 2
        group.broadcast([array], options)
        return float(array.sum())

    assert run_all(groups, work) == [2.0 * LARGE] * WORLD


def test_allgather_and_barrier(groups: list[AFDGroup]) -> None:
    def work(group: AFDGroup) -> list[list[int]]:
        gathered = [torch.zeros(2, 2, dtype=torch.int64).t() for _ in range(WORLD)]
        group.allgather([gathered], [torch.tensor([[group.rank, 1], [2, 3]])])
        group.barrier()
        return [tensor.flatten().tolist() for tensor in gathered]

    assert run_all(groups, work) == [[[rank, 1, 2, 3] for rank in range(WORLD)]] * WORLD


def test_reducescatter_gives_each_rank_its_part(groups: list[AFDGroup]) -> None:
    def work(group: AFDGroup) -> float:
        given = [torch.full((LARGE,), 10.0 * group.rank + part) for part in range(WORLD)]
        result = torch.zeros(LARGE)
        group.reducescatter([result], [given], ReduceScatterOptions())
        return float(result.mean())

    assert run_all(groups, work) == [30.0, 33.0, 36.0]


def test_send_and_recv_pair_up_by_source(groups: list[AFDGroup]) -> None:
    def work(group: AFDGroup) -> list[float]:
        if group.rank:
            options = SendOptions()
            options.dst_rank = 0
            group.isend([torch.full((3,), float(group.rank))], options)
            return []
        received = torch.zeros(2, 3)
        for source in (2, 1):
            wanted = RecvOptions()
            wanted.src_rank = source
            group.recv([received[source - 1]], wanted)
        return received[:, 0].tolist()

    assert run_all(groups, work)[0] == [1.0, 2.0]


def test_a_size_that_differs_is_named(groups: list[AFDGroup]) -> None:
    options = SendOptions()
    options.dst_rank = 0
    groups[1].send([torch.zeros(3)], options)
    wanted = RecvOptions()
    wanted.src_rank = 1
    with pytest.raises(ValueError, match="rank 1 sent a tensor of 12 bytes, rank 0 expects 16"):
        groups[0].recv([torch.zeros(4)], wanted)


def test_the_name_carries_the_epoch() -> None:
    assert [epoch_of(name) for name in ("afd-demo-e7", "afd-e2-demo", "default", "a-e1-e12")] == [7, 0, 0, 12]


def test_registering_twice_is_harmless() -> None:
    register_backend()
    register_backend()
    assert _global_registry.get("afd") is AFDGroup
    assert _global_registry.check("AFD")
    assert str(Backend("afd")) == "AFD"


def test_destroying_a_member_fails_the_others_at_once() -> None:
    members = [AFDGroup(2, rank, "afd-test-e1") for rank in range(2)]
    with pytest.raises(RuntimeError, match="group afd-test-e1 is not open"):
        members[0].barrier()
    for member in members:
        member.open(secret=b"s", host="127.0.0.1", peers={1 - member.rank: RING_BYTES})
    endpoints = {member.rank: member.endpoint for member in members}
    run_all(members, lambda member: member.connect(endpoints, timeout_s=10))
    members[1].destroy_group()
    with pytest.raises(LinkError, match="edge to rank 1"):
        members[0].barrier()
    members[0].destroy_group()
