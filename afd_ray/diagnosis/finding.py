"""One thing that is wrong, and how what differs between hosts is told."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Literal, NamedTuple

Check = Literal[
    "start",
    "versions",
    "addresses",
    "ports",
    "clock",
    "shared memory",
    "open files",
    "token",
    "labels",
    "room",
    "gpus",
    "device links",
    "reachability",
    "model",
    "access",
]
Severity = Literal["error", "warning"]


class Finding(NamedTuple):
    """`error`: a cluster will not come up, or not be safe; `warning`: it will, and something will not be as it should."""

    check: Check
    severity: Severity
    where: str
    found: str
    change: str


def by_value(values: Mapping[str, str]) -> dict[str, list[str]]:
    """Which hosts have each value, the most common one first."""
    found: dict[str, list[str]] = defaultdict(list)
    for host, value in values.items():
        found[value].append(host)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def listed(found: Mapping[str, list[str]]) -> str:
    return "; ".join(f"{value} on {', '.join(names)}" for value, names in found.items())


def others(found: Mapping[str, list[str]]) -> str:
    """The hosts whose value is not the most common one."""
    return ", ".join(name for names in list(found.values())[1:] for name in names)
