"""What an attention actor that leaves keeps for those that go on with its requests: their keys and values, until they are fetched."""

import os
import time
from contextlib import suppress

from afd_ray.engine.attention import AttentionLoop
from afd_ray.engine.left_behind import LeftBehind
from afd_ray.handoff.kv_server import KVServer, Lot
from afd_ray.handoff.kv_wire import KEY_BYTES, KVOrder
from afd_ray.request import KVTicket

UNASKED_S = 2.0
"""When nobody has asked for anything for so long, nobody will: the clients of what is left have gone, or their requests wait elsewhere."""
ANSWER_S = 10.0


class Departure:
    """One moving out. `tickets` is called on the step loop's thread, the other methods on any but that and the event loop's."""

    def __init__(self, loop: AttentionLoop, host: str, secret: bytes, digest: int) -> None:
        self.left = LeftBehind(loop.scheduler, loop.cache, lambda: os.urandom(KEY_BYTES))
        self._loop = loop
        self._server = KVServer(host, secret, digest, self._lend, self._let_go)

    def tickets(self) -> dict[str, KVTicket | None]:
        """Every request, taken out of the loop; None: nothing of it can be fetched."""
        kept = self._loop.hand_over(self.left)
        return {request_id: KVTicket(self._server.address, *what) if what else None for request_id, what in kept.items()}

    def await_taken(self, bound_s: float) -> None:
        """Return when all is taken or given back, when nobody asks for it any more, or after `bound_s`."""
        left, end_s = self.left, time.monotonic() + bound_s
        asked = -1
        while (left.asked != asked or left.lending) and time.monotonic() < end_s:
            asked = left.asked
            if left.empty.wait(min(UNASKED_S, end_s - time.monotonic())):
                return

    def close(self) -> None:
        """Nothing can be fetched any more, and no block is held."""
        self._server.close()
        with suppress(RuntimeError):  # the step loop is over, and its cache with it
            self._loop.call(self.left.give_up).result(ANSWER_S)

    def _lend(self, order: KVOrder) -> Lot | None:
        return self._loop.call(lambda: self.left.lend(order)).result(ANSWER_S)

    def _let_go(self, key: bytes) -> None:
        self._loop.call(lambda: self.left.let_go(key)).result(ANSWER_S)
