"""Latencies and counts of one attention rank's requests."""

from afd_ray.engine.request_clocks import RequestClocks, Targets
from afd_ray.request import TokenOutput


def tokens(*request_ids: str) -> list[TokenOutput]:
    return [TokenOutput(request_id, 7) for request_id in request_ids]


def test_the_first_token_counts_from_arrival_and_others_from_the_one_before() -> None:
    clocks = RequestClocks()
    clocks.start("a", 1.0)
    clocks.start("b", 2.0)
    clocks.note(tokens("a", "b"), 4.0)
    clocks.note(tokens("a"), 5.0)
    clocks.note(tokens("a", "b"), 5.5)
    assert (clocks.ttft_ms.count, clocks.ttft_ms.total) == (2, 5000.0)
    assert (clocks.tpot_ms.count, clocks.tpot_ms.total) == (3, 1000.0 + 500.0 + 1500.0)
    assert (clocks.tokens_per_step.count, clocks.output_tokens) == (3, 5)


def test_a_request_waits_until_its_first_rows_are_scheduled_and_only_once() -> None:
    clocks = RequestClocks()
    clocks.start("a", 1.0)
    clocks.start("b", 2.0)
    assert clocks.oldest_waiting_s(4.0) == 3.0
    clocks.schedule(["a"], 4.5)
    clocks.schedule(["a"], 9.0)  # preempted, and begun again
    assert (clocks.queue_wait_ms.count, clocks.queue_wait_ms.total) == (1, 3500.0)
    assert clocks.oldest_waiting_s(6.0) == 4.0
    clocks.forget("b")
    assert clocks.oldest_waiting_s(6.0) is None


def test_what_moved_in_neither_came_new_nor_waits() -> None:
    clocks = RequestClocks()
    clocks.start("m", 1.0, continued=True)
    clocks.note(tokens("m"), 2.0)
    clocks.note(tokens("m"), 2.5)
    assert (clocks.arrivals, clocks.ttft_ms.count, clocks.tpot_ms.total) == (0, 0, 500.0)
    assert clocks.oldest_waiting_s(3.0) is None


def test_who_ends_is_counted_and_who_is_given_up_is_not() -> None:
    clocks = RequestClocks()
    for request_id in ("a", "b"):
        clocks.start(request_id, 0.0)
    clocks.forget("b")
    clocks.note([TokenOutput("a", 7, finish_reason="length"), TokenOutput("b", 7, finish_reason="length")], 1.0)
    assert clocks.completions == 1


def test_late_is_whose_first_token_or_tokens_on_average_came_beyond_the_targets() -> None:
    clocks = RequestClocks(Targets(ttft_ms=1000, tpot_ms=100))
    last_s = {"in time": 1.2, "first late": 2.2, "tokens late": 1.25}
    for request_id in last_s:
        clocks.start(request_id, 0.0)
    clocks.start("moved in, in time", 0.0, continued=True)
    clocks.note(tokens("in time", "tokens late"), 1.0)
    clocks.note(tokens("in time", "tokens late"), 1.15)  # one long gap is made up for
    clocks.note(tokens("first late", "moved in, in time"), 2.0)
    for request_id, at_s in [*last_s.items(), ("moved in, in time", 2.1)]:
        clocks.note([TokenOutput(request_id, 7, finish_reason="length")], at_s)
    assert (clocks.completions, clocks.late) == (4, 2)


def test_without_targets_nobody_is_late() -> None:
    clocks = RequestClocks()
    clocks.start("a", 0.0)
    clocks.note([TokenOutput("a", 7, finish_reason="length")], 1e6)
    assert (clocks.completions, clocks.late) == (1, 0)
