"""What a member brings to its group."""

from dataclasses import dataclass
from typing import Literal

LinkKind = Literal["auto", "shm", "tcp", "gloo"]
DeviceLinkKind = Literal["ipc", "nccl"]
"""Of links between devices; their headers take links of the kind `auto`."""
NCCL_SHARES_GPU = (2, 30)
"""NCCL's version from which two ranks may be on one GPU."""
LINK_KINDS: tuple[LinkKind, ...] = ("auto", "shm", "tcp", "gloo")

_REACH_SHARE = 0.5
"""Of the silence after which a peer is taken to be out of reach."""
_LEAST_REACH_S = 1.0
"""A few packets may be lost."""


@dataclass(frozen=True, slots=True)
class Terms:
    """Of one member, for one epoch."""

    rank: int
    epoch: int
    digest: int
    secret: bytes
    host: str
    kind: LinkKind
    send_timeout_s: float
    silence_s: float | None
    """After which a peer on another host is taken to be out of reach; None: never."""

    @property
    def reach_s(self) -> float | None:
        """How long the kernel of a peer that is dialled may take to answer; None: until the deadline."""
        return None if self.silence_s is None else max(_LEAST_REACH_S, self.silence_s * _REACH_SHARE)
