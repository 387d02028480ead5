"""What every test gets: one torch thread, and no Ray unless it is marked `ray`."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest


@pytest.fixture(autouse=True)
def _only_marked_tests_start_ray(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("ray"):
        return
    import ray

    def refuse(*args: object, **kwargs: object) -> None:
        raise RuntimeError("ray.init in a test without the `ray` marker")

    monkeypatch.setattr(ray, "init", refuse)
