"""Who takes which rank of a coming epoch."""

import pytest

from afd_ray.membership.events import Roster
from afd_ray.membership.shape import Shape
from afd_ray.membership.staffing import Living, recovery, seat_attention, staff


def shape(attention: int, tensor_parallel: int, expert_parallel: int) -> Shape:
    return Shape(attention, tensor_parallel, expert_parallel, None)


def roster(shape: Shape) -> Roster:
    attention = tuple(f"a{i}" for i in range(shape.attention))
    return Roster(1, shape, attention, tuple(f"f{i}" for i in range(shape.ffn)))


def test_attention_members_stay_at_the_lowest_ranks() -> None:
    assert seat_attention(2, ["a0", "a2", "a3"]) == ("a0", "a2")
    assert seat_attention(3, ["a2"]) == ("a2", None, None)


@pytest.mark.parametrize(
    ("before", "after", "places"),
    [
        (shape(1, 1, 2), shape(1, 1, 3), "f0 - f1"),  # each keeps two thirds of what it holds
        (shape(1, 1, 3), shape(1, 1, 2), "f0 f2"),
        (shape(1, 1, 2), shape(1, 1, 1), "f0"),
        (shape(1, 1, 2), shape(1, 1, 4), "f0 - f1 -"),
        (shape(1, 1, 1), shape(1, 2, 1), "f0 -"),
        (shape(1, 2, 2), shape(1, 2, 3), "f0 f1 - - f2 f3"),
        (shape(1, 2, 1), shape(1, 1, 2), "f0 f1"),
        (shape(1, 1, 2), shape(1, 2, 1), "f0 f1"),
        (shape(1, 2, 2), shape(1, 4, 1), "f0 f2 f1 f3"),
        (shape(1, 1, 0), shape(2, 1, 0), ""),
    ],
)
def test_ffn_members_go_where_most_of_what_they_hold_is_needed(before: Shape, after: Shape, places: str) -> None:
    base = roster(before)
    found = staff(after, base, Living(base.members)).ffn
    assert " ".join(place or "-" for place in found) == places


def test_the_dead_have_no_rank_and_spares_have_those_left_over() -> None:
    base = roster(shape(3, 1, 3))
    found = staff(base.shape, base, Living({"a0", "a2", "f0", "f2"}, ["a7"], ["f8"]))
    assert found.attention == ("a0", "a2", "a7")
    assert found.ffn == ("f0", "f8", "f2")


@pytest.mark.parametrize(
    ("base", "living", "expected", "places"),
    [
        (shape(2, 1, 2), "a1 f0 f1", shape(1, 1, 2), "a1 f0 f1"),
        (shape(1, 2, 3), "a0 f0 f1 f2 f4 f5", shape(1, 2, 2), "a0 f0 f1 f4 f5"),
        (shape(1, 2, 3), "a0 f0 f2 f4 f5", shape(1, 2, 2), "a0 f4 f5 f0 f2"),
        (shape(1, 4, 1), "a0 f1 f3", shape(1, 2, 1), "a0 f1 f3"),
        (shape(1, 2, 1), "a0", shape(1, 2, 1), "a0 - -"),
        (shape(2, 1, 2), "f1", shape(2, 1, 1), "- - f1"),
        (shape(3, 1, 0), "a2", shape(1, 1, 0), "a2"),
    ],
)
def test_what_lives_serves_without_waiting(base: Shape, living: str, expected: Shape, places: str) -> None:
    found = recovery(roster(base), base, Living(living.split()))
    assert found.shape == expected
    assert " ".join(place or "-" for place in (*found.attention, *found.ffn)) == places


@pytest.mark.parametrize(
    ("living", "places"),
    [
        (Living({"a0", "f0"}, ["a5", "a6"], ["f7"], {"a5", "f7"}), "a0 a6 f0"),  # a6 has loaded, nobody beside f0 has
        (Living({"f0", "f1"}, ["a5", "a6"], [], {"a5"}), "a6 f0 f1"),
        (Living({"a0"}, ["a5"], ["f7", "f8"], {"a5", "f7", "f8"}), "a0 f7 f8"),  # without them nobody serves
        (Living({"f0", "f1"}, ["a5"], [], {"a5"}), "a5 f0 f1"),
    ],
)
def test_a_recovery_waits_for_no_spare_to_load_where_others_serve(living: Living, places: str) -> None:
    base = roster(shape(2, 2, 1))
    found = recovery(base, base.shape, living)
    assert " ".join(place or "-" for place in (*found.attention, *found.ffn)) == places


def test_spares_serve_in_a_recovery_as_far_as_they_are_wanted() -> None:
    base = roster(shape(2, 2, 1))
    found = recovery(base, shape(2, 2, 1), Living({"a0", "f0"}, ["a5", "a6"], ["f7"]))
    assert (found.attention, found.ffn) == (("a0", "a5"), ("f0", "f7"))
