"""Requests by the OpenAPI document, and against it, to a server that runs: it describes every answer, and serves on."""

from collections.abc import Iterator

import pytest
import schemathesis
from schemathesis import BaseSchema

from actors.http.openapi import OPERATIONS, Operation
from tests.fuzzing import TAKING, fuzz
from tests.live_server import LiveServer, live_server, until

pytestmark = pytest.mark.ray

CHANGING = ("/admin/scale", "/admin/rebalance", "/admin/trace")
"""Not of a server that others use meanwhile: they change it, or take their time."""
SHORT, LONG = 10, 100
QUESTION = {"prompt": "Q: What is 12 plus 7?\nA:", "temperature": 0}
few = pytest.mark.parametrize(
    "operation", [one for one in OPERATIONS if one.path not in CHANGING], ids=lambda one: f"{one.method} {one.path}"
)


def described(server: LiveServer) -> BaseSchema:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def answer(server: LiveServer) -> str:
    return str(server.http.post("/v1/completions", json=QUESTION).json()["choices"][0]["text"])


@pytest.fixture(scope="module")
def api(live: LiveServer) -> BaseSchema:
    return described(live)


@pytest.fixture
def serves_on(live: LiveServer) -> Iterator[None]:
    before = live.status()["epoch"], answer(live)
    yield
    until(live.idle)
    assert (live.status()["epoch"], answer(live)) == before


@few
def test_the_server_answers_as_it_describes(api: BaseSchema, serves_on: None, operation: Operation) -> None:
    assert fuzz(api, operation, good=True, examples=SHORT)
    if operation in TAKING:
        assert fuzz(api, operation, good=False, examples=SHORT)


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_hundreds_of_requests_to_every_operation() -> None:
    with live_server("placement.timeout_s=2", "handoff.start_timeout_s=10") as server:
        api = described(server)
        before = answer(server)
        for operation in OPERATIONS:
            fuzz(api, operation, good=True, examples=3 if operation.path in CHANGING else LONG)
            if operation in TAKING:
                fuzz(api, operation, good=False, examples=SHORT if operation.path in CHANGING else LONG)
        until(lambda: server.status()["state"] == "ready" and server.idle())
        assert answer(server) == before
