"""Who runs it: the Ray actors, the cluster that composes them, the ingress and the command line."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from actors.cluster import Cluster

__all__ = ["Cluster"]


def __getattr__(name: str) -> Any:
    # Imported when asked for: it brings Ray and torch, which the command line's help does without.
    if name == "Cluster":
        from actors.cluster import Cluster

        return Cluster
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
