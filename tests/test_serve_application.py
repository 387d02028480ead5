"""`actors.ingress:app`, what `serve run` and `serve deploy` build: what cannot be served is said in one line, and leaves nothing behind."""

from collections.abc import Iterator

import pytest
import ray
from ray.serve.exceptions import RayServeException

from actors.controller import NAMESPACE
from actors.ingress import CONTROLLER_NAME, app, check_port, check_same_cluster
from afd_ray.config import ConfigError, load_config


def test_what_only_the_ingress_needs_may_change() -> None:
    changed = ["server.max_requests_per_s=5", "server.api_keys_file=keys"]
    check_same_cluster(load_config(), load_config(None, changed))


def test_what_the_cluster_was_started_with_may_not() -> None:
    with pytest.raises(ConfigError, match=r"attention.replicas: 3 is not what the running cluster was started with, 2"):
        check_same_cluster(load_config(), load_config(None, ["attention.replicas=3"]))


def test_a_mistake_in_the_arguments_is_one_line() -> None:
    with pytest.raises(RayServeException, match=r"^attention.replicas: must be at least 1, got 0$"):
        app({"config": "demo", "attention.replicas": "0"})


@pytest.mark.parametrize("wanted", [8000, 9000])
def test_a_port_that_is_left_out_or_serves_own_is_served(wanted: int) -> None:
    check_port(wanted, 9000)


def test_another_port_than_serves_is_named_with_serves() -> None:
    with pytest.raises(ConfigError, match=r"^server\.port: 9001 is not where Serve listens, 9000: .*http_options\.port"):
        check_port(9001, 9000)


@pytest.mark.ray
class TestWithoutRoom:
    @pytest.fixture(autouse=True)
    def _no_controller_is_left(self, two_nodes: None) -> Iterator[None]:
        yield
        with pytest.raises(ValueError, match="Failed to look up actor"):
            ray.get_actor(CONTROLLER_NAME, namespace=NAMESPACE)

    def test_a_missing_label_is_named(self) -> None:
        with pytest.raises(RayServeException, match=r"no node carries the labels pool=nowhere that ffn.labels asks for$"):
            app({"config": "demo", "ffn.labels": "{pool: nowhere}"})

    def test_a_port_of_its_own_is_refused(self) -> None:
        with pytest.raises(RayServeException, match=r"^server\.port: 9000 is not where Serve listens, 8000: "):
            app({"config": "demo", "server.port": "9000"})

    def test_an_impossible_demand_is_named_after_the_deadline(self) -> None:
        wanted = {"attention.num_cpus": "1000", "placement.wait_for_nodes_s": "0.1"}
        with pytest.raises(
            RayServeException, match=r"needed: attention 2000 CPUs .*, and no node that would help came in 0.1 s$"
        ):
            app({"config": "demo", **wanted})
