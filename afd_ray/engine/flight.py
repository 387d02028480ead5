"""A micro-batch on its way through the layers, as its attention rank keeps it."""

from torch import Tensor

from afd_ray.engine.device_times import FlightMarks
from afd_ray.engine.passage import Passage
from afd_ray.engine.sequence import MicroBatch
from afd_ray.engine.stage_costs import FlightTimes
from afd_ray.handoff.message import Message


class Flight:
    """One micro-batch: the layer it is at, and what is still to come back for it."""

    def __init__(self, batch: MicroBatch, passage: Passage, step: int, marks: FlightMarks | None = None) -> None:
        """`marks`: on a device that the host runs ahead of, where its stages begin and end."""
        self.batch, self.passage, self.step, self.marks = batch, passage, step, marks
        self.rows = batch.rows
        self.context_tokens = sum(chunk.start + chunk.count for chunk in batch.chunks)
        self.layer = 0
        self.since = 0
        self.due_ns = 0
        """When all that it waited for was here."""
        self.awaited = 0
        self.sent: list[Tensor | None] = []
        """For each FFN instance the rows that went to it; None: all of them."""
        self.chosen: list[Tensor] = []
        """The experts [N, K] of each layer's rows."""
        self.partials: list[Message] = []
        self.dispatched_ns = 0
        self.observed = FlightTimes()
