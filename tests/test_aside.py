"""Work beside the event loop."""

import threading

import pytest

from actors.aside import aside, persist


async def test_aside_gives_the_result_from_another_thread() -> None:
    assert await aside(threading.get_ident) != threading.get_ident()


async def test_aside_raises_what_the_work_raises() -> None:
    with pytest.raises(ZeroDivisionError):
        await aside(lambda: 1 // 0)


def test_persist_calls_again_until_nothing_is_raised() -> None:
    calls: list[int] = []

    def fails_twice() -> None:
        calls.append(len(calls))
        if len(calls) < 3:
            raise ConnectionError("not yet")

    thread = persist(fails_twice, 0.0)
    thread.join(10.0)
    assert not thread.is_alive()
    assert calls == [0, 1, 2]
