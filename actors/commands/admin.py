"""Asking a running server through `/admin/*`, or its controller through Ray."""

import argparse
import json
import os
import urllib.error
import urllib.request
from typing import Any

from actors.commands.joining import use_token


class ServerError(RuntimeError):
    """One line: the server is not there, or refuses. `answer`: the JSON object that came with the refusal."""

    def __init__(self, message: str, answer: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.answer = answer or {}


def ask(args: argparse.Namespace, path: str, body: dict[str, Any] | None = None, timeout_s: float = 10.0) -> dict[str, Any]:
    """GET (or, with a body, POST) `path` at `--url` or `--address`; raises ServerError."""
    if args.address is not None:
        use_token()
        from actors import serve

        answer: dict[str, Any] = serve.ask_controller(args.address, path, body, timeout_s)
        return answer
    return ask_url(args.url, path, body, args.api_key or os.environ.get("AFD_ADMIN_KEY"), timeout_s)


def ask_url(url: str, path: str, body: dict[str, Any] | None, api_key: str | None, timeout_s: float) -> dict[str, Any]:
    """The JSON object that the server answers; raises ServerError."""
    headers = {"Accept": "application/json", "Content-Type": "application/json"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data=data, headers=headers)
    # A proxy of the environment must not stand between the command and a local server.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=timeout_s) as response:
            answer = json.load(response)
    except urllib.error.HTTPError as error:
        refusal = _object(error.read())
        raise ServerError(f"{url}{path}: {error.code}, {_reason(refusal, error.reason)}", refusal) from None
    except (TimeoutError, urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise ServerError(f"no server at {url} ({getattr(reason, 'strerror', None) or reason})") from None
    except ValueError:
        raise ServerError(f"{url}{path}: the answer is not JSON, this is no afd-ray server") from None
    if not isinstance(answer, dict):
        raise ServerError(f"{url}{path}: the answer is not a JSON object, this is no afd-ray server")
    return answer


def _object(content: bytes) -> dict[str, Any]:
    """Empty for what is not a JSON object."""
    try:
        value = json.loads(content)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _reason(refusal: dict[str, Any], otherwise: str) -> str:
    """The message of an OpenAI error object."""
    try:
        return str(refusal["error"]["message"])
    except (KeyError, TypeError):
        return str(otherwise)
