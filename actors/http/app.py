"""The routes, put together into one FastAPI application."""

import asyncio
import difflib
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from actors.http.auth import Keys
from actors.http.backend import STOPPING, Backend
from actors.http.errors import ApiError, as_refusal, bad_request, install_error_handlers
from actors.http.generation import Generation
from actors.http.limits import HeaderLimit, RequestRate
from actors.http.metrics import CONTENT_TYPE, IngressMetrics, Snapshot, render
from actors.http.openapi import document
from actors.http.protocol import ChatBody, CompletionBody, GenerationBody, parse_body, parse_json
from actors.http.request_id import RequestId
from actors.http.schemas import MAX_RANKS, MAX_TIMEOUT_S, MAX_TRACE_STEPS
from actors.http.shapes import ChatShape, CompletionShape, Shape
from actors.http.wire import BodyTooLarge, ClientGone, json_response, read_body

MAX_DECISION_DIGITS = 18
"""More than any decision's number has, and few enough for Python to read."""

SCALED = ("attention", "ffn", "ffn_tensor_parallel")


async def _no_peers() -> dict[str, Snapshot]:
    return {}


@dataclass(frozen=True, slots=True)
class Options:
    """How one ingress replica serves. `peer_snapshots` brings the metrics of the other replicas, by replica."""

    api_keys: Keys = field(default_factory=Keys)
    admin_keys: Keys = field(default_factory=Keys)
    rate: RequestRate = field(default_factory=lambda: RequestRate(None))
    """Of the callers of `/v1`: by key, or by address where no key is asked for."""
    max_header_bytes: int = 65_536
    max_body_bytes: int = 1_048_576
    request_timeout_s: float | None = None
    """For requests that give no `timeout_s`; None: as long as it takes."""
    replica: str = "0"
    peer_snapshots: Callable[[], Awaitable[dict[str, Snapshot]]] = _no_peers


def create_app(backend: Backend, options: Options | None = None, metrics: IngressMetrics | None = None) -> FastAPI:
    """The whole HTTP interface of `backend`."""
    options = options or Options()
    metrics = metrics or IngressMetrics()
    app = FastAPI(title="afd-ray", openapi_url=None, redirect_slashes=False)
    install_error_handlers(app)
    _add_openai_routes(app, backend, Generation(backend, metrics, timeout_s=options.request_timeout_s), options)
    _add_watch_routes(app, backend, metrics, options)
    _add_admin_routes(app, backend, options)
    _add_description(app, options)
    routes = frozenset(route.path for route in app.routes if isinstance(route, Route))
    app.add_middleware(HeaderLimit, max_bytes=options.max_header_bytes)
    app.add_middleware(Counted, metrics=metrics, routes=routes)
    app.add_middleware(RequestId)
    return app


def _add_openai_routes(app: FastAPI, backend: Backend, generation: Generation, options: Options) -> None:
    async def generate(request: Request, kind: type[GenerationBody], shape: Shape) -> Response:
        _admit(request, options)
        body = parse_body(await _body(request, options), kind)
        job = await generation.prepare(body, shape, request.state.id)
        try:
            return await generation.answer(job, request.receive)
        except ClientGone:
            return Response(status_code=499)

    async def completions(request: Request) -> Response:
        return await generate(request, CompletionBody, CompletionShape())

    async def chat(request: Request) -> Response:
        return await generate(request, ChatBody, ChatShape())

    async def models(request: Request) -> Response:
        _admit(request, options)
        return json_response({"object": "list", "data": [_model(backend)]})

    async def model(request: Request) -> Response:
        _admit(request, options)
        name = request.path_params["name"]
        if name != backend.model.name:
            raise ApiError(
                404,
                f"model '{name}' does not exist; this server has '{backend.model.name}'",
                param="model",
                code="model_not_found",
            )
        return json_response(_model(backend))

    app.add_route("/v1/completions", completions, methods=["POST"])
    app.add_route("/v1/chat/completions", chat, methods=["POST"])
    app.add_route("/v1/models", models, methods=["GET"])
    app.add_route("/v1/models/{name:path}", model, methods=["GET"])


def _add_watch_routes(app: FastAPI, backend: Backend, metrics: IngressMetrics, options: Options) -> None:
    async def health(request: Request) -> Response:
        return json_response({"status": "ok"})

    async def ready(request: Request) -> Response:
        if not backend.ready():
            reason = STOPPING if backend.stopping else "the cluster is not ready"
            raise ApiError(503, reason, code="unavailable", headers={"Retry-After": "1"})
        return json_response({"status": "ready"})

    async def scrape(request: Request) -> Response:
        metrics.tasks_alive(len(asyncio.all_tasks()))
        peers, samples = await asyncio.gather(options.peer_snapshots(), backend.metrics())
        text = render({**peers, options.replica: metrics.snapshot()}, samples)
        return Response(text, headers={"content-type": CONTENT_TYPE})

    app.add_route("/health", health, methods=["GET"])
    app.add_route("/ready", ready, methods=["GET"])
    app.add_route("/metrics", scrape, methods=["GET"])


def _add_admin_routes(app: FastAPI, backend: Backend, options: Options) -> None:
    async def status(request: Request) -> Response:
        options.admin_keys.check(request)
        return json_response(await _asked(backend.status()))

    async def scale(request: Request) -> Response:
        options.admin_keys.check(request)
        body = parse_json(await _body(request, options))
        _refuse_unknown_keys(body, (*SCALED, "timeout_s", "cancel"))
        if body.get("cancel") is not None:
            _check_cancels_alone(body)
            return json_response(await _asked(backend.scale({"cancel": True})))
        wanted = {name: _count(body, name, MAX_RANKS) for name in SCALED}
        if not any(wanted.values()):
            raise bad_request("body must give attention, ffn or ffn_tensor_parallel, or cancel")
        wanted["timeout_s"] = _count(body, "timeout_s", MAX_TIMEOUT_S)
        return _resized(await _asked(backend.scale({name: value for name, value in wanted.items() if value is not None})))

    async def decisions(request: Request) -> Response:
        options.admin_keys.check(request)
        query = dict(request.query_params)
        _refuse_unknown_keys(query, ("after",))
        after = query.get("after", "0")
        if not after.isdecimal() or len(after) > MAX_DECISION_DIGITS:
            raise bad_request(f"after must be the number of a decision, got {json.dumps(after)[:30]}", param="after")
        return json_response(await _asked(backend.decisions(int(after))))

    async def measured(request: Request) -> Response:
        options.admin_keys.check(request)
        return json_response(await _asked(backend.measured()))

    async def rebalance(request: Request) -> Response:
        options.admin_keys.check(request)
        _refuse_unknown_keys(parse_json(await _body(request, options) or b"{}"), ())
        return json_response(await _asked(backend.rebalance()))

    async def trace(request: Request) -> Response:
        options.admin_keys.check(request)
        body = parse_json(await _body(request, options) or b"{}")
        _refuse_unknown_keys(body, ("steps",))
        steps = _count(body, "steps", MAX_TRACE_STEPS)
        return json_response(await _asked(backend.trace(steps or 64)))

    app.add_route("/admin/status", status, methods=["GET"])
    app.add_route("/admin/scale", scale, methods=["POST"])
    app.add_route("/admin/decisions", decisions, methods=["GET"])
    app.add_route("/admin/measured", measured, methods=["GET"])
    app.add_route("/admin/rebalance", rebalance, methods=["POST"])
    app.add_route("/admin/trace", trace, methods=["POST"])


def _add_description(app: FastAPI, options: Options) -> None:
    described = document(asks_for={"client": options.api_keys.asked, "operator": options.admin_keys.asked})

    async def openapi(request: Request) -> Response:
        return json_response(described)

    app.add_route("/openapi.json", openapi, methods=["GET"])


def _admit(request: Request, options: Options) -> None:
    """Raises ApiError 401 without a key, 429 for a caller that asks too often."""
    caller = options.api_keys.check(request)
    options.rate.take(caller or (request.client.host if request.client else ""))


async def _body(request: Request, options: Options) -> bytes:
    try:
        return await read_body(request, options.max_body_bytes)
    except BodyTooLarge:
        raise ApiError(413, f"body must be at most {options.max_body_bytes} bytes", code="body_too_large") from None


async def _asked(answer: Awaitable[dict[str, Any]]) -> dict[str, Any]:
    try:
        return await answer
    except ValueError as error:
        raise as_refusal(error) from None


def _resized(answer: dict[str, Any]) -> Response:
    """What became of a resize: 409 where it did not happen, with an error object beside the answer's own keys."""
    if answer["outcome"] == "committed":
        return json_response(answer)
    failure = ApiError(409, f"{answer['outcome']}: {answer.get('reason')}", code=answer["outcome"])
    return json_response(answer | failure.body(), status=failure.status)


def _check_cancels_alone(body: dict[str, Any]) -> None:
    if body["cancel"] is not True:
        raise bad_request(f"cancel must be true, got {json.dumps(body['cancel'])[:30]}", param="cancel")
    if any(value is not None for key, value in body.items() if key != "cancel"):
        raise bad_request("cancel must stand alone", param="cancel")


def _refuse_unknown_keys(body: dict[str, Any], known: tuple[str, ...]) -> None:
    """An admin call that is half understood must not change the cluster."""
    unknown = next((key for key in body if key not in known), None)
    if unknown is None:
        return
    close = difflib.get_close_matches(unknown, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"the keys there are {', '.join(known)}" if known else "the body takes none"
    raise bad_request(f"{unknown[:60]}: unknown key, {hint}", param=unknown[:60])


def _count(body: dict[str, Any], name: str, highest: int) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= highest:
        raise bad_request(f"{name} must be an integer from 1 to {highest}, got {json.dumps(value)[:30]}", param=name)
    return value


def _model(backend: Backend) -> dict[str, Any]:
    card = backend.model
    return {"id": card.name, "object": "model", "created": card.created, "owned_by": "afd-ray", "max_model_len": card.max_context}


class Counted:
    """ASGI middleware: counts requests by route and status; paths that are no route share one label."""

    def __init__(
        self, app: ASGIApp, metrics: IngressMetrics, routes: frozenset[str], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._routes = routes
        self._clock = clock

    def _route(self, path: str) -> str:
        return path if path in self._routes else "other"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 499
        started_s = self._clock()

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._metrics.request_started()
        try:
            await self._app(scope, receive, watched)
        except Exception:
            status = 500
            raise
        finally:
            self._metrics.request_ended(self._route(scope["path"]), status, self._clock() - started_s)
