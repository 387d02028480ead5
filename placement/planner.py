"""From configuration and inventory to which node holds which actor, as a pure function."""

from collections.abc import Collection, Sequence
from itertools import combinations
from typing import Literal, NamedTuple

Role = Literal["attention", "ffn"]
Strategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]
MAX_NODES_TO_ENUMERATE = 12


class Node(NamedTuple):
    """What one Ray node has free."""

    id: str
    cpus: float
    gpus: float = 0.0
    labels: frozenset[tuple[str, str]] = frozenset()


class Group(NamedTuple):
    """What one placement group must hold, all of it on one node: an attention actor, or the ranks of an FFN instance."""

    role: Role
    actors: int
    num_cpus: float
    num_gpus: float = 0.0
    labels: frozenset[tuple[str, str]] = frozenset()
    strategy: Strategy = "PACK"
    """How the groups of this role share their nodes."""

    @property
    def cpus(self) -> float:
        return self.actors * self.num_cpus

    @property
    def gpus(self) -> float:
        return self.actors * self.num_gpus


class Placed(NamedTuple):
    """A group and the node that it goes to."""

    group: Group
    node_id: str


class Infeasible(ValueError):
    """The groups do not fit; the message is one line and says what is missing."""


def plan(
    groups: Sequence[Group],
    nodes: Sequence[Node],
    separate_nodes: bool | Literal["auto"],
    topology: str | None = None,
    beside: Collection[str] = (),
) -> list[Placed]:
    """A node for each group, in the order of `groups`.

    Groups of a role go where their strategy says. With `separate_nodes` "auto" the roles share a node only when the cluster has a
    single one, or when they fit no other way; True refuses instead. `topology` is a label, such as the switch of a node, of which all
    groups have one value where they fit so: if they can that of the nodes in `beside`, which hold their peers. Raises Infeasible.
    """
    if not nodes:
        raise Infeasible("the cluster has no live node")
    near = [*_domains(nodes, topology, beside), nodes]
    if separate_nodes is not False:
        apart = next(filter(None, (_apart(groups, domain) for domain in near)), None)
        if apart is not None:
            return apart
    if separate_nodes is True:
        raise Infeasible(_why_not_apart(groups, nodes))
    together = next(filter(None, (_assign(groups, domain, domain) for domain in near)), None)
    if together is None:
        raise Infeasible(_shortage(groups, nodes))
    return together


def _domains(nodes: Sequence[Node], topology: str | None, beside: Collection[str]) -> list[list[Node]]:
    """The nodes of each value of the label `topology`: most peers first, then most CPUs; none of nodes without it."""
    if topology is None:
        return []
    by_value: dict[str, list[Node]] = {}
    for node in nodes:
        value = dict(node.labels).get(topology)
        if value is not None:
            by_value.setdefault(value, []).append(node)
    peers = {value: sum(node.id in beside for node in domain) for value, domain in by_value.items()}
    order = sorted(by_value, key=lambda value: (-peers[value], -sum(node.cpus for node in by_value[value]), value))
    return [by_value[value] for value in order]


def _apart(groups: Sequence[Group], nodes: Sequence[Node]) -> list[Placed] | None:
    for ffn_nodes in _ffn_sides(nodes):
        attention_nodes = [node for node in nodes if node not in ffn_nodes]
        placed = _assign(groups, attention_nodes, ffn_nodes)
        if placed is not None:
            return placed
    return None


def _ffn_sides(nodes: Sequence[Node]) -> list[list[Node]]:
    """Which nodes could be the FFN side, fewest first; for large clusters, suffixes of the list alone."""
    sizes = range(1, len(nodes))
    if len(nodes) > MAX_NODES_TO_ENUMERATE:
        return [list(nodes[-size:]) for size in sizes]
    return [list(side) for size in sizes for side in combinations(reversed(nodes), size)]


def _assign(groups: Sequence[Group], attention_nodes: Sequence[Node], ffn_nodes: Sequence[Node]) -> list[Placed] | None:
    free = {node.id: [node.cpus, node.gpus] for node in (*attention_nodes, *ffn_nodes)}
    placed: list[Placed] = []
    for group in groups:
        side = attention_nodes if group.role == "attention" else ffn_nodes
        taken = [p.node_id for p in placed if p.group.role == group.role]
        node = _choose(group.strategy, [n for n in side if _fits(group, n, free[n.id])], taken)
        if node is None:
            return None
        free[node.id][0] -= group.cpus
        free[node.id][1] -= group.gpus
        placed.append(Placed(group, node.id))
    return placed


def _choose(strategy: Strategy, fitting: Sequence[Node], taken: Sequence[str]) -> Node | None:
    """One of the fitting nodes, given the nodes of the groups already placed."""
    if strategy == "STRICT_PACK" and taken:
        fitting = [node for node in fitting if node.id == taken[0]]
    if strategy == "STRICT_SPREAD":
        fitting = [node for node in fitting if node.id not in taken]
    if not fitting:
        return None
    return (min if strategy.endswith("SPREAD") else max)(fitting, key=lambda node: taken.count(node.id))


def _fits(group: Group, node: Node, free: list[float]) -> bool:
    return group.labels <= node.labels and group.cpus <= free[0] + 1e-9 and group.gpus <= free[1] + 1e-9


def _why_not_apart(groups: Sequence[Group], nodes: Sequence[Node]) -> str:
    if len(nodes) == 1:
        return "placement.separate_nodes is true, but the cluster has a single node: attention and FFN need one each"
    return f"placement.separate_nodes is true, but no split of {len(nodes)} nodes fits: {_shortage(groups, nodes)}"


def _shortage(groups: Sequence[Group], nodes: Sequence[Node]) -> str:
    for group in groups:
        if not any(group.labels <= node.labels for node in nodes):
            wanted = ", ".join(f"{key}={value}" for key, value in sorted(group.labels))
            return f"no node carries the labels {wanted} that {group.role}.labels asks for"
    needed = ", ".join(_demand(role, groups) for role in ("attention", "ffn") if any(g.role == role for g in groups))
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    free = f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs" if any(g.num_gpus for g in groups) else "")
    return f"needed: {needed}; free: {free} on {len(nodes)} node{'s' if len(nodes) > 1 else ''}"


def _demand(role: str, groups: Sequence[Group]) -> str:
    mine = [group for group in groups if group.role == role]
    gpus = sum(group.gpus for group in mine)
    return (
        f"{role} {sum(group.cpus for group in mine):g} CPUs"
        + (f" and {gpus:g} GPUs" if gpus else "")
        + f" in {len(mine)} group(s)"
    )
