"""Traces: drawn from a seed, and read from three formats."""

import json
import statistics
from itertools import islice
from pathlib import Path

import pytest

from afd_ray.simulation.serving.trace_files import read_trace
from afd_ray.simulation.serving.traces import Arrival, draw, parse_synthetic


def test_a_seed_draws_the_same_trace_again() -> None:
    trace = parse_synthetic("day:rate=0.5,duration_s=7200")
    assert list(draw(trace, 3)) == list(draw(trace, 3)) != list(draw(trace, 4))


@pytest.mark.parametrize("kind", ["poisson", "bursty", "drift"])
def test_a_drawn_trace_has_the_rate_and_the_lengths_asked_for(kind: str) -> None:
    arrivals = list(draw(parse_synthetic(f"{kind}:rate=5,duration_s=40000,prompt=300,output=50,burst_s=60,calm_s=200"), 0))
    assert len(arrivals) / 40_000 == pytest.approx(5, rel=0.1)
    assert statistics.mean(a.prompt for a in arrivals) == pytest.approx(300, rel=0.05)
    assert statistics.mean(a.output for a in arrivals) == pytest.approx(50, rel=0.02)
    assert [a.at_s for a in arrivals] == sorted(a.at_s for a in arrivals)


def test_a_bursty_trace_is_less_even_than_a_poisson_one() -> None:
    def unevenness(kind: str) -> float:
        counts = [0] * 400
        for arrival in draw(parse_synthetic(f"{kind}:rate=2,duration_s=40000"), 0):
            counts[int(arrival.at_s / 100)] += 1
        return statistics.variance(counts) / statistics.mean(counts)

    assert unevenness("poisson") == pytest.approx(1, abs=0.3)
    assert unevenness("bursty") > 20


@pytest.mark.parametrize(("setting", "drifts", "stays"), [("drift", "prompt", "output"), ("output_drift", "output", "prompt")])
def test_one_of_the_lengths_drifts(setting: str, drifts: str, stays: str) -> None:
    arrivals = list(draw(parse_synthetic(f"poisson:rate=5,duration_s=10000,{setting}=4"), 0))
    tenth = len(arrivals) // 10

    def times_as_long(length: str) -> float:
        first, last = ([getattr(arrival, length) for arrival in part] for part in (arrivals[:tenth], arrivals[-tenth:]))
        return statistics.mean(last) / statistics.mean(first)

    assert times_as_long(drifts) == pytest.approx(4, rel=0.2)
    assert times_as_long(stays) == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("weekly", "no kind of trace"),
        ("poisson:speed=3", "speed is not known"),
        ("poisson:rate=x", "must be a number"),
        ("poisson:rate=0", "more than 0"),
    ],
)
def test_what_no_trace_can_be_drawn_from_is_said_in_a_line(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as refused:
        parse_synthetic(text)
    assert "\n" not in str(refused.value)


MOONCAKE = "".join(
    json.dumps({"timestamp": ms, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1]}) + "\n"
    for ms in (27_482, 30_535)
)
BURSTGPT = (
    "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,,3.1,ChatGPT,472,18,490,Conversation log\n45,7,2,GPT-4,1087,0,1087,API log\n118,7,9,GPT-4,417,276,693,Conversation log\n"
)
AZURE_2023 = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.0319600,3180,8\n"
AZURE_2024 = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.009930+00:00,2162,5\n2024-05-10 00:00:00.017335+00:00,2399,6\n"
)


@pytest.mark.parametrize(
    ("name", "text", "arrivals"),
    [
        ("mooncake.jsonl", MOONCAKE, [(0.0, 6758, 500), (3.053, 6758, 500)]),
        ("burstgpt.csv", BURSTGPT, [(0.0, 472, 18), (113.0, 417, 276)]),
        ("azure2023.csv", AZURE_2023, [(0.0, 4808, 10), (0.052, 3180, 8)]),
        ("azure2024.csv", AZURE_2024, [(0.0, 2162, 5), (0.007405, 2399, 6)]),
    ],
)
def test_public_formats_are_read(tmp_path: Path, name: str, text: str, arrivals: list[tuple[float, int, int]]) -> None:
    path = tmp_path / name
    path.write_text(text)
    assert [(round(a.at_s, 6), a.prompt, a.output) for a in read_trace(path)] == arrivals


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b\n1,2\n", "no trace in"),
        ('{"timestamp": 0}\n', ":1: cannot be read"),
        ('{"timestamp": NaN, "input_length": 5, "output_length": 5}\n', ":1: its time must be a number, got nan"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,many,10\n", ":2: cannot be read"),
        (BURSTGPT + "3,,1,GPT-4,10,10,20,API log\n", ":5: comes before"),
    ],
)
def test_a_broken_trace_is_refused_with_the_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        list(read_trace(path))


def test_a_trace_is_drawn_as_it_is_asked_for() -> None:
    """A day at a thousand a second is not built to take its first request."""
    assert isinstance(next(islice(draw(parse_synthetic("diurnal:rate=1000"), 0), 1)), Arrival)


@pytest.mark.parametrize(
    "setting",
    ["rate=nan", "rate=2e6", "duration_s=inf", "prompt=0", "output=-4", "spread=-1", "swing=5", "burst=nan", "longest=0"],
)
def test_a_trace_that_makes_no_sense_is_refused_by_its_key(setting: str) -> None:
    with pytest.raises(ValueError, match=rf"^trace: {setting.partition('=')[0]} must be [^\n]* and at most [^\n]*, got "):
        parse_synthetic(f"poisson:{setting}")


def test_a_key_may_be_given_once() -> None:
    with pytest.raises(ValueError, match="rate is given twice"):
        parse_synthetic("poisson:rate=1,rate=2")
