"""A layer's rows on the wire: attention's hidden rows with expert ids and weights there, partial sums back."""

from collections.abc import Sequence

import torch
from torch import Tensor

from afd_ray.handoff.quantise import blocks_of, dequantise, quantise
from afd_ray.models.config import ModelConfig
from afd_ray.models.step3 import Narrow, Routed

QUANTISED = torch.float8_e4m3fn
WIRE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "fp8": QUANTISED}
"""Of the hidden rows from attention to FFN, by the name that the configuration gives them."""


def partial_dtype(wire: torch.dtype) -> torch.dtype:
    """Of the partial rows that come back."""
    return torch.bfloat16 if wire is QUANTISED else wire


ID_DTYPES = (torch.uint8, torch.int16)


def id_dtype(experts: int) -> torch.dtype:
    """The narrowest of ID_DTYPES that tells this many experts apart."""
    return ID_DTYPES[experts > 1 << 8]


def pack_rows(routed: Routed, wire: torch.dtype, ids: torch.dtype) -> tuple[Tensor, ...]:
    """The tensors of a message: hidden rows in `wire` (with their exponents where it is 8 bits), then expert ids and weights, if any.

    Weights travel as they are, so that a float32 wire is exact.
    """
    hidden = (routed.narrow or quantise(routed.hidden)) if wire is QUANTISED else (routed.hidden.to(wire),)
    if routed.experts is None or routed.weights is None:
        return hidden
    return *hidden, routed.experts.to(ids), routed.weights


def unpack_rows(tensors: Sequence[Tensor], wire: torch.dtype, dtype: torch.dtype, *, narrow: bool = False) -> Routed:
    """What `pack_rows` gave, with hidden rows and weights in `dtype`; ids stay narrow, and with `narrow` hidden rows of 8 bits too."""
    kept = None
    if wire is QUANTISED:
        values, exponents, *choice = tensors
        kept = Narrow(values, exponents) if narrow else None
        hidden = values if narrow else dequantise(values, exponents, dtype)
    else:
        values, *choice = tensors
        hidden = values.to(dtype)
    if not choice:
        return Routed(hidden, None, None, kept)
    experts, weights = choice
    return Routed(hidden, experts, weights.to(dtype), kept)


def row_bytes(config: ModelConfig, wire: torch.dtype) -> int:
    """At most, of one row from attention to FFN."""
    exponents = blocks_of(config.hidden_size) if wire is QUANTISED else 0
    choice = config.moe_top_k * (torch.int16.itemsize + torch.float32.itemsize)
    return config.hidden_size * wire.itemsize + exponents + choice


def partial_row_bytes(config: ModelConfig, wire: torch.dtype) -> int:
    """Of one row from FFN to attention, or between the ranks of an instance."""
    return config.hidden_size * partial_dtype(wire).itemsize
