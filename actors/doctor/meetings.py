"""Links of the hand-off, tried: two members of a mesh of their own, which carries a large message each way."""

import secrets
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from afd_ray.handoff.mesh import Endpoint, LinkError, LinkKind, RingMesh, open_mesh

RING_BYTES = 1 << 20
TIMEOUT_S = 5.0


class Meetings:
    """Sides of links that are being tried, by the link's number and the side's rank, 0 or 1; both may be of one process."""

    def __init__(self) -> None:
        self._open: dict[tuple[int, int], RingMesh] = {}

    def open(self, number: int, rank: int, kind: LinkKind, address: str, secret: bytes) -> dict[str, Any]:
        """Listen; gives the endpoint for the other side. Raises OSError for an address that is none of this host's, ValueError for a kind that it cannot have."""
        mesh = open_mesh(rank, 2, number, secret=secret, host=address, peers={1 - rank: RING_BYTES}, kind=kind)
        self._open[number, rank] = mesh
        return mesh.endpoint.to_dict()

    def meet(self, number: int, rank: int, peer: dict[str, Any]) -> str | None:
        """Connect with the other side, which does so at the same time; why it failed."""
        try:
            self._open[number, rank].connect({1 - rank: Endpoint.from_dict(peer)}, TIMEOUT_S)
        except LinkError as error:
            return error.reason
        return None

    def leave(self, number: int, rank: int) -> None:
        """Once both sides have met; harmless where this one never opened."""
        mesh = self._open.pop((number, rank), None)
        if mesh is not None:
            mesh.close()


def meet_here(kind: LinkKind, address: str) -> str | None:
    """Try a link with both sides in this process; why it failed."""
    sides, secret = Meetings(), secrets.token_bytes(32)
    try:
        endpoints = [sides.open(0, rank, kind, address, secret) for rank in (0, 1)]
        with ThreadPoolExecutor(2) as pool:
            errors = list(pool.map(lambda rank: sides.meet(0, rank, endpoints[1 - rank]), (0, 1)))
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)
    finally:
        for rank in (0, 1):
            sides.leave(0, rank)
    return errors[0] or errors[1]
