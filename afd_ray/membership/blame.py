"""Whom to give up when edges of a coming epoch do not connect though everybody lives."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping

Edge = tuple[str, str]
"""Both ends; twice the same: the member blames itself."""


def victims(edges: Iterable[Edge], suspicion: Mapping[str, int], attention: Collection[str]) -> list[str]:
    """As few members as a greedy choice finds, so that no failed edge is left.

    The one at most failed edges goes first, then the one that was at failed edges before, then an attention member: it takes no
    experts with it.

    >>> victims([("a", "f"), ("b", "f"), ("f", "a")], {}, {"a", "b"})
    ['f']
    """
    left = {frozenset(edge) for edge in edges}
    chosen: list[str] = []
    while left:
        degree = Counter(member for edge in left for member in edge)
        alone = [member for edge in left if len(edge) == 1 for member in edge]
        worst = max(sorted(alone or degree), key=lambda member: (degree[member], suspicion.get(member, 0), member in attention))
        chosen.append(worst)
        left = {edge for edge in left if worst not in edge}
    return chosen
