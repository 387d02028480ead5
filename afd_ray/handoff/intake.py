"""What a receiving thread waits on when some of its edges are sockets, and what it does when one of them is ready."""

import os
import select
import threading
from collections.abc import Callable
from contextlib import suppress
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
    @property
    def bulky(self) -> bool:
        """Whether its recent messages were larger than what the kernel holds for it."""

    def pump(self) -> Pumped:
        """Take what has arrived, without waiting."""


class Intake:
    """The sockets of one receiver; `look` belongs to the receiving thread, `help` to one other, `poke` to any."""

    def __init__(self) -> None:
        self.lent = False
        """Whether `help` may read."""
        self._epoll = select.epoll()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._bell, select.EPOLLIN)
        self._sources: dict[int, Source] = {}
        self._full: list[Source] = []
        self._lock = threading.Lock()

    def __del__(self) -> None:
        os.close(self._bell)  # with the last user: another thread may be in `look` until then

    def fileno(self) -> int:
        """Readable while a source is."""
        return self._epoll.fileno()

    @property
    def bulky(self) -> bool:
        """Whether the kernel may hold too little of what comes while nobody looks."""
        return any(source.bulky for source in self._sources.values())

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
            with self._lock:
                self._take(descriptor)

    def lend(self) -> None:
        """The receiving thread goes away: from now on `help` may read in its stead."""
        self.lent = True

    def reclaim(self) -> None:
        """The receiving thread is back; no `help` is under way any more when this returns."""
        with self._lock:
            self.lent = False

    def help(self) -> bool:
        """Take what has arrived if the receiving thread is away; whether it was."""
        with self._lock:
            if self.lent:
                for descriptor, _ in self._epoll.poll(0.0):
                    self._take(descriptor)
            return self.lent

    def close(self, last_work: Callable[[], None]) -> None:
        """Look at no source any more, and do `last_work` while none is being looked at."""
        with self._lock:
            self._sources.clear()
            self._full.clear()
            last_work()

    def _take(self, descriptor: int) -> None:
        """Read from what was readable a moment ago; the other thread may have been faster."""
        if descriptor == self._bell:
            with suppress(BlockingIOError):
                os.eventfd_read(self._bell)
            return
        source = self._sources.get(descriptor)
        if source is None or source in self._full:
            return
        state = source.pump()
        if state is not Pumped.OPEN:
            self._epoll.unregister(descriptor)
        if state is Pumped.FULL:
            self._full.append(source)
        elif state is Pumped.OVER:
            del self._sources[descriptor]

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
                else:
                    del self._sources[source.connection.fileno()]
            return len(self._full) < len(waiting)
