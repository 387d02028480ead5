"""What `afd-ray doctor` knows of a cluster; values alone, so that what follows from them can be tested without any host."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What a host has for actors on GPUs."""

    gpus: int
    error: str | None
    """Why there are none."""
    driver: str | None
    """Version of NVIDIA's."""
    torch_cuda: str | None
    """The CUDA that torch is built for; None: it has none."""
    nccl: str | None
    """Version that torch has loaded, as "2.27.5"."""
    missing: frozenset[str]
    """Modules that GPUs, or links between them, may need, and that are not installed."""


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
    devices: DeviceFacts | None = None
    """None: no actor is to have a GPU."""

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
    placed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By role the hosts that its actors would be placed on; empty where that is not known."""
