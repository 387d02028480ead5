"""What is logged of strangers who were turned away: enough to find them, and not so much that they fill a disk."""

import logging
import time
from collections.abc import Callable

PERIOD_S = 60.0
TOLD_IN_A_PERIOD = 10


class RefusalLog:
    """One line for each refused connection, at most TOLD_IN_A_PERIOD of them in PERIOD_S; of the others, later, how many they were."""

    def __init__(self, logger: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._logger, self._clock = logger, clock
        self._since_s, self._count = clock(), 0

    def add(self, who: str, why: str) -> None:
        """`who`: an address; `why`: one line."""
        now_s = self._clock()
        if now_s - self._since_s >= PERIOD_S:
            if self._count > TOLD_IN_A_PERIOD:
                self._logger.warning("refused %d connections more before this", self._count - TOLD_IN_A_PERIOD)
            self._since_s, self._count = now_s, 0
        self._count += 1
        if self._count <= TOLD_IN_A_PERIOD:
            last = "; more of them are only counted for a while" if self._count == TOLD_IN_A_PERIOD else ""
            self._logger.warning("refused a connection from %s: %s%s", who, why, last)
