"""The file of measured stage times that `afd-ray profile` writes and `simulation.profile` names."""

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt, ValidationError, model_validator

Spread = Annotated[float, Field(ge=0, lt=1)]
Microseconds = Annotated[float, Field(gt=0, le=1e9)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class _Stage(_Record):
    rows: PositiveFloat
    us: Microseconds
    """Of one layer of one micro-batch."""
    by_layer: tuple[NonNegativeFloat, ...] = ()
    """How many times `us` each layer lasted, of attention the head behind them; it holds for the numbers of rows that are nearest."""
    spread: Spread | None = None
    """How much a layer differs from micro-batch to micro-batch: the mean distance of two as a share of their sum (Gini coefficient)."""


class AttentionPoint(_Stage):
    """Of one attention rank."""

    context_tokens: NonNegativeFloat
    """Of all rows together."""


class FfnPoint(_Stage):
    """Of all attention ranks' rows together."""

    ranks: PositiveInt = 1
    """FFN ranks that were there."""


class TransferPoint(_Record):
    """Both ways."""

    bytes: NonNegativeFloat
    us: NonNegativeFloat


class Alone(_Record):
    """Points at which one attention rank alone had work."""

    ranks: PositiveInt = 1
    """Attention ranks that had work at all other points."""
    attention: tuple[AttentionPoint, ...] = ()
    ffn: tuple[FfnPoint, ...] = ()
    transfer: tuple[TransferPoint, ...] = ()


class ProfileFile(_Record):
    """All of it."""

    about: Any = None
    """What was measured, and when: for people."""
    layers: PositiveInt | None = None
    bytes_per_row: PositiveFloat = 1.0
    attention: tuple[AttentionPoint, ...] = Field(min_length=1)
    ffn: tuple[FfnPoint, ...] = Field(min_length=1)
    transfer: tuple[TransferPoint, ...] = ()
    alone: Alone = Alone()

    @model_validator(mode="after")
    def _has_one_number_of_layers(self) -> Self:
        for role, points in (("attention", self.attention), ("ffn", self.ffn)):
            lengths = sorted({len(point.by_layer) for point in points if point.by_layer})
            if len(lengths) > 1:
                raise ValueError(f"{role}: by_layer must be as long at every point, got {lengths[0]} and {lengths[-1]}")
        return self

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises ValueError in one line, naming the first thing that is wrong, when the file is not a profile; OSError when it cannot be read."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ValueError(f"{path}: is no profile of stage times: {f'{where}: ' if where else ''}{first['msg']}") from None
