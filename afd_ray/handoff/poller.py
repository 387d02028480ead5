"""The thread that watches a mesh's sockets: arriving bytes, room to send, peers that went away."""

import logging
import os
import selectors
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from socket import socket

READ = selectors.EVENT_READ
WRITE = selectors.EVENT_WRITE

Handler = Callable[[int], None]

_log = logging.getLogger(__name__)


class Poller:
    """Calls a handler, on its own thread, when a watched socket is ready.

    `watch` and `forget` belong to that thread (or to before `start`); `call` hands it work from any thread.
    """

    def __init__(self, name: str) -> None:
        self._selector = selectors.DefaultSelector()
        self._wake_descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector.register(self._wake_descriptor, READ, self._drain)
        self._calls: deque[Callable[[], None]] = deque()
        self._stopping = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def watch(self, connection: socket, events: int, handler: Handler) -> None:
        """Call `handler` with the events that are ready; replaces what was watched on that socket."""
        if connection.fileno() in self._selector.get_map():
            self._selector.modify(connection, events, handler)
        else:
            self._selector.register(connection, events, handler)

    def forget(self, connection: socket) -> None:
        if connection.fileno() >= 0 and connection.fileno() in self._selector.get_map():
            self._selector.unregister(connection)

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
            for key, events in self._selector.select():
                # an earlier handler of this round may have forgotten this socket
                if self._selector.get_map().get(key.fd) is key:
                    self._guard(partial(key.data, events))
            while self._calls:
                self._guard(self._calls.popleft())
        self._selector.close()
        with self._lock:  # whoever asked for the end may not have rung yet
            os.close(self._wake_descriptor)

    @staticmethod
    def _guard(work: Callable[[], None]) -> None:
        try:
            work()
        except Exception:
            _log.exception("a socket handler failed")
