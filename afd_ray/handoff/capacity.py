"""How large an edge's receive buffer must be, so that no sender ever waits for a reader."""

import torch

from afd_ray.handoff.message import ALIGNMENT, HEADER_BYTES, MAX_TENSORS, aligned
from afd_ray.handoff.rows import partial_row_bytes, row_bytes
from afd_ray.membership.epoch import Epoch
from afd_ray.models.config import ModelConfig

CONTROL_BYTES = 1 << 16
"""Room for step descriptors, waves and parks, and for the frames' headers and padding."""

_FRAMING_BYTES = HEADER_BYTES + MAX_TENSORS * ALIGNMENT


def inbound_bytes(epoch: Epoch, rank: int, peer: int, config: ModelConfig, wire: torch.dtype, max_rows: int) -> int:
    """Buffer for what `peer` can have under way to `rank`.

    A message stays in the buffer while its slot waits for its turn, in which each other slot may send two; what waits for other ranks is
    copied out. One more for the wrap, where a message does not fit, and one for the writer.
    """
    rows = max_rows if min(rank, peer) < epoch.attention else max_rows * epoch.attention
    each = row_bytes(config, wire) if peer < epoch.attention else partial_row_bytes(config, wire)
    return aligned((2 * epoch.micro_batches + 2) * rows * each + CONTROL_BYTES)


def frame_bytes(epoch: Epoch, rank: int, peer: int, config: ModelConfig, wire: torch.dtype, max_rows: int) -> int:
    """The longest frame with rows that `peer` sends to `rank`; 0: it sends none.

    Of the rows that a rank of an instance reduces for others, those of the attention ranks that it returns them to.
    """
    if peer < epoch.attention:
        return _FRAMING_BYTES + max_rows * row_bytes(config, wire)
    rows = max_rows
    if rank >= epoch.attention:
        if epoch.instance_of(rank)[0] != epoch.instance_of(peer)[0]:
            return 0
        rows = _rows_reduced(epoch, max_rows)
    return _FRAMING_BYTES + rows * partial_row_bytes(config, wire)


def _rows_reduced(epoch: Epoch, max_rows: int) -> int:
    """By one rank of an instance, at most; as `routing.row_owners` deals them."""
    if epoch.attention >= epoch.tensor_parallel:
        return max_rows * -(-epoch.attention // epoch.tensor_parallel)
    return epoch.attention * -(-max_rows // epoch.tensor_parallel)
