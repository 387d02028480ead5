"""The catalogue that is installed with the package: accelerators and model shapes by name."""

import difflib
from collections.abc import Iterable
from functools import cache
from importlib import resources
from typing import Any

import yaml

from afd_ray.planning.accelerators import Accelerator, Achieved
from afd_ray.planning.shapes import ModelShape, Record


class Hardware(Record):
    """`hardware.yaml`."""

    accelerators: dict[str, Accelerator]
    achieved: Achieved
    sources: dict[str, str]


@cache
def read(file: str) -> Any:
    """A file of the catalogue, parsed."""
    text = (resources.files("configs") / "catalogue" / file).read_text(encoding="utf-8")
    return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))


@cache
def hardware() -> Hardware:
    return Hardware.model_validate(read("hardware.yaml"))


@cache
def models() -> dict[str, ModelShape]:
    return {name: ModelShape.model_validate(raw) for name, raw in read("models.yaml").items()}


def accelerator(name: str) -> Accelerator:
    """By its name in the catalogue, whatever its case; raises ValueError in one line."""
    return hardware().accelerators[known("hardware", name, hardware().accelerators)]


def model(name: str) -> ModelShape:
    """By its name in the catalogue, whatever its case; raises ValueError in one line."""
    return models()[known("model", name, models())]


def known(what: str, name: str, names: Iterable[str]) -> str:
    """`name` as the catalogue spells it; raises ValueError that suggests the nearest."""
    spelled = {key.lower(): key for key in names}
    if name.lower() in spelled:
        return spelled[name.lower()]
    close = difflib.get_close_matches(name.lower(), spelled, n=1)
    hint = f", did you mean {spelled[close[0]]}?" if close else ""
    raise ValueError(f"{what}: must be one of {', '.join(spelled.values())}, got {name!r}{hint}")
