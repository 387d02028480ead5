"""API keys as they lie in a file: a line each, its SHA-256 in place of the key itself.

A minted key is 256 bits from the operating system, so nobody can try them all however fast the hash is: a slow derivation such as scrypt would
only protect keys that people make up, and cost every request milliseconds of the event loop that all streams share.
"""

import hashlib
import hmac
import re
from collections.abc import Iterable
from typing import NamedTuple

PREFIX = "afd-"
"""So that people and leak scanners see what it is."""
KEY_BYTES = 32
MARK = "sha256:"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_HASHED = re.compile(rf"{MARK}(?P<digest>[0-9a-f]{{64}})\s+(?P<name>\S+)(?:\s+(?P<added>\d{{4}}-\d\d-\d\d))?")


class ApiKey(NamedTuple):
    """One line of a keys file."""

    name: str
    """Of its holder; `line-N` for a key that stands there in plain text."""
    digest: bytes
    added: str | None
    """YYYY-MM-DD."""
    is_plain: bool


def parse(text: str, origin: str) -> tuple[ApiKey, ...]:
    """The keys of a file's text; `#` begins a comment line, any other line without `sha256:` is a key in plain text.

    Raises ValueError (one line) for a hashed line that cannot be read, and for a name that stands there twice.
    """
    keys = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if line and not line.startswith("#"):
            keys.append(_parse_line(line, number, origin))
    names = [key.name for key in keys]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{origin}: the name {twice} is given twice")
    return tuple(keys)


def _parse_line(line: str, number: int, origin: str) -> ApiKey:
    if not line.startswith(MARK):
        return ApiKey(f"line-{number}", digest_of(line), None, is_plain=True)
    found = _HASHED.fullmatch(line)
    if found is None:
        raise ValueError(f"{origin}, line {number}: must be {MARK} and 64 hexadecimal digits, a name and a date")
    return ApiKey(found["name"], bytes.fromhex(found["digest"]), found["added"], is_plain=False)


def digest_of(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def key_of(randomness: bytes) -> str:
    """The key that a client sends. Raises ValueError for less than KEY_BYTES."""
    if len(randomness) < KEY_BYTES:
        raise ValueError(f"randomness must be {KEY_BYTES} bytes, got {len(randomness)}")
    return PREFIX + randomness.hex()


def check_name(name: str) -> None:
    """Raises ValueError (one line)."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"--name: must be up to 64 letters, digits and ._@-, got {name!r}")


def with_key(text: str, key: str, name: str, added: str) -> str:
    """The file's text with one line more, for `key` of `name`, of this day (YYYY-MM-DD)."""
    between = "" if not text or text.endswith("\n") else "\n"
    return f"{text}{between}{MARK}{digest_of(key).hex()} {name} {added}\n"


def without_key(text: str, name: str) -> str:
    """The file's text without the line of this name. Raises ValueError (one line) where there is none."""
    lines = text.splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        stripped = line.strip()
        if stripped and not stripped.startswith("#") and _parse_line(stripped, number, "keys file").name == name:
            return "".join(lines[: number - 1] + lines[number:])
    raise ValueError(f"NAME: no key of the name {name}")


def holder(keys: Iterable[ApiKey], given: str) -> ApiKey | None:
    """Whose key it is. All are compared, in constant time, so that how long it takes tells nothing of which one came close."""
    digest = digest_of(given)
    found = None
    for key in keys:
        if hmac.compare_digest(digest, key.digest):
            found = key
    return found
