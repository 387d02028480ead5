"""What all members of an epoch must agree on before a row crosses: the model's content, the epoch's shape, the wire's dtype."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping

import torch

from afd_ray.membership.epoch import Epoch


def contract_digest(model_digest: int, epoch: Epoch, wire_dtype: torch.dtype) -> int:
    """64 bits that differ when members loaded different checkpoints, or see the epoch differently."""
    terms = {"model": model_digest, "epoch": epoch.to_dict(), "wire_dtype": str(wire_dtype)}
    return int.from_bytes(hashlib.blake2b(json.dumps(terms, sort_keys=True).encode(), digest_size=8).digest(), "little")


def check_same_model(digests: Mapping[str, int]) -> None:
    """Raises ValueError naming the actors whose checkpoint is not what most have."""
    odd = _odd({name: f"{digest:016x}" for name, digest in digests.items()})
    if odd:
        raise ValueError(f"model.path holds different checkpoints on different nodes: most actors loaded {odd}")


def check_same_versions(versions: Mapping[str, Mapping[str, str]]) -> None:
    """Raises ValueError naming the actors, and the package, that are not of the version that most have."""
    for package in sorted({package for each in versions.values() for package in each}):
        odd = _odd({name: each.get(package, "none") for name, each in versions.items()})
        if odd:
            raise ValueError(f"nodes have different versions of {package}: most actors run {odd}")


def _odd(values: Mapping[str, str]) -> str | None:
    """What most have, and who has something else; None where all have the same."""
    if len(set(values.values())) < 2:
        return None
    (common, _), *_ = Counter(values.values()).most_common(1)
    odd = ", ".join(f"{name} ({value})" for name, value in values.items() if value != common)
    return f"{common}, but not {odd}"
