"""What is exported: samples by the catalogue, and the same through Ray."""

from typing import Any

import pytest

from actors import ray_metrics
from actors.http.metrics import render
from actors.ray_metrics import RayMetrics
from afd_ray.measured import Measured, MeasuredFFN, bubble
from afd_ray.metrics import CATALOGUE, Sample, attention_samples, cluster_samples, ffn_samples
from tests.measured_scenes import histogram

SUMS = Measured(
    since_s=0.0,
    at_s=100.0,
    arrivals=7,
    steps=20,
    running=2,
    kv_used=3,
    kv_total=8,
    stages={"attention": histogram(100.0, 200.0), "attention_wait": histogram(100.0)},
)
RECENT = Measured(
    40.0, 100.0, tpot_ms=histogram(20.0), stages={"attention": histogram(300.0), "attention_wait": histogram(100.0)}
)
STATUS = {
    "state": "ready", "epoch": 4,
    "attention": [{"state": "running"}, {"state": "dead"}], "ffn": [{"state": "running"}],
    "moved_in": {"with_kv": 5, "recomputed": 4, "failed": 1, "kv_bytes": 4096, "kv_ms": 2.5},
    "targets_ms": {"tpot": 50.0, "ttft": 1000.0},
    "last_resize": {"outcome": "rolled_back", "pause_ms": None},
}  # fmt: skip


def values(samples: list[Sample]) -> dict[str, Any]:
    """By name, and the values of the labels that tell its series apart."""
    return {" ".join((s.name, *(v for k, v in s.labels.items() if k not in ("actor", "role")))): s.value for s in samples}


def test_an_attention_actors_samples() -> None:
    found = values(attention_samples("attention-0", SUMS, RECENT))
    assert found["afd_requests_arrived_total"] == 7
    assert (found["afd_kv_blocks_used"], found["afd_kv_blocks_total"], found["afd_oldest_waiting_seconds"]) == (3, 8, 0)
    assert found["afd_stage_seconds_total attention"] == pytest.approx(300e-6)
    assert found["afd_stage_runs_total attention"] == 2
    assert found["afd_stage_time_seconds attention 0.5"] == pytest.approx(300e-6, rel=0.01)
    assert found["afd_tpot_seconds 0.95"] == pytest.approx(0.020, rel=0.01)
    assert found["afd_bubble_ratio"] == pytest.approx(0.25)


def test_what_was_not_measured_in_the_last_minute_has_no_quantiles() -> None:
    names = {sample.name for sample in attention_samples("attention-0", SUMS, Measured(40.0, 100.0))}
    assert "afd_stage_seconds_total" in names
    assert not names & {"afd_tpot_seconds", "afd_ttft_seconds", "afd_stage_time_seconds", "afd_bubble_ratio"}


def test_a_bubble_is_the_waiting_share_of_the_time_with_work_under_way() -> None:
    assert bubble({"ffn": histogram(30.0), "ffn_wait": histogram(10.0), "a2f": histogram(500.0)}) == 0.25
    assert bubble({"attention": histogram(30.0), "head": histogram(10.0)}) == 0.0
    assert bubble({}) is None


def test_every_sample_is_in_the_catalogue_with_its_labels() -> None:
    ffn = MeasuredFFN(0.0, 1.0, 5, 2, {"ffn": histogram(10.0)})
    samples = attention_samples("a", SUMS, RECENT) + ffn_samples("f", ffn, ffn) + cluster_samples(STATUS)
    assert {sample.name: tuple(sample.labels) for sample in samples}.items() <= {
        metric.name: metric.labels for metric in CATALOGUE.values()
    }.items()


def test_the_clusters_samples() -> None:
    found = values(cluster_samples(STATUS))
    assert found["afd_cluster_state ready"] == 1
    assert (found["afd_attention_actors"], found["afd_ffn_actors"], found["afd_epoch"]) == (1, 1, 4)
    assert (found["afd_requests_moved_with_kv"], found["afd_kv_fetching_ms"]) == (5, 2.5)
    assert (found["afd_tpot_target_seconds"], found["afd_last_resize_rolled_back"]) == (0.05, 1)
    assert "afd_last_resize_pause_seconds" not in found


def test_prometheus_text_has_each_family_once_with_its_help_and_kind() -> None:
    samples = [*attention_samples("attention-0", SUMS, RECENT), *attention_samples("attention-1", SUMS, RECENT)]
    lines = render({}, samples).decode().splitlines()
    assert lines.count("# TYPE afd_steps_total counter") == 1
    assert f"# HELP afd_steps_total {CATALOGUE['afd_steps_total'].help}" in lines
    assert 'afd_steps_total{actor="attention-1",role="attention"} 20.0' in lines
    assert "# TYPE afd_kv_blocks_total gauge" in lines


class Family:
    """A metric of Ray's."""

    def __init__(self, name: str, text: str, tag_keys: tuple[str, ...]) -> None:
        self.tag_keys, self.calls = tag_keys, list[float]()

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert set(tags) == set(self.tag_keys)
        self.calls.append(value)

    inc = set


@pytest.fixture
def families(monkeypatch: pytest.MonkeyPatch) -> dict[str, Family]:
    made: dict[str, Family] = {}

    def make(name: str, text: str, tag_keys: tuple[str, ...]) -> Family:
        made[name] = Family(name, text, tag_keys)
        return made[name]

    monkeypatch.setattr(ray_metrics, "Gauge", make)
    monkeypatch.setattr(ray_metrics, "Counter", make)
    return made


def test_ray_is_told_what_a_counter_grew_by_and_gauges_that_have_nothing_left_are_emptied(families: dict[str, Family]) -> None:
    labels = {"actor": "attention-0", "role": "attention"}
    exported = RayMetrics()
    for steps, running in ((3, 2.0), (3, 1.0), (8, None)):
        gauges = [] if running is None else [Sample("afd_requests_running", labels, running)]
        exported.publish([Sample("afd_steps_total", labels, steps), *gauges])
    assert families["afd_steps"].calls == [3, 5]
    assert families["afd_requests_running"].calls[:2] == [2.0, 1.0]
    assert str(families["afd_requests_running"].calls[2]) == "nan"
