"""How long a receiver looks for a message that is due before it sleeps."""


class Spin:
    """Follows the last wait: worth it after one that ended within the bound, and not after one that was longer."""

    def __init__(self, bound_s: float) -> None:
        self._bound_s = bound_s
        self._worth_it = bound_s > 0.0

    @property
    def budget_s(self) -> float:
        """For the next wait."""
        return self._bound_s if self._worth_it else 0.0

    def learn(self, waited_s: float) -> None:
        """Of a wait in which a message was due, however it was spent."""
        self._worth_it = waited_s < self._bound_s
