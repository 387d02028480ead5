"""How long a receiver looks for a message that is due before it sleeps."""

SPIN_US = 5000.0
"""How long an actor looks for a message that is due before it parks, where the host has a core for each: a few stages, for a core that
has slept computes the next one at half its speed (virtual machines; measured 2.1 ms where 1.3 ms is possible)."""

_MOST_SKIPPED = 64


class Spin:
    """Follows the recent waits: pays after one that ended within the bound; each look in vain makes the next come later.

    Where actors share a core, looking keeps it from whoever is to send: sleeping then serves both sooner.
    """

    def __init__(self, bound_s: float) -> None:
        self._bound_s = bound_s
        self._in_vain = 0
        self._skips = 0
        """Short waits to sleep through before the next look."""

    @property
    def budget_s(self) -> float:
        """For the next wait."""
        return 0.0 if self._skips else self._bound_s

    def learn(self, waited_s: float) -> None:
        """Of a wait in which a message was due, however it was spent."""
        short = waited_s < self._bound_s
        if self._skips:
            self._skips -= short
        elif short:
            self._in_vain = 0
        else:
            self._in_vain += 1
            self._skips = min(1 << (self._in_vain - 1), _MOST_SKIPPED)
