"""What every test gets: one torch thread, Triton's interpreter, and no Ray unless it is marked `ray`."""

import os
import secrets
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Triton reads it once, when it is imported. TRITON_INTERPRET=0 compiles the kernels and runs them on a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from xdist.scheduler import LoadScopeScheduling

# Before any test module imports Ray, which reads it once. A token of the run's own: on a new machine the first cluster would make one, and what was imported before
# would go on without.
os.environ.setdefault("RAY_AUTH_MODE", "token")
if os.environ["RAY_AUTH_MODE"] == "token":
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

pytest.register_assert_rewrite("tests.live_server")

if TYPE_CHECKING:
    from xdist.remote import Producer

    from tests.live_server import LiveServer


class RayInOneProcess(LoadScopeScheduling):
    """Of a run in two processes, one has every file that uses Ray, so that they share one cluster; of the rest each file goes to either."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "ray" if _uses_ray(self.config.rootpath / file) else file


@cache
def _uses_ray(file: Path) -> bool:
    return "pytest.mark.ray" in file.read_text(encoding="utf-8")


def pytest_xdist_make_scheduler(config: pytest.Config, log: "Producer") -> LoadScopeScheduling:
    return RayInOneProcess(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins first."""
    items.sort(key=lambda item: not _uses_ray(item.path))


@pytest.fixture(autouse=True)
def _only_marked_tests_start_ray(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("ray"):
        return
    import ray

    def refuse(*args: object, **kwargs: object) -> None:
        raise RuntimeError("ray.init in a test without the `ray` marker")

    monkeypatch.setattr(ray, "init", refuse)


@pytest.fixture(autouse=True)
def _how_ray_authenticates_stays_as_it_was() -> Iterator[None]:
    """A command that joins a cluster decides it for its process; here the Ray cluster of other tests would be left without an answer."""
    before = os.environ.get("RAY_AUTH_MODE")
    yield
    if before is None:
        os.environ.pop("RAY_AUTH_MODE", None)
    else:
        os.environ["RAY_AUTH_MODE"] = before


@pytest.fixture(scope="session")
def two_nodes() -> Iterator[None]:
    """The one Ray cluster of the whole run: two nodes in this machine's processes, this process connected to it."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 8, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=8)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, namespace="afd", log_to_driver=False, configure_logging=False)
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 `step3-tiny` checkpoint with random weights."""
    from afd_ray.models.checkpoint import write_checkpoint
    from afd_ray.models.presets import PRESETS, random_tensors

    directory = tmp_path_factory.mktemp("models") / "step3-tiny"
    write_checkpoint(directory, PRESETS["step3-tiny"], random_tensors(PRESETS["step3-tiny"], seed=0))
    return directory


@pytest.fixture(scope="session")
def needs_testbed() -> None:
    """Skips where there can be no test bed, and fails instead where that would hide a failure."""
    from benchmarks.testbed import why_not

    reason = why_not()
    if reason:
        (pytest.fail if os.environ.get("AFD_RAY_NEEDS_TEST_BED") else pytest.skip)(reason)


@pytest.fixture(scope="session")
def live() -> Iterator["LiveServer"]:
    """The one `afd-ray serve` of the whole run."""
    from tests.live_server import live_server

    with live_server() as server:
        yield server
