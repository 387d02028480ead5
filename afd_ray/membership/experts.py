"""Which FFN instance holds which experts: decided from how often each expert was chosen, with copies of the most wanted."""

from collections.abc import Sequence

ExpertMap = tuple[tuple[int, ...], ...]
"""For each instance the experts that it holds, ascending. Some may be held by several instances, none twice by one."""


def contiguous_map(experts: int, instances: int) -> ExpertMap:
    """Every expert once, in nearly equal parts; without instances there is nobody to hold one.

    >>> contiguous_map(5, 2)
    ((0, 1), (2, 3, 4))
    """
    return tuple(tuple(range(i * experts // instances, (i + 1) * experts // instances)) for i in range(instances))


def initial_map(experts: int, instances: int, redundant: int) -> ExpertMap:
    """Before any load is known."""
    return place_experts([1.0] * experts, instances, redundant) if redundant else contiguous_map(experts, instances)


def place_experts(loads: Sequence[float], instances: int, redundant: int = 0) -> ExpertMap:
    """A map as even as a greedy choice makes it: `loads[e]` is how often expert e was chosen, `redundant` how many copies to add in all.

    Each added copy goes to the expert whose copies have most to do; the copies are then dealt, the busiest first, to the instance
    with the least to do. All instances hold the same number of copies, or one fewer. Equal arguments give equal maps.
    Raises ValueError naming the setting that cannot be.

    >>> place_experts([90, 10, 20, 40], instances=2, redundant=2)
    ((0, 2, 3), (0, 1, 3))
    """
    check_redundant(len(loads), instances, redundant)
    copies = _copies(loads, instances, redundant)
    total = len(loads) + redundant
    room = [total // instances + (instance < total % instances) for instance in range(instances)]
    busy = [0.0] * instances
    held: list[list[int]] = [[] for _ in range(instances)]
    # What needs several instances goes first, to those with most room: so it always finds enough of them.
    for expert in sorted(range(len(loads)), key=lambda e: (copies[e] == 1, -loads[e] / copies[e], e)):
        share = loads[expert] / copies[expert]
        first = room if copies[expert] > 1 else [room[i] > 0 for i in range(instances)]
        best = sorted(range(instances), key=lambda i: (-first[i], busy[i], i))
        for instance in best[: copies[expert]]:
            held[instance].append(expert)
            busy[instance] += share
            room[instance] -= 1
    return tuple(tuple(sorted(experts)) for experts in held)


def spread_experts(held: Sequence[Sequence[int]], experts: int) -> ExpertMap:
    """Every instance keeps what it holds; what nobody holds goes, one by one, to the instance with the fewest.

    So where copies of all are left, nothing has to be loaded.

    >>> spread_experts([(0, 1), (4, 5)], experts=6)
    ((0, 1, 2), (3, 4, 5))
    """
    kept = [sorted(set(one)) for one in held]
    found = {expert for one in kept for expert in one}
    for expert in sorted(set(range(experts)) - found):
        min(kept, key=len).append(expert)
    return tuple(tuple(sorted(one)) for one in kept)


def check_redundant(experts: int, instances: int, redundant: int) -> None:
    """Raises ValueError when there are more copies than instances that could hold them."""
    most = max(0, experts * (instances - 1))
    if redundant > most:
        raise ValueError(
            f"ffn.redundant_experts must be at most {most}, for no instance holds an expert twice"
            f" ({experts} experts, ffn.expert_parallel {instances}), got {redundant}"
        )


def _copies(loads: Sequence[float], instances: int, redundant: int) -> list[int]:
    """How many of each expert."""
    copies = [1] * len(loads)
    for _ in range(redundant):
        fewer = [expert for expert in range(len(loads)) if copies[expert] < instances]
        copies[max(fewer, key=lambda e: (loads[e] / copies[e], -copies[e], -e))] += 1
    return copies
