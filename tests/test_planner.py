"""Placement: which node holds which group."""

import pytest

from placement.planner import Group, Infeasible, Node, plan

A = Group("attention", 1, 1.0, strategy="SPREAD")
F2 = Group("ffn", 2, 1.0, strategy="PACK")


def nodes_of(groups: list[Group], nodes: list[Node], separate: bool | str = "auto") -> list[str]:
    return [placed.node_id for placed in plan(groups, nodes, separate)]  # type: ignore[arg-type]


def test_roles_go_to_different_nodes_whenever_there_are_two() -> None:
    assert nodes_of([A, A, F2], [Node("a", 4), Node("b", 4)]) == ["a", "a", "b"]


def test_one_node_holds_both_roles() -> None:
    assert nodes_of([A, F2], [Node("a", 3)]) == ["a", "a"]


def test_auto_shares_nodes_when_they_fit_no_other_way() -> None:
    assert set(nodes_of([A, A, A, F2], [Node("a", 4), Node("b", 1)])) == {"a", "b"}


def test_separate_nodes_true_refuses_a_single_node_and_a_misfit() -> None:
    with pytest.raises(Infeasible, match="single node"):
        nodes_of([A, F2], [Node("a", 8)], separate=True)
    with pytest.raises(
        Infeasible, match=r"needed: attention 3 CPUs in 3 group\(s\), ffn 2 CPUs in 1 group\(s\); free: 5 CPUs on 2 nodes"
    ):
        nodes_of([A, A, A, F2], [Node("a", 4), Node("b", 1)], separate=True)


def test_attention_spreads_and_ffn_packs() -> None:
    nodes = [Node(name, 8) for name in "abcd"]
    placed = nodes_of([A, A, A, F2, F2], nodes)
    assert len(set(placed[:3])) == 3
    assert len(set(placed[3:])) == 1
    assert not set(placed[:3]) & set(placed[3:])


def test_labels_choose_the_nodes_and_a_missing_one_is_named() -> None:
    gpu = frozenset({("accelerator", "H20")})
    labelled = A._replace(labels=gpu)
    assert nodes_of([labelled, F2], [Node("a", 8), Node("b", 8, labels=gpu)]) == ["b", "a"]
    with pytest.raises(Infeasible, match=r"no node carries the labels accelerator=H20 that attention.labels asks for"):
        nodes_of([labelled, F2], [Node("a", 8), Node("b", 8)])


def test_too_few_cpus_says_what_is_needed_and_free() -> None:
    with pytest.raises(
        Infeasible, match=r"needed: attention 1 CPUs in 1 group\(s\), ffn 2 CPUs in 1 group\(s\); free: 2 CPUs on 1 node"
    ):
        nodes_of([A, F2], [Node("a", 2)])


def test_strict_strategies() -> None:
    strict = A._replace(strategy="STRICT_SPREAD")
    assert len(set(nodes_of([strict, strict], [Node("a", 8), Node("b", 8)], separate=False))) == 2
    with pytest.raises(Infeasible):
        nodes_of([strict, strict, strict], [Node("a", 8), Node("b", 8)], separate=False)
    packed = A._replace(strategy="STRICT_PACK")
    with pytest.raises(Infeasible):
        nodes_of([packed, packed], [Node("a", 1), Node("b", 1)], separate=False)


def racked(name: str, rack: str | None, cpus: float = 8) -> Node:
    return Node(name, cpus, labels=frozenset({("rack", rack)} if rack else ()))


def near(nodes: list[Node], beside: tuple[str, ...] = ()) -> list[str]:
    return [placed.node_id for placed in plan([A, A, F2], nodes, "auto", "rack", beside)]


def test_all_actors_go_into_one_rack_where_they_fit() -> None:
    nodes = [racked("a", "1"), racked("b", "2"), racked("c", "2"), racked("d", "1", 2)]
    assert set(near(nodes)) == {"b", "c"}


def test_a_rack_that_is_too_small_is_left_for_several() -> None:
    nodes = [racked("a", "1", 2), racked("b", "2", 2), racked("c", None, 1)]
    assert {"a", "b"} <= set(near(nodes))


def test_newcomers_go_to_the_rack_of_their_peers() -> None:
    nodes = [racked("a", "1"), racked("b", "1"), racked("c", "2"), racked("d", "2"), racked("e", "2")]
    assert set(near(nodes, beside=("a",))) == {"a", "b"}


def test_roles_on_nodes_of_their_own_go_before_one_rack() -> None:
    assert len(set(near([racked("a", "1"), racked("b", "2")]))) == 2


def test_of_nodes_without_the_label_any_will_do() -> None:
    assert len(near([racked("a", None), racked("b", None)])) == 3
