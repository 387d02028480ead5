"""Stage times, latencies, overlap and the Chrome trace."""

from afd_ray.telemetry import Recorder, StageEvent, chrome_trace, overlap, quantiles_ms


def event(stage: str, start_ns: int, end_ns: int, slot: int = 0) -> StageEvent:
    return StageEvent(stage, slot, 0, 1, 4, start_ns, end_ns)


def test_a_recorder_counts_always_and_keeps_events_only_while_tracing() -> None:
    recorder = Recorder()
    recorder.record(*event("ffn", 0, 3000))
    recorder.start_trace()
    recorder.record(*event("ffn", 4000, 5000))
    assert recorder.take_trace() == [event("ffn", 4000, 5000)]
    recorder.record(*event("ffn", 6000, 7000))
    assert recorder.take_trace() == []
    (ffn_us,) = recorder.stages_us().values()
    assert (ffn_us.count, ffn_us.total, recorder.runs("ffn"), recorder.runs("attention")) == (3, 5.0, 3, 0)


def test_quantiles_by_nearest_rank() -> None:
    assert quantiles_ms([]) is None
    assert quantiles_ms([3.0, 1.0, 2.0]) == {"p50": 2.0, "p95": 3.0, "p99": 3.0}


def test_overlap_of_actors_that_work_at_the_same_time_and_of_actors_that_take_turns() -> None:
    together = [[event("attention", 0, 100)], [event("ffn", 0, 100)]]
    turns = [[event("attention", 0, 50), event("attention", 100, 150)], [event("ffn", 50, 100), event("ffn", 150, 200)]]
    found = overlap(together)
    assert found is not None
    assert found.figure == 2.0
    alternating = overlap(turns)
    assert alternating is not None
    assert alternating.figure == 1.0


def test_overlap_leaves_out_waiting_and_what_is_outside_the_common_window() -> None:
    found = overlap(
        [[event("attention", 0, 100), event("attention_wait", 100, 200)], [event("ffn", 50, 80), event("ffn", 90, 400)]]
    )
    assert found is not None
    assert found.busy == (1.0, 0.8)
    assert overlap([[event("attention", 0, 10)], []]) is None


def test_a_chrome_trace_has_a_process_for_each_actor_and_a_lane_for_each_slot() -> None:
    actors = [
        {"name": "attention-0", "offset_ns": 0, "events": [list(event("attention", 1000, 3000)), list(event("f2a", 3000, 4000))]},
        {"name": "ffn-0", "offset_ns": 500, "events": [list(event("ffn", 2000, 3000, slot=1))]},
    ]
    events = chrome_trace(actors)["traceEvents"]
    names = {(e["pid"], e["name"]): e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "process_name"}
    assert names == {(0, "process_name"): "attention-0", (1, "process_name"): "ffn-0"}
    lanes = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert set(lanes.values()) == {"micro-batch 0", "micro-batch 0 arriving", "micro-batch 1"}
    spans = {(e["pid"], e["name"]): (e["ts"], e["dur"]) for e in events if e["ph"] == "X"}
    assert spans == {(0, "attention L0"): (0.0, 2.0), (0, "f2a L0"): (2.0, 1.0), (1, "ffn L0"): (1.5, 1.0)}
