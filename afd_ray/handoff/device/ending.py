"""What all links between devices do alike: order things to streams until all is over, and then end in the background."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable

from afd_ray.handoff.device.streams import Device, Mark, Stream
from afd_ray.handoff.message import LinkError

CLOSED = "this member has closed its links"
OWN = -1
"""For the peer of an error that is nobody's."""


class Ending(ABC):
    """A carrier's orders are given under `orders`, by `stream()`; once all is over nobody gives any more, and `wind_up` runs on a thread of its own."""

    def __init__(self, device: Device) -> None:
        self.device, self.orders = device, threading.Lock()
        self.over: LinkError | None = None
        self.farewell: Callable[[], None] = lambda: None
        """Closes the host's links, if they are not yet."""
        self._used: set[Stream] = set()
        self._ending = threading.Lock()
        self._end: threading.Thread | None = None

    def stream(self) -> Stream:
        """This thread's, for orders given under the lock; LinkError once all is over: nothing may wait then."""
        if self.over is not None:
            raise self.over
        stream = self.device.stream()
        self._used.add(stream)
        return stream

    def marks(self) -> list[Mark]:
        """Behind all that has been ordered; under the lock."""
        return [stream.mark() for stream in self._used]

    def abandon(self, reason: LinkError) -> None:
        """As `Carrier.abandon`."""
        with self._ending:
            if self._end is not None:
                return
            self.over = reason
            self.warn()
            self._end = threading.Thread(target=self.wind_up, name="device-links-end", daemon=True)
            self._end.start()

    def close(self) -> None:
        """As `Carrier.close`."""
        self.abandon(LinkError(OWN, CLOSED))

    def wait_closed(self, timeout_s: float) -> bool:
        """Whether all memory has been given back by then."""
        if self._end is not None:
            self._end.join(timeout_s)
        return self._end is not None and not self._end.is_alive()

    @abstractmethod
    def warn(self) -> None:
        """Whoever might believe what streams give that are let go; before any is."""

    @abstractmethod
    def wind_up(self) -> None:
        """Let all streams go on, and give back what is held."""
