"""Stage times: where the achieved shares come from, and what crosses the wire."""

from statistics import median

import pytest

from afd_ray.engine.stage_costs import StageTimes
from afd_ray.planning import catalogue
from afd_ray.planning.deployment import Deployment, bubble, layer_kinds, memory, performance, period_us, slowest_stage
from afd_ray.planning.stages import attention_us, wire_us

TABLE_9_US = {"h800": (281, 791), "h20": (438, 1452), "a800": (531, 1484)}
"""Measured MFA layers, 64 requests of 8K and of 32K tokens on each accelerator, bf16 attention."""


def two_by_two(**changes: object) -> Deployment:
    """Section 7.3: 2A2F, three micro-batches of 2,048 rows at 4K."""
    h100 = catalogue.accelerator("h100")
    deployment = Deployment(catalogue.model("step3"), h100, h100, 2, 2, micro_batches=3, rows=128, context=4096)
    return deployment._replace(**changes)  # type: ignore[arg-type]


def test_attentions_share_is_the_median_of_the_papers_measured_layers() -> None:
    shape = catalogue.model("step3").with_cache_bytes(2)
    shares = [
        attention_us(shape.attention[0], shape.hidden_size, catalogue.accelerator(name), 64, context, 1.0) / measured
        for name, row in TABLE_9_US.items()
        for context, measured in zip((8192, 32768), row, strict=True)
    ]
    assert median(shares) == pytest.approx(catalogue.hardware().achieved.attention.value, abs=0.005)


def test_the_ffn_stage_of_2a2f_lasts_what_its_authors_emulate_it_with() -> None:
    """StepMesh, tests/vllm/ffn.py: 0.26 ms. Nothing here is fitted to it."""
    moe = max(layer_kinds(two_by_two(), catalogue.hardware().achieved), key=lambda kind: kind.share)
    assert moe.times_us.ffn == pytest.approx(260, rel=0.02)
    assert moe.share == pytest.approx(56 / 61)


def test_rows_cross_rail_by_rail_to_every_server() -> None:
    """StepMesh's Introduction: 896 KB there (18 us at 400 Gbit/s) and 1.75 MB back (37 us) between two GPUs, two of each a GPU."""
    times = wire_us(7168, 50e9, 50e9, 2, 2, rows=128)
    assert times.a2f == pytest.approx(2 * 896 * 1024 / 50e9 * 1e6)
    assert times.f2a == 2 * times.a2f


def test_the_slower_end_of_the_wire_counts() -> None:
    assert wire_us(1, 100e9, 10e9, 1, 1, 1).a2f == wire_us(1, 10e9, 100e9, 1, 1, 1).a2f
    assert wire_us(1, 10e9, 10e9, 4, 1, 1).a2f == 4 * wire_us(1, 10e9, 10e9, 1, 1, 1).a2f


def test_memory_of_2a2f() -> None:
    held = memory(two_by_two())
    assert held.kv_cache / 1e9 == pytest.approx(49.1, abs=0.1)
    assert held.ffn_weights / 1e9 == pytest.approx(19.0, abs=0.1)


@pytest.mark.parametrize(
    ("times", "slowest"),
    [
        (StageTimes(300, 10, 200, 20), "attention stage"),
        (StageTimes(200, 10, 300, 20), "FFN stage"),
        (StageTimes(200, 150, 200, 300), "network"),
        (StageTimes(200, 300, 200, 300), "round trip"),
    ],
)
def test_the_slowest_stage_sets_the_period(times: StageTimes, slowest: str) -> None:
    assert slowest_stage(times, 3) == slowest
    expected = {"attention stage": 900, "FFN stage": 900, "network": 900, "round trip": 1000}
    assert period_us(times, 3) == expected[slowest]
    assert bubble(times, 3) == pytest.approx(1 - 3 * max(times.attention, times.ffn) / expected[slowest])


def test_more_context_costs_attention_alone() -> None:
    achieved = catalogue.hardware().achieved
    short, long = (performance(two_by_two(context=context), achieved) for context in (4096, 32768))
    assert (short.slowest, long.slowest) == ("FFN stage", "attention stage")
    assert long.usd_per_million > short.usd_per_million
