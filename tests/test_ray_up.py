"""`ray up configs/cluster/local.yaml`, `serve deploy`, tokens to another host and `ray down`, as docs/deploy.md walks through it; in full a resize and a drain too."""

from collections.abc import Iterator
from typing import Any

import pytest

from afd_ray.config import Model, model_directory
from afd_ray.models.checkpoint import Checkpoint, load_model
from tests.bed_cluster import Stream, Streams
from tests.live_server import until
from tests.ray_operator import ATTENTION, CLUSTER, DEADLINE_S, FFN, HEAD, MACHINES, OPERATOR, Operator, deployer

pytestmark = pytest.mark.timeout(600)

PROMPT = [5, 6, 7]
TOKENS, LONG = 24, 400
ASKED = {"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
RAYLET = "raylet/raylet "


@pytest.fixture(scope="module")
def reference() -> Any:
    return load_model(Checkpoint.open(model_directory(Model())))


@pytest.fixture(scope="module")
def deployed(needs_testbed: None) -> Iterator[Operator]:
    """From nothing to a server that says that it is ready; machines join while it is deployed."""
    with deployer() as operator:
        operator.brings_up()
        operator.runs_on_the_head("serve deploy ~/afd-ray/configs/serve/demo.yaml")
        until(lambda: operator.asks("GET", "/ready")[0] == 200, DEADLINE_S)
        yield operator


def test_tokens_over_http_equal_the_reference(deployed: Operator, reference: Any) -> None:
    _, answer = deployed.asks("POST", "/v1/completions", ASKED)
    assert answer["choices"][0]["token_ids"] == reference.generate_greedy(PROMPT, TOKENS)


def test_each_role_is_on_a_host_of_its_own_and_tcp_is_between_them(deployed: Operator) -> None:
    _, status = deployed.asks("GET", "/admin/status")
    hosts = {role: {actor["address"].split(":")[0] for actor in status[role]} for role in (ATTENTION, FFN)}
    assert hosts == {role: {deployed.hosts[role].address} for role in (ATTENTION, FFN)}
    assert len(deployed.handoff_sockets()) >= 2 * len(status[ATTENTION]), "one of each edge and direction"


@pytest.mark.full
def test_an_admin_key_is_asked_for(deployed: Operator) -> None:
    with pytest.raises(RuntimeError, match="401, wrong API key"):
        deployed.calls_us("status", "--url", deployed.url, "--api-key", "wrong")


@pytest.mark.full
def test_a_resize_changes_no_token(deployed: Operator, reference: Any) -> None:
    said = deployed.calls_us("scale", "--attention", "1", "--url", deployed.url, "--api-key", deployed.key)
    assert "1 attention and 1 FFN ranks" in said
    _, answer = deployed.asks("POST", "/v1/completions", ASKED)
    assert answer["choices"][0]["token_ids"] == reference.generate_greedy(PROMPT, TOKENS)


@pytest.mark.full
def test_a_drain_refuses_what_is_new_and_ends_what_is_in_progress(deployed: Operator, reference: Any) -> None:
    streams = Streams([Stream(deployed.url, PROMPT, LONG)], deployed.hosts[OPERATOR].call)
    streams.under_way()
    assert "nothing is in progress" in deployed.runs_on_the_head("python -m actors.cli drain")
    assert deployed.asks("POST", "/v1/completions", ASKED)[0] == 503
    assert deployed.asks("GET", "/admin/status")[1]["state"] == "stopping"
    assert streams.ended() == [reference.generate_greedy(PROMPT, LONG)]


def test_down_leaves_no_process_of_ray(deployed: Operator) -> None:
    """The machines are one's own: Ray's provider for them stops the head alone, the others are told by hand."""
    assert deployed.running(RAYLET) == list(MACHINES)
    deployed.stops_ray_on([ATTENTION, FFN])
    assert deployed.running(RAYLET) == [HEAD]
    deployed.types("ray", "down", "--yes", CLUSTER)
    assert [deployed.running(pattern) for pattern in (RAYLET, "ray::", "gcs_server")] == [[], [], []]
