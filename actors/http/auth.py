"""Who may call: bearer keys from a file that is looked at again whenever it changes."""

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from fastapi import Request

from actors.http.errors import ApiError
from afd_ray import api_keys
from afd_ray.api_keys import ApiKey

logger = logging.getLogger(__name__)

LOOK_S = 1.0
"""Between looks at the file: for so long a revoked key may still be let in."""

Stamp = tuple[int, int, int]
"""Inode, size and time of change: another one is another file."""


class Keys:
    """The keys of one file; no file lets everybody in."""

    def __init__(self, path: Path | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises ValueError (one line) for a file that cannot be read or holds no key: an empty file must not open the server."""
        self._path, self._clock = path, clock
        self._keys: tuple[ApiKey, ...] = ()
        if path is None:
            return
        self._stamp, self._keys = _read(path)
        self._looked_s = clock()
        if not self._keys:
            raise ValueError(f"keys file {path} must hold at least one key (afd-ray keys add {path})")

    @classmethod
    def from_file(cls, path: str | Path | None) -> "Keys":
        """As the constructor; None: everybody."""
        return cls(None if path is None else Path(path).expanduser())

    @property
    def asked(self) -> bool:
        """Whether a key is asked for at all."""
        return self._path is not None

    def check(self, request: Request) -> str | None:
        """Whose key the request carries; None where none is asked for. Raises ApiError 401."""
        if self._path is None:
            return None
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not given.strip():
            raise _unauthorized("no API key given; send it as 'Authorization: Bearer KEY'")
        self._look(self._path)
        key = api_keys.holder(self._keys, given.strip())
        if key is None:
            raise _unauthorized("wrong API key")
        return key.name

    def _look(self, path: Path) -> None:
        """Take what the file holds now. One that holds no key lets nobody in; one that cannot be read changes nothing."""
        now_s = self._clock()
        if now_s - self._looked_s < LOOK_S:
            return
        self._looked_s = now_s
        try:
            if _stamp(path) == self._stamp:
                return
            self._stamp, self._keys = _read(path)
        except (OSError, ValueError) as error:
            logger.warning("the keys stay as they were: %s", error)
            return
        logger.warning("%s has changed: it holds %d keys now", path, len(self._keys))


def _read(path: Path) -> tuple[Stamp, tuple[ApiKey, ...]]:
    try:
        stamp = _stamp(path)  # before it is read: a change meanwhile is then seen at the next look
        return stamp, api_keys.parse(path.read_text(encoding="utf-8"), f"keys file {path}")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read keys file {path}: {error}") from error


def _stamp(path: Path) -> Stamp:
    found = os.stat(path)
    return found.st_ino, found.st_size, found.st_mtime_ns


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
