"""What a receiving thread waits on when some of its edges are sockets, and what it does when one of them is ready."""

import os
import select
import threading
from collections.abc import Callable
from enum import Enum, auto
from socket import socket
from typing import Protocol


class Pumped(Enum):
    """What a source is after a pump."""

    OPEN = auto()
    FULL = auto()
    """There is no room for what it has: nothing was taken."""
    OVER = auto()


class Source(Protocol):
    """A connection with something to read."""

    @property
    def connection(self) -> socket: ...

    def pump(self) -> Pumped:
        """Take what has arrived, without waiting."""


class Intake:
    """The sockets of one receiver; `look` belongs to the receiving thread, `poke` to any."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._bell, select.EPOLLIN)
        self._sources: dict[int, Source] = {}
        self._full: list[Source] = []
        self._lock = threading.Lock()

    def __del__(self) -> None:
        os.close(self._bell)  # with the last user: another thread may be in `look` until then

    def add(self, source: Source) -> None:
        """Read from this source whenever it has something."""
        self._sources[source.connection.fileno()] = source
        self._epoll.register(source.connection, select.EPOLLIN)

    def poke(self) -> None:
        """End the current or the next `look`."""
        os.eventfd_write(self._bell, 1)

    def look(self, timeout_s: float | None) -> None:
        """Take what has arrived; waits for the first of it, or for a poke, at most this long."""
        if self._full and self._resume():
            timeout_s = 0.0  # the caller shall see what that was
        for descriptor, _ in self._epoll.poll(timeout_s):
            if descriptor == self._bell:
                os.eventfd_read(self._bell)
            else:
                self._pump(descriptor)

    def close(self, last_work: Callable[[], None]) -> None:
        """Look at no source any more, and do `last_work` while none is being looked at."""
        with self._lock:
            self._sources.clear()
            self._full.clear()
            last_work()

    def _pump(self, descriptor: int) -> None:
        with self._lock:
            source = self._sources.get(descriptor)
            if source is None:
                return
            state = source.pump()
            if state is not Pumped.OPEN:
                self._epoll.unregister(descriptor)
            if state is Pumped.FULL:
                self._full.append(source)

    def _resume(self) -> bool:
        """Try the full ones again; whether any of them went on."""
        with self._lock:
            waiting, self._full = self._full, []
            for source in waiting:
                state = source.pump()
                if state is Pumped.OPEN:
                    self._epoll.register(source.connection, select.EPOLLIN)
                elif state is Pumped.FULL:
                    self._full.append(source)
            return len(self._full) < len(waiting)
