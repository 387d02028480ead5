"""How large an edge's receive buffer must be, so that no sender ever waits for a reader."""

import torch

from afd_ray.handoff.message import aligned
from afd_ray.handoff.rows import partial_row_bytes, row_bytes
from afd_ray.membership.epoch import Epoch
from afd_ray.models.config import ModelConfig

CONTROL_BYTES = 1 << 16
"""Room for step descriptors, waves and parks, and for the frames' headers and padding."""


def inbound_bytes(epoch: Epoch, rank: int, peer: int, config: ModelConfig, wire: torch.dtype, max_rows: int) -> int:
    """Buffer for what `peer` can have under way to `rank`.

    A message stays in the buffer while its slot waits for its turn, in which each other slot may send two; what waits for other ranks is
    copied out. One more for the wrap, where a message does not fit, and one for the writer.
    """
    rows = max_rows if min(rank, peer) < epoch.attention else max_rows * epoch.attention
    each = row_bytes(config, wire) if peer < epoch.attention else partial_row_bytes(config, wire)
    return aligned((2 * epoch.micro_batches + 2) * rows * each + CONTROL_BYTES)
