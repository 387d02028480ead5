"""What was measured in the last minute, from looks that were taken at sums."""

from collections import deque
from collections.abc import Callable
from typing import Generic, Protocol, Self, TypeVar

WINDOW_S = 60.0
PERIOD_S = 5.0
"""Between the looks that are kept: the last minute is known to this."""


class Look(Protocol):
    """Sums at one moment (`Measured`, `MeasuredFFN`)."""

    @property
    def at_s(self) -> float: ...

    def since(self, earlier: Self) -> Self: ...


L = TypeVar("L", bound=Look)


class Lookback(Generic[L]):
    """Keeps the looks of the last minute. Whoever owns it calls `turn` every PERIOD_S."""

    def __init__(self, look: Callable[[], L]) -> None:
        self._look = look
        self._looks = deque([look()], maxlen=round(WINDOW_S / PERIOD_S) + 1)

    def turn(self) -> None:
        self._looks.append(self._look())

    def recent(self) -> L:
        """From the oldest look that is within the window until now; from the last one where a turn is long due."""
        now = self._look()
        within = (look for look in self._looks if now.at_s - look.at_s <= WINDOW_S)
        return now.since(next(within, self._looks[-1]))
