"""How long a client that found the queue full is told to wait."""

from actors.queue_pace import LONGEST_S, REMEMBERED, QueuePace


def test_before_any_request_has_left_it_is_a_second() -> None:
    assert QueuePace().wait_s(1000, 5.0) == 1


def test_it_is_what_the_queue_takes_at_the_pace_of_the_last_requests() -> None:
    pace = QueuePace()
    for request in range(10):
        pace.left(100.0 + request * 0.5)
    assert pace.wait_s(20, 105.0) == 10
    assert pace.wait_s(1, 105.0) == 1
    assert pace.wait_s(10_000, 105.0) == LONGEST_S


def test_a_queue_that_has_come_to_a_stand_gets_slower() -> None:
    pace = QueuePace()
    for request in range(10):
        pace.left(request * 0.1)
    assert pace.wait_s(10, 1.0) < pace.wait_s(10, 20.0)


def test_old_requests_are_forgotten() -> None:
    pace = QueuePace()
    pace.left(0.0)
    for request in range(REMEMBERED):
        pace.left(1000.0 + request * 0.1)
    assert pace.wait_s(10, 1000.0 + REMEMBERED * 0.1) <= 2
