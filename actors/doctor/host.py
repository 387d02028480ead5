"""Facts of the host that this process runs on, each by a function."""

import os
import resource
import shutil
import socket
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from actors.doctor.devices import device_facts
from afd_ray.config import Config, model_directory
from afd_ray.diagnosis.facts import HostFacts
from afd_ray.models.checkpoint import Checkpoint, digest
from afd_ray.versions import DISTRIBUTION, all_versions

SHARED_MEMORY = Path("/dev/shm")


def host_facts(config: Config, address: str) -> HostFacts:
    """What can be seen without leaving this host; `address`: the one that others know it by."""
    model, model_error = _model(config)
    shm = shutil.disk_usage(SHARED_MEMORY)
    return HostFacts(
        name=socket.gethostname(),
        address=address,
        versions=all_versions(),
        unmet=tuple(unmet()),
        clock_ahead_s=0.0,
        clock_doubt_s=0.0,
        shm_total_bytes=shm.total,
        shm_free_bytes=shm.free,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        listen_error=listen_error(address, 0),
        model=model,
        model_error=model_error,
        token=os.environ.get("RAY_AUTH_MODE") == "token",
        devices=device_facts() if config.attention.num_gpus or config.ffn.num_gpus else None,
    )


def unmet() -> Iterator[str]:
    """Requirements of this project that are not met here; none where it runs without being installed."""
    try:
        requirements = [Requirement(text) for text in metadata.requires(DISTRIBUTION) or ()]
    except metadata.PackageNotFoundError:
        return
    for requirement in requirements:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            found = "none"
        if found == "none" or not requirement.specifier.contains(found, prereleases=True):
            yield f"{requirement.name}{requirement.specifier}, got {found}"


def listen_error(address: str, port: int) -> str | None:
    """Why nothing can listen there; 0: on any port."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        socket.create_server((address, port), family=family).close()
    except OSError as error:
        return os.strerror(error.errno) if error.errno else str(error)
    return None


def _model(config: Config) -> tuple[str | None, str | None]:
    """Digest of the checkpoint, or why it cannot be served."""
    try:
        checkpoint = Checkpoint.open(model_directory(config.model))
        checkpoint.require_sound()
        return f"{digest(checkpoint):016x}", None
    except (OSError, ValueError, RuntimeError) as error:
        return None, " ".join(str(error).split())
