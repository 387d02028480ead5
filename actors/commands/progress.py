"""Progress on stderr, for what lasts longer than two seconds."""

import sys
import time
from collections.abc import Callable
from typing import TextIO

QUIET_S = 2.0
INTERVAL_S = {True: 0.2, False: 2.0}
"""Between updates: on a terminal, elsewhere."""


class ProgressLine:
    """Called with (done, total); `finish` ends the line."""

    def __init__(
        self, what: str, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic, quiet_s: float = QUIET_S
    ) -> None:
        self._what, self._stream, self._clock = what, stream or sys.stderr, clock
        self._terminal = self._stream.isatty()
        self._next_s = clock() + quiet_s
        self._shown = False

    def __call__(self, done: int, total: int) -> None:
        now_s = self._clock()
        if now_s < self._next_s:
            return
        self._next_s = now_s + INTERVAL_S[self._terminal]
        self._shown = True
        text = f"{self._what} {100 * done // max(1, total)}%"
        self._stream.write(f"\r{text}" if self._terminal else f"{text}\n")
        self._stream.flush()

    def finish(self) -> None:
        if self._shown and self._terminal:
            self._stream.write("\n")
            self._stream.flush()
