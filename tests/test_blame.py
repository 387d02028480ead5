"""Whom to give up when edges do not connect."""

from afd_ray.membership.blame import victims

ATTENTION = {"a", "b", "c"}


def test_the_member_at_most_failed_edges_goes() -> None:
    assert victims([("a", "f"), ("b", "f"), ("f", "a")], {}, ATTENTION) == ["f"]


def test_of_two_ends_it_is_the_one_that_failed_before_then_attention() -> None:
    assert victims([("a", "f"), ("f", "a")], {}, ATTENTION) == ["a"]
    assert victims([("a", "f"), ("f", "a")], {"a": 1, "f": 2}, ATTENTION) == ["f"]


def test_separate_edges_each_cost_a_member() -> None:
    assert sorted(victims([("a", "f"), ("b", "g")], {}, ATTENTION)) == ["a", "b"]


def test_who_names_nobody_goes_only_where_nobody_is_named_and_alone() -> None:
    assert victims([("a", "a"), ("c", "c"), ("b", "f")], {"f": 1}, ATTENTION) == ["f"]
    assert victims([("f", "f")], {}, ATTENTION) == ["f"]
    assert victims([("a", "a"), ("f", "f")], {}, ATTENTION) == ["a"]
