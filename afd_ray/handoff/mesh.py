"""The group as its members see it, and how a member opens its own part."""

from collections.abc import Mapping

from afd_ray.handoff.endpoint import Endpoint
from afd_ray.handoff.message import LinkError, Mesh
from afd_ray.handoff.ring_mesh import EdgeCount, RingMesh
from afd_ray.handoff.terms import LINK_KINDS, LinkKind, Terms

__all__ = ["EdgeCount", "Endpoint", "LinkError", "LinkKind", "Mesh", "RingMesh", "open_mesh"]


def open_mesh(
    rank: int,
    world_size: int,
    epoch: int,
    *,
    secret: bytes,
    host: str,
    peers: Mapping[int, int],
    kind: LinkKind = "auto",
    spin_us: float = 0.0,
    digest: int = 0,
    send_timeout_s: float = 10.0,
    silence_s: float | None = None,
) -> RingMesh:
    """A member that listens on `host` and has a ring for each of `peers` (rank: capacity in bytes), not yet connected.

    Pass its `endpoint` to the peers and theirs to `connect`. `auto` shares memory with peers on the
    same host and uses sockets otherwise; `gloo` is for a whole group. A ring's capacity is the largest message it takes; give it twice the bytes in
    flight on the edge. A socket whose peer acknowledges nothing for `silence_s` breaks: nothing else tells of a host out of reach. Raises ValueError for bad arguments and OSError for an address that cannot be bound.
    """
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}, it must be from 0 to world_size - 1 = {world_size - 1}")
    strangers = [peer for peer in peers if not 0 <= peer < world_size or peer == rank]
    if strangers:
        raise ValueError(f"peers: rank {strangers[0]} is not a peer of rank {rank} in a group of {world_size}")
    if kind not in LINK_KINDS:
        raise ValueError(f"kind is {kind!r}, allowed: {', '.join(LINK_KINDS)}")
    if not 0 <= digest < 1 << 64 or not 0 <= epoch < 1 << 32:
        raise ValueError(f"digest {digest} or epoch {epoch} is out of range, allowed: 64 and 32 bits, not negative")
    if not secret:
        raise ValueError("secret is empty, allowed: at least one byte")
    terms = Terms(rank, epoch, digest, secret, host, kind, send_timeout_s, silence_s)
    return RingMesh(terms, world_size, peers, spin_us)
