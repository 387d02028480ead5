"""Requests that come to an attention rank from another one: with their keys and values, where that is cheaper than computing them again."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from afd_ray.engine.kv_cache import PagedCache
from afd_ray.engine.migration import Prospect, recompute_s
from afd_ray.engine.scheduler import Scheduler
from afd_ray.engine.sequence import Sequence
from afd_ray.engine.stage_costs import StageCosts
from afd_ray.handoff.kv_fetcher import KVFetcher
from afd_ray.request import KVTicket


@dataclass(slots=True)
class Moved:
    """How the requests came that had begun elsewhere."""

    with_kv: int = 0
    recomputed: int = 0
    """It was cheaper so, there was nothing to fetch, or the fetch failed."""
    failed: int = 0
    """Fetches that did."""
    kv_bytes: int = 0
    kv_ms: float = 0.0
    """Spent fetching them."""


class Arrival(NamedTuple):
    """How a fetch ended."""

    request_id: str
    positions: int
    """That have come; 0: it failed."""
    size_bytes: int
    duration_s: float


class MovingIn:
    """Belongs to the step loop's thread; nothing here waits."""

    def __init__(self, scheduler: Scheduler, cache: PagedCache, fetcher: KVFetcher) -> None:
        self.moved = Moved()
        self.fetcher = fetcher
        self._scheduler, self._cache = scheduler, cache

    def weigh(self, ticket: KVTicket | None, tokens: int, costs: StageCosts) -> KVTicket | None:
        """What of it to fetch for a request of so many tokens; None: all of it is computed here, and the ticket is given back.

        The last token's row is computed in any case: it chooses the next token.
        """
        if ticket is not None:
            wanted = ticket._replace(positions=min(ticket.positions, tokens - 1))
            if wanted.positions and self.prospect(wanted, costs).fetches:
                return wanted
            self.fetcher.give_back(ticket)
        self.moved.recomputed += 1
        return None

    def prospect(self, ticket: KVTicket, costs: StageCosts) -> Prospect:
        """Either way after what is to go that way before."""
        scheduler, cache = self._scheduler, self._cache
        ahead = sum(sequence.ticket.positions for sequence in scheduler.sequences if sequence.ticket)
        fetch_s = self.fetcher.expected_s(ticket, (ahead + ticket.positions) * cache.token_bytes)
        rows = scheduler.load.prefill + ticket.positions
        return Prospect(fetch_s, recompute_s(costs, cache.layers, rows, scheduler.token_budget))

    def fetch_admitted(self, call: Callable[[Callable[[], None]], object]) -> None:
        """Have the keys and values of sequences that have just got blocks brought into these. `call`: runs something on the step loop's thread."""
        for sequence in self._scheduler.to_fetch:
            self._fetch(sequence, lambda arrival: call(lambda: self._take(arrival)))

    def _fetch(self, sequence: Sequence, arrive: Callable[[Arrival], object]) -> None:
        """`arrive` is called on another thread when it is over."""
        ticket, sequence.ticket = sequence.ticket, None
        assert ticket is not None
        positions, size_bytes = ticket.positions, ticket.positions * self._cache.token_bytes

        def done(duration_s: float, failure: str) -> None:
            arrive(Arrival(sequence.id, 0 if failure else positions, size_bytes, duration_s))

        self.fetcher.fetch(ticket, positions, size_bytes, self._cache.incoming(sequence.block_table, positions), done)

    def _take(self, arrival: Arrival) -> None:
        """The sequence can be scheduled."""
        moved = self.moved
        if arrival.positions:
            moved.with_kv += 1
            moved.kv_bytes += arrival.size_bytes
            moved.kv_ms += arrival.duration_s * 1000
        else:
            moved.recomputed += 1
            moved.failed += 1
        self._scheduler.arrived(arrival.request_id, arrival.positions)
