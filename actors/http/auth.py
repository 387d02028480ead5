"""Who may call: bearer keys from a file, compared in constant time."""

import hmac
from pathlib import Path

from fastapi import Request

from actors.http.errors import ApiError


class Keys:
    """The keys of one file, one a line, `#` for comments; no file lets everybody in."""

    def __init__(self, keys: tuple[str, ...] | None) -> None:
        self._keys = None if keys is None else tuple(key.encode() for key in keys)

    @classmethod
    def from_file(cls, path: str | Path | None) -> "Keys":
        """Raises ValueError (one line) when the file is missing or holds no key: an empty file must not open the server."""
        if path is None:
            return cls(None)
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read keys file {path}: {error}") from error
        keys = tuple(key for line in lines if (key := line.strip()) and not key.startswith("#"))
        if not keys:
            raise ValueError(f"keys file {path} must hold at least one key")
        return cls(keys)

    def check(self, request: Request) -> None:
        """Raises ApiError 401 unless the request carries one of the keys."""
        if self._keys is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not given.strip():
            raise _unauthorized("no API key given; send it as 'Authorization: Bearer KEY'")
        if not self._holds(given.strip().encode()):
            raise _unauthorized("wrong API key")

    def _holds(self, given: bytes) -> bool:
        # Every key is compared, so that the time taken tells nothing of which one came close.
        return sum([hmac.compare_digest(given, key) for key in self._keys or ()]) > 0


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
