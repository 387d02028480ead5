"""Argument types and groups that several commands take."""

import argparse
from collections.abc import Callable
from urllib.parse import urlsplit

DEFAULT_URL = "http://127.0.0.1:8000"


def integer(low: int, high: int = 2**63 - 1) -> Callable[[str], int]:
    """An argparse type: an integer from `low` to `high`."""
    allowed = f"an integer of at least {low}" if high == 2**63 - 1 else f"an integer from {low} to {high}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value > high == 2**63 - 1:
            raise argparse.ArgumentTypeError(f"must be below 2^63, got {text}")
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be {allowed}, got {text!r}")
        return value

    return parse


def host_and_port(text: str) -> str:
    """An argparse type: HOST:PORT of a Ray cluster, or `auto`."""
    host, _, port = text.rpartition(":")
    if text != "auto" and not (host and port.isdecimal() and 0 < int(port) < 65536):
        raise argparse.ArgumentTypeError(f"must be HOST:PORT or auto, got {text!r}")
    return text


def url(text: str) -> str:
    """An argparse type: http://HOST:PORT."""
    if not text.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(f"must begin with http:// or https://, got {text!r}")
    try:
        parts = urlsplit(text)
        whole = bool(parts.hostname) and parts.port != 0
    except ValueError:
        whole = False
    if not whole:
        raise argparse.ArgumentTypeError(f"must be http://HOST:PORT with a port from 1 to 65535, got {text!r}")
    return text.rstrip("/")


def unicode_text(text: str) -> str:
    """An argparse type: text of valid Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"must be valid UTF-8, got {text!r}") from None
    return text


def add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="a YAML file or a bundled name (default: the demo model)")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY.PATH=VALUE", help="override a key; may be repeated"
    )


def add_server(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", type=url, default=DEFAULT_URL, help=f"the server (default {DEFAULT_URL})")
    parser.add_argument("--address", type=host_and_port, metavar="HOST:PORT", help="ask through this Ray cluster instead of HTTP")
    parser.add_argument("--api-key", metavar="KEY", help="admin key (default: $AFD_ADMIN_KEY)")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", dest="as_json", action="store_true", help="print JSON")
