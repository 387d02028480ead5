"""How long a full queue takes to empty, from how fast requests have left it."""

import math
from collections import deque

REMEMBERED = 32
LONGEST_S = 60


class QueuePace:
    """Told of each request that leaves the queue; times are seconds of any one clock."""

    def __init__(self) -> None:
        self._left_s: deque[float] = deque(maxlen=REMEMBERED)

    def left(self, now_s: float) -> None:
        self._left_s.append(now_s)

    def wait_s(self, queued: int, now_s: float) -> int:
        """Whole seconds until `queued` requests have left at the pace of the last ones: 1 to 60, and 1 before any has left."""
        if not self._left_s:
            return 1
        each_s = (now_s - self._left_s[0]) / len(self._left_s)
        return max(1, min(LONGEST_S, math.ceil(queued * each_s)))
