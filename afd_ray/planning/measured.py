"""Stage times as they were measured on one accelerator: the file that `benchmarks/gpu_*.py --json` writes and `afd-ray plan --measured` reads."""

import json
import re
from pathlib import Path
from typing import Literal, NamedTuple, Self

from pydantic import PositiveFloat, PositiveInt, ValidationError, model_validator

from afd_ray.planning import catalogue
from afd_ray.planning.shapes import CacheBytes, Record

Points = list[tuple[float, float]]


class AttentionTime(Record):
    """One attention layer of one micro-batch on one accelerator."""

    rows: PositiveInt
    context: PositiveInt
    """Tokens cached for each row."""
    cache_bytes: CacheBytes
    """For each value of the cache."""
    part: Literal["layer", "core"]
    """The layer with its projections, or attention over the cache alone."""
    us: PositiveFloat


class FfnTime(Record):
    """One FFN layer of one micro-batch on one rank."""

    rows: PositiveInt
    """Of the micro-batch, from all attention ranks."""
    ranks: PositiveInt
    """Over which the layer's weights are cut."""
    part: Literal["layer", "routed"]
    """The stage with the shared expert and what ranks of a server exchange, or the routed experts of one rank alone."""
    us: PositiveFloat


class HandoffTime(Record):
    """One message from an accelerator to another one, on another server."""

    message_bytes: PositiveInt
    us: PositiveFloat


class Measured(Record):
    """What one accelerator was measured to do, for one model."""

    device: str
    """As CUDA names it; the catalogue's accelerator must be a word of it."""
    model: str = "step3"
    """Of the catalogue."""
    source: str
    """What measured it, and when."""
    attention: tuple[AttentionTime, ...] = ()
    ffn: tuple[FfnTime, ...] = ()
    handoff: tuple[HandoffTime, ...] = ()

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        catalogue.model(self.model)
        if self.accelerator_name is None:
            names = ", ".join(gpu.ray_type for gpu in catalogue.hardware().accelerators.values())
            raise ValueError(f"device: must name one of {names}, got {self.device!r}")
        return self

    @property
    def accelerator_name(self) -> str | None:
        """Of the catalogue."""
        words = re.split(r"[^A-Z0-9]+", self.device.upper())
        return next((name for name, gpu in catalogue.hardware().accelerators.items() if gpu.ray_type.upper() in words), None)


class Estimate(NamedTuple):
    """A time between or beyond the points that were measured."""

    us: float
    measured: bool
    """Whether it lies between two points, or is one of them."""


def read_measured(path: Path) -> Measured:
    """A file, or all `*.json` of a directory as one; raises ValueError in one line that names file, key and what is wrong."""
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path}: holds no .json file")
    first, *others = (_read(file) for file in files)
    for file, other in zip(files[1:], others, strict=True):
        if (other.device, other.model) != (first.device, first.model):
            raise ValueError(f"{file}: {other.device}, {other.model}, but {files[0]} is of {first.device}, {first.model}")
    together = [first, *others]
    whole = first.model_copy(
        update={
            "source": "; ".join(dict.fromkeys(part.source for part in together)),
            **{key: tuple(t for part in together for t in getattr(part, key)) for key in ("attention", "ffn", "handoff")},
        }
    )
    if not (whole.attention or whole.ffn or whole.handoff):
        raise ValueError(f"{path}: no stage time in it: attention, ffn and handoff are empty")
    return whole


def _read(file: Path) -> Measured:
    try:
        return Measured.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ValueError(f"{file}: {f'{key}: ' if key else ''}{first['msg']}") from None
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror or error}") from None
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from None


def estimate(points: Points, at: float) -> Estimate:
    """From (work, microseconds), at least one: along the line through the two points around `at`.

    Beyond the first or last point the line through the two nearest goes on, but less work never takes less than in proportion, nor more work less time;
    a single point is scaled in proportion.
    """
    known = sorted(_medians(points).items())
    if len(known) == 1:
        work, us = known[0]
        return Estimate(us * at / work, at == work)
    above = next((i for i, (work, _) in enumerate(known) if i and work >= at), len(known) - 1)
    (left, left_us), (right, right_us) = known[above - 1 : above + 1]
    us = left_us + (right_us - left_us) * (at - left) / (right - left)
    if at < left:
        us = max(us, left_us * at / left)
    elif at > right:
        us = max(us, right_us)
    return Estimate(us, left <= at <= right)


def _medians(points: Points) -> dict[float, float]:
    """One time for each amount of work: the upper median of those measured."""
    times: dict[float, list[float]] = {}
    for work, us in points:
        times.setdefault(work, []).append(us)
    return {work: sorted(found)[len(found) // 2] for work, found in times.items()}
