"""Simulated clusters whole: resizes, losses, machines, stage times."""

import json
from pathlib import Path

import pytest

from afd_ray.autoscaling import Counts, Decision, Observation, State, load_policy
from afd_ray.engine.stage_costs import CostLine
from afd_ray.histogram import Histogram
from afd_ray.membership.steps import Deadlines
from afd_ray.simulation.serving import LinearStages, Profile, Simulation
from afd_ray.simulation.serving.resizing import timetable
from afd_ray.simulation.serving.stages import Shape, share_of_rows
from tests.serving_scenes import MOST, counts_at, play, small, steady

FIXED = load_policy("fixed")


def once(wanted: Counts, at_s: float = 100.0):  # type: ignore[no-untyped-def]
    """Asks for these counts from some moment on."""

    def policy(observation: Observation, state: State, now: float) -> Decision:
        return Decision(wanted if now >= at_s else observation.counts, "as asked")

    return policy


def test_every_request_is_answered_in_full_whatever_changes() -> None:
    arrivals = list(steady(0.5, 300))
    for wanted in (Counts(1, 1), Counts(5, 2), Counts(2, 6)):
        outcome = play(once(wanted), arrivals, small(Counts(3, 3)))
        assert outcome.tally.completions == len(arrivals)
        assert outcome.tally.tokens >= sum(arrival.output for arrival in arrivals)
        assert counts_at(outcome, 290) == wanted


def test_new_actors_serve_after_their_start_and_cost_from_the_start() -> None:
    outcome = play(once(Counts(2, 1)), steady(0.5, 200))
    (change,) = outcome.changes
    assert change.at_s == pytest.approx(100 + 20 + 1, abs=1)
    assert outcome.gpu_hours * 3600 == pytest.approx(2 * outcome.duration_s + (outcome.duration_s - 100), abs=2)


def test_the_first_requests_of_a_new_cluster_are_not_taken_for_dear_ones() -> None:
    """One rank would do for many times as many: nearly all that a stage takes is its base, which one row count does not show."""
    costly = LinearStages(CostLine(8000, 0, 20), CostLine(300, 50), CostLine(600))
    scene = small(autoscaling={"tpot_target_ms": 96.0, "ttft_target_ms": 10_000.0, "period_s": 3.0, "max": MOST._asdict()})
    outcome = play(load_policy("balance"), steady(1.0, 30, prompt=16, output=40), scene._replace(stages=costly, layers=4))
    assert not outcome.changes


def test_without_room_a_resize_is_rolled_back_and_serving_goes_on() -> None:
    scene = small(simulation={"nodes": [{"actors": 3}]}, placement={"timeout_s": 30.0})
    outcome = play(once(Counts(4, 4)), steady(1, 150), scene)
    assert {change.outcome for change in outcome.changes} == {"rolled_back"}
    assert outcome.changes[0].at_s == pytest.approx(130, abs=1)
    assert outcome.changes[0].reason == "starting new actors took too long"
    assert outcome.tally.completions == 150


@pytest.mark.parametrize("role", ["attention", "ffn"])
def test_a_lost_actor_is_replaced_and_no_request_with_it(role: str) -> None:
    scene = small(Counts(2, 2), simulation={"start_delay_s": 20.0, "failures": [{"at_s": 60.0, "role": role}]})
    outcome = play(FIXED, steady(2, 200), scene)
    lost, back = outcome.changes
    assert (lost.outcome, back.outcome) == ("lost", "committed")
    assert sum(lost.after) == 3
    assert back.after == Counts(2, 2)
    assert outcome.tally.completions == 400


def test_losing_the_only_actor_of_a_role_stops_serving_until_another_is_there() -> None:
    for role in ("attention", "ffn"):
        scene = small(simulation={"start_delay_s": 20.0, "failures": [{"at_s": 30.0, "role": role}]})
        outcome = play(FIXED, steady(0.5, 100), scene)
        assert outcome.tally.completions == 50
        assert max(point.ttft_p95_ms or 0 for point in outcome.points) > 10_000


def test_random_losses_come_from_the_seed() -> None:
    scene = small(Counts(2, 2), simulation={"start_delay_s": 20.0, "mean_hours_between_failures": 0.2})
    runs = [Simulation(scene, steady(0.3, 1200), FIXED, seed).run().changes for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]
    assert sum(change.outcome == "lost" for change in runs[0]) > 2


def test_slow_machines_slow_down_all() -> None:
    """One attention and one FFN rank on machines of one kind: every stage but the transfer is twice as long."""

    def tpot(slowness: float) -> float:
        scene = small(simulation={"nodes": [{"actors": 2, "slowness": slowness}]})
        return float(play(FIXED, steady(0.1, 60), scene).summary()["tpot_ms"]["p50"])

    assert tpot(2.0) == pytest.approx(2 * tpot(1.0), rel=0.1)


def test_a_resize_goes_through_the_protocols_phases_and_deadlines() -> None:
    assert timetable({"provide": 20, "load": 5, "connect": 1}, Deadlines())[:2] == (26, 26)
    late = timetable({"provide": 20, "connect": 40}, Deadlines(connect_s=30))
    assert (late.end_s, late.failed) == (50, "connect")


def test_a_full_queue_refuses() -> None:
    outcome = play(FIXED, steady(100, 20), small(server={"max_queued_requests": 10}))
    assert outcome.tally.rejected > 0
    assert outcome.tally.completions + outcome.tally.rejected == outcome.tally.arrivals == 2000
    assert outcome.attainment <= outcome.tally.completions / 2000


# --- stage times ----------------------------------------------------------------------------------------------------------------


def test_a_profile_is_followed_at_its_points_between_and_beyond(tmp_path: Path) -> None:
    line = LinearStages(CostLine(50, 2, 0.01), CostLine(400, 4), CostLine(10, 0.5))
    points = [(rows, context) for rows in (1, 16, 64) for context in (0, 1000, 50_000)]
    raw = {
        "attention": [{"rows": r, "context_tokens": c, "us": line.attention.duration_us(r, c)} for r, c in points],
        "ffn": [{"rows": r, "us": line.ffn.duration_us(r) / 2, "ranks": 2} for r in (1, 64, 256)],
        "transfer": [{"bytes": 1000 * r, "us": line.transfer.duration_us(r)} for r in (1, 64)],
        "bytes_per_row": 1000,
    }
    (tmp_path / "profile.json").write_text(json.dumps(raw))
    profile = Profile.read(tmp_path / "profile.json")
    for rows in (1, 7, 64, 200):
        assert profile.attention_us(rows) == pytest.approx(line.attention_us(rows))
        assert profile.ffn_us(rows, Shape(2, 2)) == pytest.approx(line.ffn_us(rows, Shape(2, 2)))
        assert profile.transfer_us(rows) == pytest.approx(line.transfer_us(rows))


def test_routed_rows_are_those_with_an_expert_there() -> None:
    assert share_of_rows(1, 48, 3) == 1
    assert share_of_rows(48, 48, 3) == pytest.approx(3 / 48)
    assert share_of_rows(2, 48, 3) == pytest.approx(1 - (24 * 23 * 22) / (48 * 47 * 46))


def test_a_histogram_gives_quantiles_within_a_hundredth() -> None:
    histogram = Histogram()
    for value in range(1, 10_001):
        histogram.add(value / 7)
    assert histogram.quantiles(0.5, 0.95, 0.99) == pytest.approx([5000 / 7, 9500 / 7, 9900 / 7], rel=0.01)
    assert Histogram().quantiles(0.5) is None
