"""This process into a Ray cluster that is there, and out of it again; why it cannot get in, in one line."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray._common.usage.usage_lib import get_cluster_metadata
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled, without types

from actors.cluster import ClusterError
from actors.controller import NAMESPACE
from afd_ray.diagnosis.finding import Finding
from afd_ray.diagnosis.joining import clash, explain
from afd_ray.versions import all_versions

CONNECT_TIMEOUT_S = 5.0


class Refused(ClusterError):
    """The cluster is not there, or does not let this process in."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(f"{finding.found}; {finding.change}")
        self.finding = finding


@contextmanager
def joined(address: str) -> Iterator[None]:
    """Connected to the Ray cluster at `address` (HOST:PORT, or `auto`). Raises Refused."""
    require_answer(address)
    try:
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise Refused(explain(address, f"{error}\n{error.__cause__ or ''}")) from error
    try:
        yield
    finally:
        ray.shutdown()


def require_answer(address: str) -> None:
    """Raises Refused when nobody listens at `address`, wants another token, or runs other versions: Ray itself would try for a minute, and not say which it was."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
        theirs = get_cluster_metadata(GcsClient(address=address))
    except OSError as error:
        raise Refused(explain(address, error.strerror or str(error))) from None
    except ray.exceptions.RayError as error:
        raise Refused(explain(address, str(error))) from None
    finding = clash({name: theirs[f"{name}_version"] for name in ("ray", "python")}, all_versions())
    if finding is not None:
        raise Refused(finding)
