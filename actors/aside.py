"""Blocking work beside the event loop, each piece in a thread of its own."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import ParamSpec, TypeVar

logger = logging.getLogger(__name__)

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


def persist(function: Callable[[], object], pause_s: float) -> threading.Thread:
    """Call it, in a thread, until it does not raise, with pauses between."""

    def run() -> None:
        while True:
            try:
                function()
            except Exception as error:  # whatever it is, the next call may succeed
                logger.warning("%s is tried again: %s", function.__name__, error)
                time.sleep(pause_s)
            else:
                return

    thread = threading.Thread(target=run, name=function.__name__, daemon=True)
    thread.start()
    return thread
