"""A member's side of an epoch change: what it does, and what it refuses because it comes too late."""

import pytest

from afd_ray.membership.attempts import Journal
from afd_ray.membership.seat import Seat, Stale


def seated(number: int = 1) -> Seat:
    seat = Seat("attention-0")
    seat.load(number)
    seat.prepare(number)
    seat.connect(number)
    seat.switch(number)
    seat.retire(number)
    return seat


def test_a_change_goes_through() -> None:
    seat = seated()
    seat.load(2)
    assert seat.prepare(2) == 0
    seat.connect(2)
    seat.drain(2)
    assert (seat.serving, seat.standby, seat.may_run) == (1, 2, False)
    assert seat.switch(2)
    assert (seat.serving, seat.standby, seat.may_run, seat.left) == (2, 0, True, {1})
    assert seat.retire(2) == {1}
    assert not seat.switch(2), "harmless when repeated"
    assert seat.retire(2) == set()


def test_a_change_is_given_up() -> None:
    seat = seated()
    seat.prepare(2)
    seat.move_out(2)
    seat.drain(2)
    seat.resume(2)
    assert (seat.may_run, seat.moving_out) == (True, 0)
    assert seat.discard(2) == 2
    assert seat.discard(2) == 0, "harmless when repeated"
    seat.resume(2)
    for late in (seat.load, seat.prepare, seat.connect, seat.drain, seat.move_out, seat.switch):
        with pytest.raises(Stale, match=r"attention-0: .* epoch 2"):
            late(2)
    assert seat == seated_after(2)


def seated_after(given_up: int) -> Seat:
    seat = seated()
    seat.coming = seat.over = given_up
    return seat


def test_it_goes_on_by_itself_and_may_switch_all_the_same() -> None:
    seat = seated()
    seat.prepare(2)
    seat.drain(2)
    seat.overdue(2)
    assert seat.may_run
    assert seat.switch(2)


def test_who_is_held_at_the_boundary() -> None:
    seat = seated()
    assert not seat.held(2)
    seat.drain(2)
    assert seat.held(2)
    assert not seat.held(1)
    seat.overdue(2)
    assert not seat.held(2)


def test_who_moves_out_is_not_held_but_waits_for_its_end() -> None:
    seat = seated()
    seat.move_out(2)
    seat.drain(2)
    assert not seat.held(2)
    assert not seat.may_run


def test_the_deadline_of_an_earlier_drain_ends_no_later_one() -> None:
    seat = seated()
    seat.drain(2)
    seat.resume(2)
    seat.drain(3)
    seat.overdue(2)
    assert not seat.may_run


def test_a_later_epoch_replaces_the_one_it_was_to_enter() -> None:
    seat = seated()
    seat.load(2)
    seat.prepare(2)
    seat.load(3)
    for late in (seat.load, seat.prepare, seat.connect, seat.switch):
        with pytest.raises(Stale, match="gets ready for 3"):
            late(2)
    assert seat.prepare(3) == 2
    assert seat.switch(3)


def test_a_broken_seat_runs_nothing_until_a_later_one_is_entered() -> None:
    seat = seated()
    assert seat.broke(1)
    assert not seat.broke(1), "told once"
    assert seat.failed(1)
    assert not seat.may_run
    seat.prepare(2)
    seat.switch(2)
    assert seat.may_run
    assert not seat.broke(1)


def test_a_standby_seat_that_broke_is_entered_broken() -> None:
    seat = seated()
    seat.prepare(2)
    assert seat.broke(2)
    assert seat.may_run, "the old epoch serves on"
    seat.switch(2)
    assert seat.failed(2)
    assert not seat.may_run


def test_who_has_no_place_in_an_epoch_is_left_without_a_seat_and_may_get_one_later() -> None:
    seat = seated()
    seat.prepare(2)
    assert seat.retire(3) == {1, 2}
    assert (seat.serving, seat.standby, seat.may_run) == (0, 0, False)
    seat.prepare(4)
    assert seat.switch(4)


def test_no_epoch_is_gone_back_to() -> None:
    seat = seated(5)
    for late in (seat.load, seat.prepare, seat.connect, seat.drain, seat.move_out, seat.switch, seat.resume, seat.retire):
        with pytest.raises(Stale):
            late(4)
    assert seat.discard(4) == 0


def test_only_the_last_attempt_is_believed_and_only_the_next_token() -> None:
    journal = Journal()
    first = journal.begin()
    assert journal.accept(first, 0, 70)
    second = journal.begin()
    assert not journal.accept(first, 1, 71), "of an attempt that was given up"
    assert not journal.accept(second, 0, 70), "a token that the client has"
    assert not journal.accept(second, 2, 72), "a token was lost on the way"
    assert journal.accept(second, 1, 71)
    assert journal.tokens == [70, 71]
