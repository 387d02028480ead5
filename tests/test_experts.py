"""Which instance holds which experts: everything once at least, nothing twice, the load spread."""

import random

import pytest

from afd_ray.membership.experts import ExpertMap, contiguous_map, initial_map, place_experts, spread_experts


def loads_of(seed: int, experts: int) -> list[float]:
    """A few experts are wanted much more than the others."""
    rng = random.Random(seed)
    return [rng.paretovariate(1.2) for _ in range(experts)]


def busy(placed: ExpertMap, loads: list[float]) -> list[float]:
    """What each instance has to do when the copies of an expert share its load."""
    copies = [sum(expert in held for held in placed) for expert in range(len(loads))]
    return [sum(loads[expert] / copies[expert] for expert in held) for held in placed]


@pytest.mark.parametrize("seed", range(20))
def test_every_expert_is_held_and_none_twice_by_an_instance(seed: int) -> None:
    rng = random.Random(seed)
    instances = rng.randint(1, 6)
    experts = rng.randint(instances, 24)
    redundant = rng.randint(0, experts * (instances - 1))
    placed = place_experts(loads_of(seed, experts), instances, redundant)
    assert {expert for held in placed for expert in held} == set(range(experts))
    assert all(len(set(held)) == len(held) for held in placed)
    assert sum(map(len, placed)) == experts + redundant
    assert max(map(len, placed)) - min(map(len, placed)) <= 1


@pytest.mark.parametrize("seed", range(20))
def test_no_instance_has_much_more_to_do_than_it_must(seed: int) -> None:
    loads = loads_of(seed, 32)
    placed = place_experts(loads, 4, 4)
    assert max(busy(placed, loads)) <= 1.25 * max(busy(contiguous_map(32, 4), loads))
    shares = [max(loads) / sum(max(loads) in [loads[e] for e in held] for held in placed), sum(loads) / 4]
    assert max(busy(placed, loads)) <= 1.25 * max(shares)


def test_the_most_wanted_get_the_copies() -> None:
    placed = place_experts([1, 1, 50, 1, 20, 1], 3, 3)
    assert [sum(expert in held for held in placed) for expert in range(6)] == [1, 1, 3, 1, 2, 1]


def test_as_many_copies_as_instances_of_each_is_everything_everywhere() -> None:
    assert place_experts(loads_of(1, 5), 3, 10) == ((0, 1, 2, 3, 4),) * 3


def test_equal_loads_give_equal_maps() -> None:
    assert place_experts(loads_of(2, 20), 4, 6) == place_experts(loads_of(2, 20), 4, 6)


def test_without_loads_the_parts_are_contiguous_and_copies_are_spread() -> None:
    assert initial_map(6, 3, 0) == ((0, 1), (2, 3), (4, 5))
    assert sorted(map(len, initial_map(6, 3, 2))) == [2, 3, 3]


def test_more_copies_than_instances_can_hold_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"ffn\.redundant_experts must be at most 8, .* \(8 experts, ffn\.expert_parallel 2\), got 9"
    ):
        place_experts([1.0] * 8, 2, 9)


def test_what_a_lost_instance_held_is_spread_and_nothing_else_moves() -> None:
    assert spread_experts([(0, 1), (4, 5)], experts=6) == ((0, 1, 2), (3, 4, 5))
    assert spread_experts([(0, 1, 2), (2, 3, 0)], experts=4) == ((0, 1, 2), (0, 2, 3)), "copies of all are left"
    assert spread_experts([(), (0, 3)], experts=4) == ((1, 2), (0, 3))
