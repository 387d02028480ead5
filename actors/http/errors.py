"""Every failure as OpenAI's error object, with its status."""

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from actors.http.backend import Overloaded, Rejected, TimedOut, Unavailable
from actors.http.request_id import HEADER
from actors.http.wire import json_response

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    499: "client_disconnected",
    504: "timeout_error",
}


class ApiError(Exception):
    """A failure that the client is told of; the message is one line."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = _TYPES.get(self.status, default)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return json_response(self.body(), status=self.status, headers=self.headers)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def as_refusal(error: ValueError) -> ApiError:
    """Our ValueErrors open with the parameter they are about ("temperature must be ...")."""
    name, _, rest = str(error).partition(" ")
    return bad_request(str(error), param=name if rest.startswith("must ") else None)


def as_api_error(error: BaseException) -> ApiError:
    """What the client hears of any failure."""
    match error:
        case ApiError():
            return error
        case Overloaded():
            return ApiError(429, str(error), code="queue_full", headers={"Retry-After": str(error.retry_after_s)})
        case Unavailable():
            return ApiError(503, str(error), code="unavailable", headers={"Retry-After": "1"})
        case TimedOut():
            return ApiError(504, str(error), code="timeout")
        case Rejected():
            return ApiError(409, str(error), code="rejected")
        case HTTPException():
            return _from_http(error)
    return ApiError(500, "internal error", code="internal_error")


def install_error_handlers(app: FastAPI) -> None:
    for kind in (ApiError, Overloaded, Unavailable, TimedOut, Rejected, HTTPException, Exception):
        app.add_exception_handler(kind, _handle)


async def _handle(request: Request, error: Exception) -> Response:
    found = as_api_error(error)
    if isinstance(error, HTTPException) and error.status_code == 404:
        found = ApiError(404, f"unknown route {request.url.path}", code="unknown_route")
    elif isinstance(error, HTTPException) and error.status_code == 405:
        found = ApiError(405, f"method {request.method} is not allowed for {request.url.path}", code="method_not_allowed")
        found.headers.update(error.headers or {})
    response = found.response()
    response.headers[HEADER] = request.state.id  # Starlette answers what nobody expected outside of all middleware
    return response


def _from_http(error: HTTPException) -> ApiError:
    message = error.detail or HTTPStatus(error.status_code).phrase
    return ApiError(error.status_code, str(message), headers=dict(error.headers or {}))
