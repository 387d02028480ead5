"""What a member publishes so that its peers can reach it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a member listens, and the rings it has for its peers; goes through msgpack or JSON as a dictionary."""

    rank: int
    host: str
    port: int
    segment: str
    """Name of its shared segment; empty: it has none."""
    nonce: bytes
    """Begins the segment, so that a name of another host's is not mistaken for it."""
    digest: int
    pid: int
    meeting_port: int
    """Where gloo's peers find it; 0: it does not use gloo."""
    rings: dict[int, int]
    """Capacity in bytes of its ring for each peer rank: the largest message it can take."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"nonce": self.nonce.hex(), "rings": sorted(self.rings.items())}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Endpoint":
        missing = [field.name for field in fields(cls) if field.name not in values]
        if missing:
            raise ValueError(f"endpoint lacks {', '.join(missing)}")
        known = {field.name: values[field.name] for field in fields(cls)}
        rings = {int(peer): int(size_bytes) for peer, size_bytes in known["rings"]}
        return cls(**known | {"nonce": bytes.fromhex(known["nonce"]), "rings": rings})
