"""How large an edge's receive buffer must be, so that no sender ever waits for a reader."""

import torch

from afd_ray.handoff.message import aligned
from afd_ray.membership.epoch import Epoch
from afd_ray.models.config import ModelConfig

CONTROL_BYTES = 1 << 16
"""Room for step descriptors, waves and parks, and for the frames' headers and padding."""


def inbound_bytes(epoch: Epoch, rank: int, peer: int, config: ModelConfig, dtype: torch.dtype, max_rows: int) -> int:
    """Buffer for what `peer` can have under way to `rank`.

    A message stays in the buffer while its slot waits for its turn, in which each other slot may send two; what waits for other ranks is
    copied out. One more for the wrap, where a message does not fit, and one for the writer.
    """
    rows = max_rows if min(rank, peer) < epoch.attention else max_rows * epoch.attention
    row_bytes = config.hidden_size * dtype.itemsize
    if peer < epoch.attention:
        row_bytes += config.moe_top_k * (torch.int32.itemsize + torch.float32.itemsize)
    return aligned((2 * epoch.micro_batches + 2) * rows * row_bytes + CONTROL_BYTES)
