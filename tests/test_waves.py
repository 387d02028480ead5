"""The conductor: which attention ranks' rows make up a wave."""

import random

import pytest

from afd_ray.engine.waves import Conductor, Wave


def test_a_lone_rank_starts_at_once_and_a_running_wave_is_waited_for() -> None:
    conductor = Conductor(attention=2, slots=1)
    assert conductor.announce(0, 0, rows=5) == Wave(0, 1, (5, 0))
    assert conductor.announce(1, 0, rows=3) is None
    assert conductor.finish(0) is None, "rank 0 was in the last wave, its next rows are waited for"
    assert conductor.announce(0, 0, rows=4) == Wave(0, 2, (4, 3))


def test_a_parked_rank_is_not_waited_for() -> None:
    conductor = Conductor(attention=2, slots=1)
    conductor.announce(0, 0, rows=5)
    conductor.announce(1, 0, rows=3)
    conductor.finish(0)
    assert conductor.park(0, 0) == Wave(0, 2, (0, 3))


def test_slots_are_independent() -> None:
    conductor = Conductor(attention=1, slots=2)
    assert conductor.announce(0, 0, rows=1) == Wave(0, 1, (1,))
    assert conductor.announce(0, 1, rows=2) == Wave(1, 1, (2,))


def test_a_second_announcement_is_refused() -> None:
    conductor = Conductor(attention=2, slots=1)
    conductor.announce(0, 0, rows=5)
    conductor.announce(1, 0, rows=1)
    with pytest.raises(ValueError, match="attention rank 1 announced slot 0 twice"):
        conductor.announce(1, 0, rows=1)


@pytest.mark.parametrize("seed", range(20))
def test_every_announcement_is_served_once_whoever_parks_when(seed: int) -> None:
    """Random ranks with random work: nothing is lost, nothing is run twice, nothing waits for ever."""
    rng = random.Random(seed)
    ranks = 3
    conductor = Conductor(ranks, slots=1)
    left = [rng.randint(1, 6) for _ in range(ranks)]
    total = list(left)
    served = [0] * ranks
    busy: set[int] = set()
    running: Wave | None = None
    idle = set(range(ranks))
    for _ in range(200):
        if running is not None and rng.random() < 0.5:
            for member in running.members:
                served[member] += 1
                busy.discard(member)
            finished, running = running, conductor.finish(0)
            for member in finished.members:
                if left[member]:
                    idle.add(member)
                else:
                    running = conductor.park(member, 0) or running
        elif idle:
            rank = rng.choice(sorted(idle))
            idle.discard(rank)
            left[rank] -= 1
            busy.add(rank)
            running = conductor.announce(rank, 0, rows=1) or running
    assert served == total
    assert running is None
    assert not busy
