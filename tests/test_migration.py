"""Whether a request brings its keys and values along: decided by what stages and links have been measured to take."""

import pytest

from afd_ray.engine.kv_cache import BlockAllocator
from afd_ray.engine.migration import Prospect, recompute_s
from afd_ray.engine.moving_in import MovingIn
from afd_ray.engine.scheduler import Scheduler
from afd_ray.engine.stage_costs import CostLine, StageCosts
from afd_ray.handoff.kv_fetcher import UNKNOWN_BYTES, UNKNOWN_LATENCY_S, UNKNOWN_S, KVFetcher, LinkRate
from afd_ray.request import KVTicket, Request
from tests.engine_cache import TINY, cache_of

COSTS = StageCosts(CostLine(100, 2, 0.5), CostLine(50, 1), CostLine(10, 0.2))
NOT_MEASURED = StageCosts(CostLine(), CostLine(), CostLine())
TICKET = KVTicket("127.0.0.1:1", b"k" * 16, positions=40, size_bytes=40 * 4096)


class Deaf(KVFetcher):
    """Whose queue nobody works on."""

    def __init__(self) -> None:
        super().__init__("127.0.0.1", b"secret", 0)
        self.given_back: list[KVTicket] = []

    def give_back(self, ticket: KVTicket) -> None:
        self.given_back.append(ticket)

    def seems(self, latency_s: float, bytes_per_s: float) -> None:
        for _ in range(50):
            self._rate(TICKET).note(latency_s, int(bytes_per_s), 1.0)


def test_computing_again_goes_chunk_by_chunk_through_every_layer() -> None:
    one = 3 * (160 + 3.2 * 8 + 0.5 * 8) / 1e6
    assert recompute_s(COSTS, layers=3, rows=8, rows_at_once=8) == pytest.approx(one)
    two = one + 3 * (160 + 3.2 * 2 + 0.5 * 10) / 1e6
    assert recompute_s(COSTS, layers=3, rows=10, rows_at_once=8) == pytest.approx(two)
    assert recompute_s(NOT_MEASURED, layers=3, rows=10, rows_at_once=8) is None


@pytest.mark.parametrize(
    ("prospect", "fetches"), [(Prospect(1.0, 1.1), True), (Prospect(1.1, 1.0), False), (Prospect(1.0, None), True)]
)
def test_the_sooner_way_is_taken_and_copying_where_nothing_is_known(prospect: Prospect, fetches: bool) -> None:
    assert prospect.fetches == fetches


def test_a_link_is_taken_for_slow_until_it_has_shown_what_it_is() -> None:
    rate = LinkRate()
    assert rate.expected_s(10_000_000) == pytest.approx(UNKNOWN_LATENCY_S + 10_000_000 / UNKNOWN_BYTES * UNKNOWN_S)
    for _ in range(30):
        rate.note(0.002, 50_000_000, 0.05)
    assert rate.expected_s(0) == pytest.approx(0.002, rel=0.01)
    assert rate.expected_s(10_000_000) == pytest.approx(0.012, rel=0.01)
    for _ in range(30):
        rate.note(0.002, 1_000_000, 1.0)
    assert rate.expected_s(1_000_000) == pytest.approx(1.0, rel=0.1), "a link that has become slow"


def moving_in(fetcher: KVFetcher) -> MovingIn:
    allocator = BlockAllocator(100, 16)
    scheduler = Scheduler(
        allocator=allocator,
        slots=1,
        max_tokens_per_micro_batch=16,
        max_running_requests=8,
        max_context=1000,
        eos_token_ids=(),
    )
    return MovingIn(scheduler, cache_of(TINY), fetcher)


def test_a_fast_link_brings_it_and_a_slow_one_does_not() -> None:
    fetcher = Deaf()
    side = moving_in(fetcher)
    fetcher.seems(1e-3, 1e9)
    assert side.weigh(TICKET, 60, COSTS) == TICKET
    assert (side.moved.recomputed, fetcher.given_back) == (0, [])
    fetcher.seems(1e-3, 1e4)
    assert side.weigh(TICKET, 60, COSTS) is None
    assert (side.moved.recomputed, fetcher.given_back) == (1, [TICKET])


def test_the_last_tokens_row_is_computed_here() -> None:
    side = moving_in(Deaf())
    taken = side.weigh(TICKET, 40, NOT_MEASURED)
    assert taken is not None
    assert taken.positions == 39
    assert side.weigh(TICKET, 1, NOT_MEASURED) is None


def test_each_way_counts_what_is_ahead_on_it() -> None:
    fetcher = Deaf()
    side = moving_in(fetcher)
    alone = side.prospect(TICKET, COSTS)
    side._scheduler.add(Request("fetched", (1,) * 50), (), TICKET)
    behind_a_fetch = side.prospect(TICKET, COSTS)
    assert behind_a_fetch.fetch_s > alone.fetch_s
    assert alone.recompute_s is not None
    assert behind_a_fetch.recompute_s is not None
    side._scheduler.add(Request("computed", (1,) * 50))
    behind_both = side.prospect(TICKET, COSTS)
    assert behind_both.fetch_s == behind_a_fetch.fetch_s
    assert behind_both.recompute_s is not None
    assert behind_both.recompute_s > behind_a_fetch.recompute_s > alone.recompute_s


def test_what_came_without_a_ticket_counts_as_computed_again() -> None:
    side = moving_in(Deaf())
    assert side.weigh(None, 60, COSTS) is None
    assert side.moved.recomputed == 1
