"""The end of serving: no new request, and those in progress are waited for."""

import asyncio
import gc
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray import serve
from ray.serve._private.long_poll import LongPollClient
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from actors.cluster import ClusterError
from actors.joining import joined
from actors.reporting import report
from actors.roster import first_line

POLL_S = 0.05
ANSWER_TIMEOUT_S = 5.0


class Replicas:
    """The ingress replicas, all of them at once."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    def drain(self, at_once: bool = False) -> int:
        """As Ingress.drain, summed. Raises ClusterError (one line) when they do not answer."""
        try:
            return sum(self._handle.broadcast("drain", at_once).results(timeout_s=ANSWER_TIMEOUT_S))
        except (ray.exceptions.RayError, RayServeException, TimeoutError) as error:
            raise ClusterError(f"the ingress does not answer: {first_line(error)}") from error


def drain(replicas: Replicas, at_once: threading.Event, timeout_s: float) -> int:
    """Until nothing is in progress: for `timeout_s` at most, then what is left is ended; not at all once `at_once` is set.

    Gives how many requests were left. Raises ClusterError when the ingress does not answer.
    """
    end_s = time.monotonic() + timeout_s
    left = replicas.drain()
    if left:
        report(f"waiting for {left} requests in progress, {timeout_s:g} s at most")
    while left and time.monotonic() < end_s and not at_once.wait(POLL_S):
        left = replicas.drain()
    if left and not at_once.is_set():
        report(f"{left} requests in progress end unfinished")
        replicas.drain(at_once=True)
    return left


def drain_application(address: str, name: str | None, timeout_s: float) -> int:
    """As `drain`, of a Serve application in the Ray cluster at `address`: of that name, or the only one. Raises ClusterError (one line)."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    with joined(address), polling_ended():
        chosen = _chosen(list(serve.status().applications), name, address)
        return drain(Replicas(serve.get_app_handle(chosen)), threading.Event(), timeout_s)


@contextmanager
def polling_ended() -> Iterator[None]:
    """At the end no router of Serve polls its controller any more: after `ray.shutdown` the next poll would start a Ray of its own, and fail at length."""

    async def stop(client: LongPollClient) -> None:
        client.stop()

    try:
        yield
    finally:
        for client in [found for found in gc.get_objects() if type(found) is LongPollClient]:
            # On its own loop: a poll that has begun is through before.
            asyncio.run_coroutine_threadsafe(stop(client), client.event_loop).result(ANSWER_TIMEOUT_S)


def _chosen(there: list[str], name: str | None, address: str) -> str:
    if name is None and len(there) == 1:
        return there[0]
    if name is not None and name in there:
        return name
    found = f"there are {', '.join(there)}" if there else "there is none"
    raise ClusterError(f"--application: which Serve application of the Ray cluster at {address}? {found}")
