"""The thread that watches a mesh's sockets: arriving bytes, room to send, peers that went away."""

import logging
import os
import select
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Protocol

READ = select.EPOLLIN
WRITE = select.EPOLLOUT
GONE = select.EPOLLRDHUP
"""The peer has closed its side; bytes that it sent wake nobody."""

Handler = Callable[[int], None]


class HasFileno(Protocol):
    def fileno(self) -> int: ...


_log = logging.getLogger(__name__)


class Poller:
    """Calls a handler, on its own thread, when a watched socket is ready.

    `watch` and `forget` belong to that thread (or to before `start`); `call` hands it work from any thread.
    """

    def __init__(self, name: str) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}
        self._wake_descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wake_descriptor, READ)
        self._handlers[self._wake_descriptor] = self._drain
        self._calls: deque[Callable[[], None]] = deque()
        self._stopping = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def watch(self, connection: HasFileno, events: int, handler: Handler) -> None:
        """Call `handler` with the events that are ready, errors always among them; replaces what was watched on that socket."""
        if connection.fileno() in self._handlers:
            self._epoll.modify(connection, events)
        else:
            self._epoll.register(connection, events)
        self._handlers[connection.fileno()] = handler

    def forget(self, connection: HasFileno) -> None:
        if self._handlers.pop(connection.fileno(), None) is not None:
            self._epoll.unregister(connection)

    def watch_once(self, connection: HasFileno, events: int) -> None:
        """For what is watched already: call its handler at most once more, for these events; from any thread."""
        with self._lock:
            if not self._stopping:
                self._epoll.modify(connection, events | select.EPOLLONESHOT)

    def call(self, work: Callable[[], None]) -> None:
        """Run `work` on the poller's thread soon; dropped once the poller is closed."""
        with self._lock:
            if not self._stopping:
                self._calls.append(work)
                os.eventfd_write(self._wake_descriptor, 1)

    def close(self, last_work: Callable[[], None]) -> None:
        """Run `last_work` on the poller's thread and end it; returns when that is done."""
        with self._lock:
            if self._stopping:
                return
            self._calls.append(last_work)
            self._stopping = True
            os.eventfd_write(self._wake_descriptor, 1)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _drain(self, _events: int) -> None:
        os.eventfd_read(self._wake_descriptor)

    def _run(self) -> None:
        while not (self._stopping and not self._calls):
            for descriptor, events in self._epoll.poll():
                handler = self._handlers.get(descriptor)
                if handler is not None:  # an earlier handler of this round may have forgotten this socket
                    self._guard(partial(handler, events))
            while self._calls:
                self._guard(self._calls.popleft())
        self._epoll.close()
        with self._lock:  # whoever asked for the end may not have rung yet
            os.close(self._wake_descriptor)

    @staticmethod
    def _guard(work: Callable[[], None]) -> None:
        try:
            work()
        except Exception:
            _log.exception("a socket handler failed")
