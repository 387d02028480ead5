"""The step boundary: who waits until nothing is in flight any more."""

from concurrent.futures import Future


class Boundary:
    """Belongs to the step loop's thread; `draining` may be read by any."""

    def __init__(self) -> None:
        self.draining = False
        """Whether no new micro-batch is begun."""
        self._waiting: list[Future[None]] = []

    def ask(self, reached: "Future[None]") -> None:
        """Drain from now on; `reached` is done at the boundary."""
        self.draining = True
        self._waiting.append(reached)

    def reach(self) -> None:
        """Nothing is in flight. The draining goes on."""
        for future in self._taken():
            future.set_result(None)

    def end(self, reason: str) -> None:
        """Drain no longer; who still waits gets a RuntimeError."""
        self.draining = False
        for future in self._taken():
            future.set_exception(RuntimeError(reason))

    def _taken(self) -> "list[Future[None]]":
        waiting, self._waiting = self._waiting, []
        return waiting
