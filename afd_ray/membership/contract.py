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
    if len(set(digests.values())) < 2:
        return
    (common, _), *_ = Counter(digests.values()).most_common(1)
    odd = ", ".join(f"{name} ({digest:016x})" for name, digest in digests.items() if digest != common)
    raise ValueError(
        f"model.path holds different checkpoints on different nodes: most actors loaded {common:016x}, but not {odd}"
    )
