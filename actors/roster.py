"""The actors of a cluster: which live, in which placement group, and what each said when asked."""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

from placement.groups import Reservation, describe
from placement.planner import Role

TRACE_GRACE_S = 1.0


@dataclass(slots=True)
class Hand:
    """One actor as the controller knows it."""

    name: str
    role: Role
    handle: Any
    reservation: Reservation
    bundle: int = 0
    identity: dict[str, Any] = field(default_factory=dict)
    """As `load` gave it: id, node, address, pid."""
    reason: str | None = None
    """Why it is dead."""


async def ask(hands: list[Hand], method: str, *args: Any, timeout_s: float | None = None) -> list[Any]:
    """Call a method on every actor at once; gives the answers in order. Raises the first error, naming the actor."""
    return await gather_named({hand.name: getattr(hand.handle, method).remote(*args) for hand in hands}, method, timeout_s)


async def gather_named(calls: dict[str, Any], what: str, timeout_s: float | None = None) -> list[Any]:
    """Await calls by actor name; a deadline names who has not answered, an error who failed."""
    tasks = {name: asyncio.ensure_future(awaited(call)) for name, call in calls.items()}
    if not tasks:
        return []
    done, pending = await asyncio.wait(tasks.values(), timeout=timeout_s, return_when=asyncio.FIRST_EXCEPTION)
    for name, task in tasks.items():
        error = task.exception() if task in done else None
        if error is not None:
            for other in pending:
                other.cancel()
            raise RuntimeError(f"{name}: {what} failed: {first_line(error)}") from error
    if pending:
        late = sorted(name for name, task in tasks.items() if task in pending)
        for task in pending:
            task.cancel()
        raise TimeoutError(f"{', '.join(late)}: {what} not over in {timeout_s:g} s")
    return [task.result() for task in tasks.values()]


async def trace_all(hands: list[Hand], steps: int, timeout_s: float) -> list[dict[str, Any]]:
    """Every actor's trace. Once one has its steps the others get as long again: an idle actor would never get there."""
    started_s = time.monotonic()
    calls = [asyncio.ensure_future(awaited(hand.handle.trace.remote(steps, timeout_s))) for hand in hands]
    _, pending = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
    if pending:
        await asyncio.wait(pending, timeout=max(TRACE_GRACE_S, time.monotonic() - started_s))
    await ask(
        [hand for hand, call in zip(hands, calls, strict=True) if not call.done()], "end_trace", timeout_s=TRACE_GRACE_S * 5
    )
    return [dict(await call, name=hand.name) for hand, call in zip(hands, calls, strict=True)]


async def awaited(call: Any) -> Any:
    """The answer to a Ray call: as a coroutine, for asyncio takes no object reference."""
    return await call


def first_line(error: BaseException) -> str:
    """The cause of a remote error in one line."""
    cause = getattr(error, "cause", None) or error
    text = str(cause).strip().splitlines()
    return (text[-1] if "Traceback" in str(cause) else text[0]) if text else type(cause).__name__


def placement_groups(hands: list[Hand]) -> list[dict[str, Any]]:
    """Each placement group once, as `status` shows it."""
    seen = {hand.reservation.id: hand.reservation for hand in hands}
    return [describe(reservation) for reservation in seen.values()]
