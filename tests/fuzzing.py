"""Requests drawn from the OpenAPI document, good and bad, and what every answer to one has to be."""

from collections.abc import Mapping
from typing import Any

from hypothesis import HealthCheck, given, settings
from schemathesis import BaseSchema, Case, GenerationMode
from schemathesis.checks import CHECKS, CheckFunction, load_all_checks

from actors.http.openapi import OPERATIONS, Operation

MOST_TOKENS = 4
MOST_CHOICES = 3
TIMEOUT_S = 60.0
"""A trace of a cluster that stands idle is waited for, and a resize that finds no room."""
# A status is checked against those that the operation names: among them no 5xx but 503, and 504 where the request gave a time.
CONFORMS = ("status_code_conformance", "content_type_conformance", "response_headers_conformance", "response_schema_conformance")
REFUSES = ("negative_data_rejection", "unsupported_method")

TAKING = [one for one in OPERATIONS if one.path == "/admin/decisions" or (one.body and one.body_required)]
"""Operations that always take something that can be wrong; any text is the name of a model."""

load_all_checks()


def fuzz(
    api: BaseSchema, operation: Operation, *, good: bool, examples: int, headers: Mapping[str, str] | None = None
) -> list[int]:
    """Send that many requests of an operation, as its schema wants them or not; raises for an answer that is not as described.

    Gives the statuses. The requests are the same in every run.
    """
    statuses: list[int] = []
    mode = GenerationMode.POSITIVE if good else GenerationMode.NEGATIVE
    checks = _checks(CONFORMS if good else CONFORMS + REFUSES)

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(case=api[operation.path][operation.method.upper()].as_strategy(generation_mode=mode))
    def send(case: Case) -> None:
        case.body = _cheap(case.body)
        response = case.call_and_validate(headers=dict(headers or {}), checks=checks, timeout=TIMEOUT_S)
        statuses.append(response.status_code)

    send()
    return statuses


def _checks(names: tuple[str, ...]) -> list[CheckFunction]:
    return [CHECKS.get_one(name) for name in names]


def _cheap(body: Any) -> Any:
    """The same request, for few tokens."""
    if not isinstance(body, dict):
        return body
    limits = {"n": MOST_CHOICES, "max_tokens": MOST_TOKENS, "max_completion_tokens": MOST_TOKENS}
    # 14.0 is an integer too, in JSON as in its schemas, and stays a float.
    given = {name: body[name] for name in limits if isinstance(body.get(name), int | float)}
    lowered = {name: type(value)(min(value, limits[name])) for name, value in given.items()}
    # Without a limit only the end token keeps it from filling the context.
    endless = body.get("ignore_eos") is True and not lowered.keys() - {"n"}
    return body | lowered | ({"ignore_eos": False} if endless else {})
