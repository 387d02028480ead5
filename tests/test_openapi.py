"""The OpenAPI document is what is served, and whatever is sent by it, or against it, gets an answer that it describes."""

import pytest
import schemathesis
from schemathesis import BaseSchema
from starlette.routing import Route

from actors.http.app import Options, create_app
from actors.http.auth import Keys
from actors.http.openapi import OPERATIONS, Operation, document
from afd_ray.text import Tokenizer
from tests.fuzzing import TAKING, fuzz
from tests.ingress_fake import FakeBackend, byte_ids, connected, write_tokenizer

EXAMPLES = 25
KEY = {"authorization": "Bearer secret"}


def name(operation: Operation) -> str:
    return f"{operation.method} {operation.path}"


every_operation = pytest.mark.parametrize("operation", OPERATIONS, ids=name)


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> FakeBackend:
    tokenizer = Tokenizer.from_directory(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    assert tokenizer is not None
    return FakeBackend(tokenizer, byte_ids(tokenizer, b"hello"), end=tokenizer.encode("</s>")[0])


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Options:
    """Everything asks for KEY."""
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text("secret\n")
    return Options(api_keys=Keys(file), admin_keys=Keys(file))


@pytest.fixture(scope="module")
def api(backend: FakeBackend, locked: Options) -> BaseSchema:
    return schemathesis.openapi.from_asgi("/openapi.json", create_app(backend, locked))


def test_every_route_is_described(backend: FakeBackend) -> None:
    routes = {
        (route.path.replace(":path", ""), method)
        for route in create_app(backend).routes
        if isinstance(route, Route)
        for method in route.methods or ()
    }
    described = {(operation.path, operation.method.upper()) for operation in OPERATIONS}
    assert {(path, method) for path, method in routes if method != "HEAD"} == described | {("/openapi.json", "GET")}


async def test_anybody_may_read_it(backend: FakeBackend, locked: Options) -> None:
    async with connected(backend, locked) as client:
        response = await client.get("/openapi.json")
    assert response.json() == document(asks_for={"client": True, "operator": True})


def test_without_keys_it_asks_for_none() -> None:
    described = document(asks_for={"client": False, "operator": False})
    assert described["components"]["securitySchemes"] == {}
    assert not any("security" in method for path in described["paths"].values() for method in path.values())


@every_operation
def test_good_requests_are_answered_as_described(api: BaseSchema, operation: Operation) -> None:
    assert fuzz(api, operation, good=True, examples=EXAMPLES, headers=KEY)


@pytest.mark.parametrize("operation", TAKING, ids=name)
def test_bad_requests_are_refused_as_described(api: BaseSchema, operation: Operation) -> None:
    assert fuzz(api, operation, good=False, examples=EXAMPLES, headers=KEY)


@every_operation
def test_who_has_no_key_is_refused(api: BaseSchema, operation: Operation) -> None:
    statuses = fuzz(api, operation, good=True, examples=3)
    assert set(statuses) <= ({200, 503} if operation.caller == "anybody" else {401})
