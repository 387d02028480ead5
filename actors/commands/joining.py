"""What must be settled before Ray is imported, to join a Ray cluster that is there already."""

import os
from pathlib import Path


def use_token() -> None:
    """Token authentication wherever there is a token, unless RAY_AUTH_MODE says otherwise: as `ray start` and a Ray of our own do."""
    # Ray reads the variable once, at import, and connecting to a cluster does not set it.
    given = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    if given or (Path.home() / ".ray" / "auth_token").is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def use_own_token() -> None:
    """The same for a Ray that this process has somebody start first, as `afd-ray serve` does: on a new machine its token is made then."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")
