"""Who runs it: the Ray actors, the cluster that composes them, the ingress and the command line."""

import os
from typing import TYPE_CHECKING, Any

# OpenMP's threads wait for each other awake about 200 us and then sleep, not for its own milliseconds: where a host has fewer cores
# than threads, those would be taken from the thread that is waited for. Read when torch is loaded, which is after this.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

if TYPE_CHECKING:
    from actors.cluster import Cluster

__all__ = ["Cluster"]


def __getattr__(name: str) -> Any:
    # Imported when asked for: it brings Ray and torch, which the command line's help does without.
    if name == "Cluster":
        from actors.cluster import Cluster

        return Cluster
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
