"""The colocated step loop: every attention rank computes whole layers by itself, with the same halves and no messages.

What attention-FFN disaggregation is to be compared with.
"""

import time

from afd_ray.engine.attention import AttentionLoop, Publish
from afd_ray.engine.flight import Flight
from afd_ray.engine.kv_cache import PagedCache
from afd_ray.engine.pace import Pace, hold
from afd_ray.engine.passage import Begin, HostPassage
from afd_ray.engine.scheduler import Scheduler
from afd_ray.engine.stage_costs import FlightTimes
from afd_ray.models.step3 import AttentionHalf, FFNHalf, Routed


class ColocatedLoop(AttentionLoop):
    """An attention rank that holds every FFN too: what it would dispatch it computes as the slot's next stage."""

    def __init__(
        self,
        half: AttentionHalf,
        ffn: FFNHalf,
        cache: PagedCache,
        scheduler: Scheduler,
        publish: Publish,
        pace: Pace | None = None,
        ffn_pace: Pace | None = None,
        begin: Begin = HostPassage,
    ) -> None:
        """`ffn` holds all experts, uncut, and takes rows where `begin` has them."""
        super().__init__(half, cache, scheduler, publish, pace, begin)
        self.ffn, self.ffn_pace = ffn, ffn_pace
        self._routed: dict[int, Routed] = {}

    def _take_back(self) -> None:
        super()._take_back()
        self._routed = {}

    def _announce(self, slot: int, flight: Flight) -> None:
        """Nobody waits for this slot's rows."""

    def _park(self, slot: int) -> None:
        """Nobody waits for this slot."""

    def _attend(self, slot: int, flight: Flight, started_ns: int) -> None:
        if not flight.passage.whole:
            super()._attend(slot, flight, started_ns)
            return
        flight.layer = self.half.config.num_hidden_layers - 1
        self._next_layer(flight)
        self._free_ns = time.monotonic_ns()
        flight.observed.attended((self._free_ns - started_ns) / 1000)

    def _dispatch(self, slot: int, flight: Flight, routed: Routed) -> None:
        self._routed[slot] = routed

    def _advance(self, slot: int) -> None:
        routed = self._routed.pop(slot, None)
        if routed is None:
            super()._advance(slot)
        else:
            self._feed_forward(slot, routed)

    def _feed_forward(self, slot: int, routed: Routed) -> None:
        started_ns = time.monotonic_ns()
        flight = self._flights[slot]
        assert flight is not None
        flight.passage.add(self.ffn(flight.layer, routed))
        hold(self.ffn_pace, started_ns, flight.rows)
        flight.observed.fed((time.monotonic_ns() - started_ns) / 1000)
        self._record("ffn", slot, flight.layer, flight.step, flight.rows, started_ns)
        self._next_layer(flight)

    def _measure(self, flight: Flight) -> None:
        if flight.passage.whole:  # nobody can tell its layers apart, nor its halves
            mean_us, flight.observed = flight.observed.attention / flight.layer, FlightTimes()
            for _ in range(flight.layer):
                flight.observed.attended(mean_us)
        super()._measure(flight)
