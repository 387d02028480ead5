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


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


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

    The receiver stores PARKED and then looks for messages; a sender publishes and then looks for PARKED. Each needs its
    store to be seen before its load, which even x86 does not promise without a full barrier: taking a lock is one.
    """

    def __init__(self, word: memoryview, address: int) -> None:
        """`word` is a memoryview of one uint32 in memory shared by both sides, at `address`."""
        self._word = word
        self._address = address
        self._barrier = threading.Lock()
        self._woken = False

    def ring(self) -> None:
        """Wake the receiver if it is parked; call after publishing."""
        with self._barrier:
            pass
        if self._word[0] == _PARKED:
            self._word[0] = _AWAKE
            _syscall(_FUTEX, self._address, _FUTEX_WAKE, 1, None, None, 0)

    def wake(self) -> None:
        """End the receiver's current or next wait; from any thread of the receiver's process."""
        self._woken = True
        self.ring()

    def wait(self, ready: Callable[[], bool], timeout_s: float | None, spin_s: float) -> None:
        """Return when `ready()`, or woken, or after the timeout: looks for `spin_s` first, then parks."""
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        if not self._spin(ready, spin_s if timeout_s is None else min(spin_s, timeout_s)):
            self._park(ready, deadline_s)
        self._woken = False

    def _spin(self, ready: Callable[[], bool], spin_s: float) -> bool:
        if self._woken or ready():
            return True
        if spin_s <= 0.0:
            return False
        clock = time.perf_counter
        until_s = clock() + spin_s
        while clock() < until_s:
            if self._woken or ready():
                return True
        return False

    def _park(self, ready: Callable[[], bool], deadline_s: float | None) -> None:
        while True:
            self._word[0] = _PARKED
            with self._barrier:
                pass
            left_s = None if deadline_s is None else deadline_s - time.monotonic()
            if self._woken or ready() or (left_s is not None and left_s <= 0.0):
                break
            _futex_wait(self._address, _PARKED, left_s)
        self._word[0] = _AWAKE
