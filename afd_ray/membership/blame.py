"""Whom to give up when edges of a coming epoch do not connect though everybody lives."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping

Edge = tuple[str, str]
"""Both ends; twice the same: the member could not name the other one."""


def victims(edges: Iterable[Edge], suspicion: Mapping[str, int], attention: Collection[str]) -> list[str]:
    """As few members as a greedy choice finds, so that of these edges (one at least) none is left between two of the others.

    The one at most failed edges goes first, then the one that was at failed edges before, then an attention member: it takes no
    experts with it. Who names nobody is at most one of many that wait for the same member, so only where nobody is named one of those goes.

    >>> victims([("a", "f"), ("b", "f"), ("f", "a")], {}, {"a", "b"})
    ['f']
    >>> victims([("a", "a"), ("b", "f")], {"f": 1}, {"a", "b"})
    ['f']
    """
    named = {frozenset(edge) for edge in edges}
    left = {edge for edge in named if len(edge) > 1}
    chosen: list[str] = []
    while left or not chosen:
        degree = Counter(member for edge in left or named for member in edge)
        worst = max(sorted(degree), key=lambda member: (degree[member], suspicion.get(member, 0), member in attention))
        chosen.append(worst)
        left = {edge for edge in left if worst not in edge}
    return chosen
