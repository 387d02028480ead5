"""A futex word on which one receiver parks and any sender, in any process, rings."""

import ctypes
import platform
import threading
import time
from collections.abc import Callable

SUPPORTED_MACHINES = {"x86_64": 202, "aarch64": 98}

_FUTEX_WAIT = 0
_FUTEX_WAKE = 1
_AWAKE = 0
_PARKED = 1
_PARKED_ON_SOCKETS = 2


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


Look = Callable[[float | None], None]

_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.restype = ctypes.c_long
_syscall.argtypes = [
    ctypes.c_long,
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_uint32,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_uint32,
]
_FUTEX = SUPPORTED_MACHINES.get(platform.machine(), -1)


def _futex_wait(address: int, expected: int, timeout_s: float | None) -> None:
    """Sleep while the word holds `expected`; ends early on a wake, a signal or the timeout."""
    if timeout_s is None:
        _syscall(_FUTEX, address, _FUTEX_WAIT, expected, None, None, 0)
        return
    seconds = int(timeout_s)
    limit = _Timespec(seconds, int((timeout_s - seconds) * 1e9))
    _syscall(_FUTEX, address, _FUTEX_WAIT, expected, ctypes.byref(limit), None, 0)


class Doorbell:
    """Parks the receiver and lets senders wake it with one system call, and with none while it is awake.

    The receiver stores that it parks and then looks for messages; a sender publishes and then looks whether it is parked.
    Each needs its store to be seen before its load, which even x86 does not promise without a full barrier: taking a lock is
    one. Nothing lighter will do, for the sender cannot know that the receiver will not park just then.
    """

    def __init__(self, word: memoryview, address: int, poke: Callable[[], None]) -> None:
        """`word` is a memoryview of one uint32 in memory shared by both sides, at `address`; `poke` wakes a receiver of sockets."""
        self.woken = False
        """By `wake`, since the last `rest`."""
        self._word = word
        self._address = address
        self._poke = poke
        self._barrier = threading.Lock()

    def ring(self) -> None:
        """Wake the receiver if it is parked; call after publishing."""
        self._barrier.acquire()
        self._barrier.release()
        if self._word[0]:
            self._rouse()

    def _rouse(self) -> None:
        on_sockets = self._word[0] == _PARKED_ON_SOCKETS
        self._word[0] = _AWAKE
        if on_sockets:
            self._poke()
        else:
            _syscall(_FUTEX, self._address, _FUTEX_WAKE, 1, None, None, 0)

    def wake(self) -> None:
        """End the receiver's current or next rest; from any thread of the receiver's process."""
        self.woken = True
        self.ring()

    def park(self, ready: Callable[[], bool], timeout_s: float | None, sockets: Look | None) -> None:
        """Sleep until `ready()`, woken, or the timeout; with `sockets`, looks at them for as long as it is told, and on a poke."""
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        state = _PARKED if sockets is None else _PARKED_ON_SOCKETS
        while True:
            self._word[0] = state
            with self._barrier:
                pass
            left_s = None if deadline_s is None else deadline_s - time.monotonic()
            if self.woken or ready() or (left_s is not None and left_s <= 0.0):
                break
            if sockets is None:
                _futex_wait(self._address, state, left_s)
            else:
                sockets(left_s)
        self._word[0] = _AWAKE
