"""What the command line tells its user while it works."""

import sys
from contextlib import suppress


def report(doing: str) -> None:
    """Progress, on stderr, while somebody is there to read it: a terminal that was closed must not keep the server from stopping."""
    with suppress(OSError):
        print(f"afd-ray: {doing}", file=sys.stderr, flush=True)
