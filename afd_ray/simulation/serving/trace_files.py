"""Recorded requests, in three public formats, read line by line.

| format | file | fields |
|---|---|---|
| Mooncake (FAST'25) | JSON lines | `timestamp` ms, `input_length`, `output_length` |
| BurstGPT | CSV | `Timestamp` s, `Request tokens`, `Response tokens`; failed requests have no response tokens and are left out |
| Azure LLM inference 2023, 2024 | CSV | `TIMESTAMP` date and time, `ContextTokens`, `GeneratedTokens` |
"""

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

from afd_ray.simulation.serving.traces import Arrival

TICK_DIGITS = 6
"""Of a second's fraction that `datetime` reads; Azure's has seven."""


def read_trace(path: Path) -> Iterator[Arrival]:
    """The arrivals of a trace file, the first at 0 s; raises ValueError, one line with the line's number, where it cannot be read."""
    first_s, last_s = None, 0.0
    with path.open(encoding="utf-8-sig", newline="") as lines:
        for number, (at_s, prompt, output) in _records(lines, path):
            if not math.isfinite(at_s):
                raise ValueError(f"{path}:{number}: its time must be a number, got {at_s}")
            if first_s is None:
                first_s = at_s
            if output < 1 or prompt < 1:
                continue
            if at_s - first_s < last_s:
                raise ValueError(f"{path}:{number}: comes before the request above it, sort the trace by time")
            last_s = at_s - first_s
            yield Arrival(last_s, prompt, output)


def _records(lines: Iterable[str], path: Path) -> Iterator[tuple[int, tuple[float, int, int]]]:
    stream = iter(lines)
    head = next(stream, "")
    reader: Iterator[Any]
    if head.lstrip().startswith("{"):
        parse, reader, ahead = _mooncake, chain([head], stream), 1
    else:
        columns = {name.strip() for name in head.split(",")}
        parse, reader, ahead = _csv_format(columns, path), csv.DictReader(chain([head], stream), skipinitialspace=True), 2
    for number, row in enumerate(reader, ahead):
        if isinstance(row, str) and not row.strip():
            continue
        try:
            yield number, parse(row)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}:{number}: cannot be read: {error!r}") from None


def _csv_format(columns: set[str], path: Path) -> Callable[..., tuple[float, int, int]]:
    if {"Timestamp", "Request tokens", "Response tokens"} <= columns:
        return lambda row: (float(row["Timestamp"]), int(row["Request tokens"]), int(row["Response tokens"]))
    if {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} <= columns:
        return lambda row: (_seconds(row["TIMESTAMP"]), int(row["ContextTokens"]), int(row["GeneratedTokens"]))
    raise ValueError(f"{path}: is no trace in Mooncake's, BurstGPT's or Azure's format")


def _mooncake(line: str) -> tuple[float, int, int]:
    row = json.loads(line)
    return float(row["timestamp"]) / 1000, int(row["input_length"]), int(row["output_length"])


def _seconds(text: str) -> float:
    """Of `2023-11-16 18:17:03.9799600`, with or without a zone."""
    moment, _, fraction = text.strip().partition(".")
    digits, zone = fraction, ""
    for sign in "+-Z":
        if sign in digits:
            digits, _, zone = digits.partition(sign)
            zone = sign + zone
            break
    parsed = datetime.fromisoformat(f"{moment}.{digits[:TICK_DIGITS].ljust(TICK_DIGITS, '0')}{zone}" if fraction else moment)
    return (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp()
