"""How much one caller may ask for: bytes of headers, and requests a second."""

import math
import time
from collections import OrderedDict
from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from actors.http.errors import ApiError

MAX_CALLERS = 10_000
"""Remembered at a time; who asked longest ago is forgotten first."""


class RequestRate:
    """A token bucket for each caller: `per_s` requests a second, and a second's worth (at least one) at once. None: no limit."""

    def __init__(self, per_s: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_s, self._clock = per_s, clock
        self._at_once = max(1.0, per_s or 0.0)
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        """By caller: what was left, and when."""

    def take(self, caller: str) -> None:
        """Count one request. Raises ApiError 429, with the seconds until the next one may come."""
        if self._per_s is None:
            return
        now_s = self._clock()
        left, at_s = self._buckets.pop(caller, (self._at_once, now_s))
        left = min(self._at_once, left + (now_s - at_s) * self._per_s)
        refused = left < 1.0
        self._buckets[caller] = (left if refused else left - 1.0, now_s)
        if len(self._buckets) > MAX_CALLERS:
            self._buckets.popitem(last=False)
        if refused:
            wait_s = math.ceil((1.0 - left) / self._per_s)
            raise ApiError(
                429,
                f"more than {self._per_s:g} requests a second, ask again in {wait_s} s",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(wait_s)},
            )


class HeaderLimit:
    """ASGI middleware: a request whose headers and path are longer is refused before anything of it is looked at."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and _head_bytes(scope) > self._max_bytes:
            await self._refusal().response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _refusal(self) -> ApiError:
        return ApiError(431, f"path and headers must be at most {self._max_bytes} bytes together", code="headers_too_large")


def _head_bytes(scope: Scope) -> int:
    target = len(scope.get("raw_path") or scope["path"].encode()) + len(scope.get("query_string", b""))
    return target + sum(len(name) + len(value) + 4 for name, value in scope["headers"])
