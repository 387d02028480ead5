"""The end of serving: no new request, and those in progress are waited for."""

import threading
import time
from typing import Any

import ray
from ray import serve
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


def drain_application(address: str, application: str, timeout_s: float) -> int:
    """As `drain`, of the Serve application of that name in the Ray cluster at `address`. Raises ClusterError (one line)."""
    with joined(address):
        try:
            replicas = Replicas(serve.get_app_handle(application))
        except RayServeException:
            raise ClusterError(f"no Serve application {application} in the Ray cluster at {address}") from None
        return drain(replicas, threading.Event(), timeout_s)
