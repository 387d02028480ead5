"""Keys and values of requests that an attention rank gave back, until others have fetched them or they are given up."""

import threading
from collections.abc import Callable
from typing import NamedTuple

from afd_ray.engine.kv_cache import PagedCache
from afd_ray.engine.scheduler import Scheduler
from afd_ray.engine.sequence import Sequence
from afd_ray.handoff.kv_server import Lot
from afd_ray.handoff.kv_wire import KVAnswer, KVOrder


class Kept(NamedTuple):
    """A request's keys and values, for whoever knows the key."""

    key: bytes
    positions: int
    size_bytes: int


class LeftBehind:
    """Belongs to the step loop's thread, but for `empty`, `asked` and `lending`. What is lent stays until it is let go of."""

    def __init__(self, scheduler: Scheduler, cache: PagedCache, new_key: Callable[[], bytes]) -> None:
        """`new_key`: nobody can guess what it gives."""
        self.empty = threading.Event()
        """Set while nothing is left."""
        self.empty.set()
        self.asked = 0
        """Orders so far."""
        self._scheduler, self._cache, self._new_key = scheduler, cache, new_key
        self._kept: dict[bytes, Sequence] = {}
        self._lent: set[bytes] = set()

    @property
    def sequences(self) -> list[Sequence]:
        """That hold blocks."""
        return list(self._kept.values())

    @property
    def lending(self) -> bool:
        """Whether somebody reads."""
        return bool(self._lent)

    def keep(self, request_id: str) -> Kept | None:
        """Take the request from the scheduler and keep its blocks; None: it is in flight, or has nothing computed."""
        sequence = self._scheduler.detach(request_id)
        if sequence is None:
            return None
        key = self._new_key()
        self._kept[key] = sequence
        self.empty.clear()
        return Kept(key, sequence.computed, sequence.computed * self._cache.token_bytes)

    def lend(self, order: KVOrder) -> Lot | None:
        """Where it lies, for one reader; None when nothing is kept under this key, not so much of it, or somebody has it already."""
        self.asked += 1
        sequence = self._kept.get(order.key)
        if sequence is None or order.key in self._lent or order.positions > sequence.computed:
            return None
        self._lent.add(order.key)
        answer = KVAnswer(order.positions, order.positions * self._cache.token_bytes)
        return Lot(answer, self._cache.outgoing(sequence.block_table, order.positions))

    def let_go(self, key: bytes) -> None:
        """Free its blocks; harmless when there is nothing."""
        sequence = self._kept.pop(key, None)
        self._lent.discard(key)
        if sequence is not None:
            self._scheduler.allocator.free(sequence.block_table)
        if not self._kept:
            self.empty.set()

    def give_up(self) -> None:
        """Let go of all that is not lent."""
        for key in self._kept.keys() - self._lent:
            self.let_go(key)
