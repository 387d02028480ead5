"""Room for groups: nodes that join in time count, and Ray's autoscaler is asked for them only while they are missing."""

import itertools
from collections.abc import Sequence
from functools import partial

import pytest

from placement import room
from placement.planner import Group, Infeasible, Node, plan
from placement.room import find_room

FFN = frozenset({("pool", "ffn")})
GROUPS = [Group("attention", 1, 1.0), Group("ffn", 2, 1.0, labels=FFN)]
FIRST, SECOND = Node("a", 4), Node("f", 4, labels=FFN)
LONG_S = 60.0


class Cluster:
    """Each look finds what the next of `nodes` says; the last one for good."""

    def __init__(self, *nodes: list[Node]) -> None:
        self.nodes = list(nodes)
        self.asked: list[Sequence[Group]] = []
        self.lacks: list[str] = []
        self.clock = partial(next, itertools.count())
        """A second later at each look."""

    def look(self) -> list[Node]:
        return self.nodes.pop(0) if len(self.nodes) > 1 else self.nodes[0]

    async def find(self, wait_s: float) -> list[str]:
        place = partial(plan, GROUPS, separate_nodes="auto")
        placed = await find_room(
            GROUPS, place, wait_s, on_lack=self.lacks.append, look=self.look, ask=self.asked.append, clock=self.clock
        )
        return [one.node_id for one in placed]


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "POLL_S", 0.0)


async def test_where_there_is_room_nobody_is_asked() -> None:
    cluster = Cluster([FIRST, SECOND])
    assert await cluster.find(LONG_S) == ["a", "f"]
    assert (cluster.asked, cluster.lacks) == ([], [])


async def test_a_node_that_joins_in_time_is_used_and_the_demand_taken_back() -> None:
    cluster = Cluster([FIRST], [FIRST], [FIRST, SECOND])
    assert await cluster.find(LONG_S) == ["a", "f"]
    assert cluster.asked == [GROUPS, []]
    assert cluster.lacks == ["no node carries the labels pool=ffn that ffn.labels asks for"]


async def test_what_is_missing_is_told_anew_when_it_is_something_else() -> None:
    cluster = Cluster([], [FIRST], [FIRST, SECOND])
    await cluster.find(LONG_S)
    assert cluster.lacks == ["the cluster has no live node", "no node carries the labels pool=ffn that ffn.labels asks for"]


async def test_without_time_to_wait_it_fails_at_once() -> None:
    cluster = Cluster([FIRST])
    with pytest.raises(Infeasible, match=r"asks for$"):
        await cluster.find(0.0)
    assert cluster.asked == []


async def test_after_the_deadline_it_says_what_never_came() -> None:
    cluster = Cluster([FIRST])
    with pytest.raises(Infeasible, match=r"labels pool=ffn .*, and no node that would help came in 2.5 s"):
        await cluster.find(2.5)
    assert cluster.asked == [GROUPS, []]
