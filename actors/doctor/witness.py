"""Witness: a Ray actor on one host that tells what it sees, and takes its side of links that are tried."""

import time
from typing import Any

import ray

from actors.doctor.host import host_facts, listen_error
from actors.doctor.meetings import Meetings
from afd_ray.config import Config
from afd_ray.diagnosis.facts import HostFacts
from afd_ray.handoff.mesh import LinkKind


class Witness:
    """Takes no resources; ended when the examination is over."""

    def __init__(self, config: Config, address: str) -> None:
        self._config, self._address = config, address
        self._meetings = Meetings()

    @ray.method
    def facts(self) -> HostFacts:
        return host_facts(self._config, self._address)

    @ray.method
    def clock(self) -> float:
        """Seconds since 1970."""
        return time.time()

    @ray.method
    def port_error(self, host: str, port: int) -> str | None:
        """Why the ingress could not listen there."""
        return listen_error(host, port)

    @ray.method
    def open(self, number: int, rank: int, kind: LinkKind, secret: bytes) -> dict[str, Any]:
        return self._meetings.open(number, rank, kind, self._address, secret)

    @ray.method
    def meet(self, number: int, rank: int, peer: dict[str, Any]) -> str | None:
        return self._meetings.meet(number, rank, peer)

    @ray.method
    def leave(self, number: int, rank: int) -> None:
        self._meetings.leave(number, rank)
