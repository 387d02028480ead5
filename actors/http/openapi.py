"""The HTTP interface as an OpenAPI document: what each operation takes, what it answers, and how it refuses."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from actors.http import schemas
from actors.http.protocol import ChatBody, CompletionBody

VERSION = "3.1.0"
JSON, EVENTS, TEXT = "application/json", "text/event-stream", "text/plain"

Caller = Literal["client", "operator", "anybody"]
Schema = dict[str, Any]

_REF = "#/components/schemas/{model}"
_SCHEMES: dict[Caller, str] = {"client": "api_key", "operator": "admin_key"}
_RETRY_AFTER = {"Retry-After": {"description": "seconds", "schema": {"type": "integer", "minimum": 1}}}
_HEADERS: dict[int, Schema] = {
    401: {"WWW-Authenticate": {"schema": {"type": "string"}}},
    429: _RETRY_AFTER,
    503: _RETRY_AFTER,
}
_TOO_LONG = 431
_ASKING_THE_CLUSTER = (503,)
_GENERATING = (400, 404, 413, 429, 503, 504)
_AFTER: Schema = {
    "name": "after",
    "in": "query",
    "description": "the number of a decision: those that came later",
    "schema": {"type": "integer", "minimum": 0},
}
_NAME: Schema = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}


class Operation(NamedTuple):
    """One method of one route."""

    method: Literal["get", "post"]
    path: str
    caller: Caller
    summary: str
    answer: type[BaseModel] | None
    """None: plain text."""
    refusals: tuple[int, ...] = ()
    """Statuses with an error object, beside those that every operation of its caller has."""
    body: type[BaseModel] | None = None
    body_required: bool = True
    parameter: Schema | None = None
    streams: bool = False
    """Whether it answers in events where its body says `stream`."""
    conflict: type[BaseModel] = schemas.Error
    """What a 409 holds."""


OPERATIONS = (
    Operation(
        "post",
        "/v1/completions",
        "client",
        "Continue prompts",
        schemas.Completion,
        _GENERATING,
        body=CompletionBody,
        streams=True,
    ),
    Operation(
        "post",
        "/v1/chat/completions",
        "client",
        "Answer a chat",
        schemas.ChatCompletion,
        _GENERATING,
        body=ChatBody,
        streams=True,
    ),
    Operation("get", "/v1/models", "client", "The model that is served", schemas.ModelList, (429, 503)),
    Operation("get", "/v1/models/{name}", "client", "One model", schemas.Model, (404, 429, 503), parameter=_NAME),
    Operation("get", "/health", "anybody", "Whether the ingress lives", schemas.Health),
    Operation("get", "/ready", "anybody", "Whether the cluster takes requests", schemas.Ready, (503,)),
    Operation("get", "/metrics", "anybody", "For Prometheus", None),
    Operation("get", "/admin/status", "operator", "The cluster", schemas.Status, _ASKING_THE_CLUSTER),
    Operation(
        "post",
        "/admin/scale",
        "operator",
        "Resize; answered when that is over",
        schemas.Resize,
        (400, 409, 413, 503),
        body=schemas.ScaleBody,
        conflict=schemas.RefusedResize,
    ),
    Operation(
        "get",
        "/admin/decisions",
        "operator",
        "What the autoscaler decided",
        schemas.Decisions,
        (400, 503),
        parameter=_AFTER,
    ),
    Operation("get", "/admin/measured", "operator", "What the attention actors have measured", schemas.Measured, (409, 503)),
    Operation(
        "post",
        "/admin/rebalance",
        "operator",
        "Place the experts by their load",
        schemas.Placement,
        (400, 409, 413, 503),
        body=schemas.RebalanceBody,
        body_required=False,
    ),
    Operation(
        "post",
        "/admin/trace",
        "operator",
        "The next steps of every actor",
        schemas.Trace,
        (400, 409, 413, 503),
        body=schemas.TraceBody,
        body_required=False,
    ),
)


def document(*, asks_for: Mapping[Caller, bool]) -> dict[str, Any]:
    """`asks_for`: of which callers a key is asked for."""
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _described(operation, asks_for.get(operation.caller, False))
    bearer = {"type": "http", "scheme": "bearer"}
    return {
        "openapi": VERSION,
        "info": {"title": "afd-ray", "version": "1"},
        "paths": paths,
        "components": {
            "schemas": _schemas(),
            "securitySchemes": {_SCHEMES[caller]: bearer for caller, asked in asks_for.items() if asked},
        },
    }


def _described(operation: Operation, needs_key: bool) -> dict[str, Any]:
    described: dict[str, Any] = {"summary": operation.summary, "responses": _responses(operation, needs_key)}
    if needs_key:
        described["security"] = [{_SCHEMES[operation.caller]: []}]
    if operation.parameter is not None:
        described["parameters"] = [operation.parameter]
    if operation.body is not None:
        content = {JSON: {"schema": _ref(operation.body)}}
        described["requestBody"] = {"required": operation.body_required, "content": content}
    return described


def _responses(operation: Operation, needs_key: bool) -> dict[str, Any]:
    content = {TEXT: {"schema": {"type": "string"}}} if operation.answer is None else _json(operation.answer)
    if operation.streams:
        content[EVENTS] = {}  # a schema would be taken for that of one event, and OpenAPI 3.1 cannot say what an event is
    responses: dict[str, Any] = {"200": {"description": "OK", "content": content}}
    for status in sorted({*operation.refusals, _TOO_LONG, *([401] if needs_key else [])}):
        body = operation.conflict if status == 409 else schemas.Error
        refusal = {"description": HTTPStatus(status).phrase, "content": _json(body)}
        responses[str(status)] = refusal | ({"headers": _HEADERS[status]} if status in _HEADERS else {})
    return responses


def _json(answer: type[BaseModel]) -> dict[str, Any]:
    return {JSON: {"schema": _ref(answer)}}


def _ref(model: type[BaseModel]) -> Schema:
    return {"$ref": _REF.format(model=model.__name__)}


def _schemas() -> dict[str, Any]:
    """Of everything that is referred to, by name."""
    bodies = {operation.body for operation in OPERATIONS if operation.body is not None}
    answered = {operation.answer for operation in OPERATIONS if operation.answer is not None}
    conflicts = {operation.conflict for operation in OPERATIONS}
    models = sorted(bodies | answered | conflicts, key=lambda model: model.__name__)
    _, told = models_json_schema([(model, "validation") for model in models], ref_template=_REF)
    return dict(sorted(told["$defs"].items()))
