"""Requests that have only so much time."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import TypeVar

from actors.http.backend import TimedOut

T = TypeVar("T")


async def in_time(
    items: AsyncGenerator[T, None], limit_s: float, started_s: float, clock: Callable[[], float]
) -> AsyncGenerator[T, None]:
    """The items until `limit_s` after `started_s` (on `clock`); then closes their iterator and raises TimedOut."""
    async with aclosing(items):
        while True:
            left_s = started_s + limit_s - clock()
            try:
                if left_s <= 0:  # without it, tokens that are there already would go on
                    raise TimeoutError
                async with asyncio.timeout(left_s):
                    item = await anext(items)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise TimedOut(f"the request was not over in timeout_s, {limit_s:g} s") from None
            yield item
