"""Something to do on the event loop after a while, unless it is called off."""

import asyncio
from collections.abc import Callable
from typing import Any


class Alarm:
    """At most one thing at a time."""

    def __init__(self) -> None:
        self._timer: asyncio.TimerHandle | None = None

    def set(self, delay_s: float, function: Callable[..., None], *args: Any) -> None:
        """Instead of what it was set to before."""
        self.call_off()
        self._timer = asyncio.get_running_loop().call_later(delay_s, function, *args)

    def call_off(self) -> None:
        """Harmless when it is not set."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
