"""What smaller accelerators can do within a stage, by memory bandwidth alone (arXiv:2507.19427 section 6)."""

import math
from typing import NamedTuple

from afd_ray.planning.accelerators import SERVER, Accelerator
from afd_ray.planning.shapes import WEIGHT_BYTES, ModelShape

FFN_BANDWIDTH = 0.5
"""The share of its memory's bandwidth that an FFN card is counted on for."""


class StageBudget(NamedTuple):
    """Bytes that one attention accelerator moves in a stage of a layer."""

    moved_bytes: float
    linear_bytes: float
    """Projections: the output's shared by the server, the others read whole."""

    @property
    def cache_bytes(self) -> float:
        """What is left for keys and values; none for a card too slow for the projections alone."""
        return max(0.0, self.moved_bytes - self.linear_bytes)

    def cached_tokens(self, shape: ModelShape) -> float:
        """Tokens that can be attended to, over all requests of a micro-batch."""
        return self.cache_bytes / shape.attention[0].moved_bytes(1)


class FfnCards(NamedTuple):
    """Cards that read a model's FFN weights in time."""

    bytes_a_layer: float
    bytes_a_card: float
    cards: int
    """In whole servers."""


def stage_budget(shape: ModelShape, gpu: Accelerator, stage_us: float) -> StageBudget:
    """A stage is that of one layer and micro-batch; the model has one kind of attention layer."""
    layer = shape.attention[0]
    linear = layer.input_parameters(shape.hidden_size) + layer.output_parameters(shape.hidden_size) / SERVER
    return StageBudget(gpu.memory_bytes_s * stage_us * 1e-6, linear * WEIGHT_BYTES)


def requests_within(budget: StageBudget, shape: ModelShape, context: int) -> int:
    """Requests of `context` tokens in one micro-batch of one card."""
    return int(budget.cached_tokens(shape) / context)


def ffn_cards(shape: ModelShape, gpu: Accelerator, stage_us: float) -> FfnCards:
    """Every card reads its share of each layer in a stage, at FFN_BANDWIDTH."""
    a_layer = FFN_BANDWIDTH * gpu.memory_bytes_s * stage_us * 1e-6
    a_card = a_layer * shape.layers
    return FfnCards(a_layer, a_card, SERVER * math.ceil(shape.ffn_side_bytes / (SERVER * a_card)))


def equal_bandwidth_cards(count: int, of: Accelerator, other: Accelerator, whole: int = 1) -> int:
    """How many of `other` have the memory bandwidth of `count` of `of`, in multiples of `whole`."""
    return whole * math.ceil(count * of.memory_bytes_s / other.memory_bytes_s / whole)
