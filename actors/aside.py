"""Blocking work beside the event loop, each piece in a thread of its own."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def aside(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Its result. Not a pool's thread: all of those might wait for a peer that does not answer, and they keep kernels' threads for good."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()  # the work goes on though nobody should wait for it any more

    def run() -> None:
        try:
            future.set_result(function(*args, **kwargs))
        except BaseException as error:  # handed to whoever waits
            future.set_exception(error)

    threading.Thread(target=run, name=function.__name__, daemon=True).start()
    return await asyncio.wrap_future(future)
