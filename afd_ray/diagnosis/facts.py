"""What `afd-ray doctor` knows of a cluster; values alone, so that what follows from them can be tested without any host."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class HostFacts:
    """One host, as a process on it sees it."""

    name: str
    address: str
    versions: Mapping[str, str]
    """Of the interpreter and of packages; `code`: a digest of this project's own files."""
    unmet: tuple[str, ...]
    """Requirements of this project that the host does not meet, as "torch>=2.11,<2.14, got 2.9.0"."""
    clock_ahead_s: float
    """Of the clock of whoever asks."""
    clock_doubt_s: float
    """How far that may be off."""
    shm_total_bytes: int
    shm_free_bytes: int
    open_files: int
    """How many a process may have open."""
    listen_error: str | None
    """Why nothing can listen on its address."""
    model: str | None
    """Digest of the checkpoint as this host sees it."""
    model_error: str | None
    token: bool
    """Whether Ray asks for a token there."""
    labels: Mapping[str, str] | None = field(default_factory=dict)
    """None: Ray gives them when it starts there, and they may be any."""

    def __str__(self) -> str:
        return f"{self.name} ({self.address})"


@dataclass(frozen=True, slots=True)
class Silent:
    """A host on which no process of ours came up."""

    name: str
    address: str
    reason: str


@dataclass(frozen=True, slots=True)
class Meeting:
    """A hand-off link tried between two hosts, or within one."""

    first: str
    second: str
    kind: str
    error: str | None


@dataclass(frozen=True, slots=True)
class ClusterFacts:
    """Every host, every pair of them, and the cluster as a whole."""

    hosts: tuple[HostFacts, ...]
    silent: tuple[Silent, ...] = ()
    meetings: tuple[Meeting, ...] = ()
    shm_needed_bytes: int = 0
    """What the members of an epoch and of its successor share on one host."""
    port_error: str | None = None
    """Why the ingress could not listen."""
    placement_error: str | None = None
    """Why the configured actors have no room."""
