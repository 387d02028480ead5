"""API keys in a file: hashed, told apart by name, followed as the file changes."""

import json
import os
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import Request

from actors.cli import main
from actors.http.app import Options
from actors.http.auth import LOOK_S, Keys
from actors.http.errors import ApiError
from actors.http.limits import MAX_CALLERS, RequestRate
from afd_ray import api_keys
from tests.ingress_fake import FakeBackend, connected

KEYS = [api_keys.key_of(bytes([number]) * 32) for number in range(3)]


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def carrying(key: str) -> Request:
    return Request({"type": "http", "headers": [(b"authorization", b"Bearer " + key.encode())]})


def lets_in(keys: Keys, key: str) -> bool:
    try:
        keys.check(carrying(key))
    except ApiError:
        return False
    return True


def test_the_file_holds_no_key_in_clear() -> None:
    text = api_keys.with_key("# team\n", KEYS[0], "alice", "2026-11-22")
    assert KEYS[0] not in text
    (key,) = api_keys.parse(text, "keys")
    assert (key.name, key.added, key.is_plain) == ("alice", "2026-11-22", False)
    assert api_keys.holder([key], KEYS[0]) == key
    assert api_keys.holder([key], KEYS[1]) is None
    assert api_keys.holder([key], key.digest.hex()) is None, "who reads the file cannot call with what stands there"


def test_a_key_in_plain_text_goes_on_working() -> None:
    keys = api_keys.parse("# team\n\n  secret \n", "keys")
    assert [(key.name, key.is_plain) for key in keys] == [("line-3", True)]
    assert api_keys.holder(keys, "secret") == keys[0]


@pytest.mark.parametrize("line", ["sha256:12 alice", "sha256:", f"sha256:{'g' * 64} alice", f"sha256:{'a' * 64}"])
def test_half_a_hash_is_no_key_in_plain_text(line: str) -> None:
    with pytest.raises(ValueError, match="keys, line 1: must be sha256: and 64 hexadecimal digits"):
        api_keys.parse(line, "keys")


def test_one_name_has_one_key() -> None:
    text = api_keys.with_key(api_keys.with_key("", KEYS[0], "alice", "2026-11-22"), KEYS[1], "alice", "2026-11-22")
    with pytest.raises(ValueError, match="the name alice is given twice"):
        api_keys.parse(text, "keys")


def test_taking_a_key_out_leaves_the_rest_as_it_is() -> None:
    before = "# team\n" + api_keys.with_key("plain\n", KEYS[0], "alice", "2026-11-22")
    text = api_keys.with_key(before, KEYS[1], "bob", "2026-11-22")
    assert api_keys.without_key(text, "bob") == before
    assert "plain" not in api_keys.without_key(text, "line-2")
    with pytest.raises(ValueError, match="no key of the name carol"):
        api_keys.without_key(text, "carol")


def test_a_running_server_follows_the_file(tmp_path: Path) -> None:
    file, clock = tmp_path / "keys", Clock()
    file.write_text(api_keys.with_key("", KEYS[0], "alice", "2026-11-22"))
    keys = Keys(file, clock)
    assert keys.check(carrying(KEYS[0])) == "alice"
    file.write_text(api_keys.with_key("", KEYS[1], "bob", "2026-11-22") + "\n")
    clock.now_s += LOOK_S
    assert [lets_in(keys, key) for key in KEYS] == [False, True, False]


@pytest.mark.parametrize("broken", ["sha256:12 alice", None], ids=["unreadable line", "gone"])
def test_a_file_that_cannot_be_read_changes_nothing(tmp_path: Path, broken: str | None) -> None:
    file, clock = tmp_path / "keys", Clock()
    file.write_text(KEYS[0])
    keys = Keys(file, clock)
    file.unlink() if broken is None else file.write_text(broken)
    clock.now_s += LOOK_S
    assert [lets_in(keys, key) for key in KEYS[:2]] == [True, False]


def test_when_the_last_key_is_revoked_nobody_gets_in(tmp_path: Path) -> None:
    file, clock = tmp_path / "keys", Clock()
    file.write_text(KEYS[0])
    keys = Keys(file, clock)
    file.write_text("# none\n")
    clock.now_s += LOOK_S
    assert not lets_in(keys, KEYS[0])


def test_the_command_makes_lists_and_revokes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*words: str) -> Any:
        assert main(["keys", *words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    file = tmp_path / "keys"
    made = run("add", str(file), "--name", "alice")
    assert (made["name"], len(made["key"])) == ("alice", len("afd-") + 64)
    assert file.stat().st_mode & 0o777 == 0o600
    assert lets_in(Keys(file), made["key"])
    os.chmod(file, 0o640)
    drawn = run("add", str(file))
    assert file.stat().st_mode & 0o777 == 0o640
    assert [key["name"] for key in run("list", str(file))] == ["alice", drawn["name"]]
    assert run("revoke", str(file), "alice") == {"name": "alice", "left": 1}
    assert [lets_in(Keys(file), key) for key in (made["key"], drawn["key"])] == [False, True]
    assert os.listdir(tmp_path) == ["keys"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["add", "FILE", "--name", "alice"], "has a key of the name alice already"),
        (["add", "FILE", "--name", "a b"], "--name: must be up to 64 letters"),
        (["revoke", "FILE", "bob"], "NAME: no key of the name bob"),
        (["list", "MISSING"], "No such file"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    file = tmp_path / "keys"
    file.write_text(api_keys.with_key("", KEYS[0], "alice", "2026-11-22"))
    assert main(["keys", *(str(file) if word == "FILE" else word for word in words)]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert said in captured.err


def test_a_caller_may_ask_so_often_and_no_other_one_notices() -> None:
    clock = Clock()
    rate = RequestRate(2.0, clock)
    for _ in range(2):
        rate.take("alice")
    with pytest.raises(ApiError) as refused:
        rate.take("alice")
    assert (refused.value.status, refused.value.headers["Retry-After"]) == (429, "1")
    rate.take("bob")
    clock.now_s = 0.5
    rate.take("alice")


def test_a_slow_rate_says_how_long_to_wait() -> None:
    rate = RequestRate(0.1, Clock())
    rate.take("alice")
    with pytest.raises(ApiError) as refused:
        rate.take("alice")
    assert refused.value.headers["Retry-After"] == "10"


def test_callers_are_not_remembered_without_end() -> None:
    rate = RequestRate(1.0, Clock())
    for number in range(MAX_CALLERS + 1):
        rate.take(str(number))
    rate.take("0")
    with pytest.raises(ApiError):
        rate.take(str(MAX_CALLERS))


async def answer(
    options: Options, path: str = "/v1/models", headers: dict[str, str] | None = None, times: int = 1
) -> httpx.Response:
    async with connected(FakeBackend(None, [1]), options) as client:
        for _ in range(times):
            response = await client.get(path, headers=headers)
    return response


async def test_too_many_requests_of_one_key_are_answered_429(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("one\ntwo\n")
    options = Options(api_keys=Keys(tmp_path / "keys"), rate=RequestRate(1.0, Clock()))
    refused = await answer(options, headers={"authorization": "Bearer one"}, times=2)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert (await answer(options, headers={"authorization": "Bearer two"})).status_code == 200
    assert (await answer(options, headers={"authorization": "Bearer wrong"}, times=2)).status_code == 401


async def test_without_keys_an_address_is_a_caller() -> None:
    assert (await answer(Options(rate=RequestRate(1.0, Clock())), times=2)).status_code == 429


@pytest.mark.parametrize("path", ["/v1/models", "/health"])
async def test_headers_over_the_limit_are_answered_431(path: str) -> None:
    options = Options(max_header_bytes=2048)
    assert (await answer(options, path, {"x": "y" * 1000})).status_code == 200
    refused = await answer(options, path, {"x": "y" * 3000})
    assert (refused.status_code, refused.json()["error"]["code"]) == (431, "headers_too_large")
