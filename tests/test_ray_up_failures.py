"""What `ray up` and `serve deploy` cannot bring up: each ends in an error that names the cause, and none hangs."""

from collections.abc import Iterator

import pytest

from tests.ray_operator import FFN, HEAD, OTHER_PACKAGES, Operator, deployer

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]

DEMO = "~/afd-ray/configs/serve/demo.yaml"
OTHER_TORCH = f"{OTHER_PACKAGES}/torch-2.12.9.dist-info"


@pytest.fixture(scope="module")
def operator(needs_testbed: None) -> Iterator[Operator]:
    """A cluster that is up; its FFN machine has, to all appearances, another torch."""
    with deployer() as operator:
        metadata = "Metadata-Version: 2.1\nName: torch\nVersion: 2.12.9\n"
        operator.hosts[FFN].run(["sh", "-c", f"mkdir -p {OTHER_TORCH} && cat > {OTHER_TORCH}/METADATA"], input=metadata)
        operator.brings_up()
        yield operator


def test_hosts_of_clashing_versions_are_told(operator: Operator) -> None:
    operator.runs_on_the_head(f"serve deploy {DEMO}")
    operator.awaits_failure("nodes have different versions of torch: most actors run", "(2.12.9)")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            "s/ffn.labels: {pool: ffn}/ffn.labels: {pool: nowhere}/",
            "no node carries the labels pool=nowhere that ffn.labels asks for",
        ),
        ("s/attention.replicas: 2/attention.replicas: 50/", "needed: attention 50 CPUs in 50 group(s)"),
    ],
    ids=["label", "demand"],
)
def test_what_no_node_has_room_for_is_told_after_the_deadline(operator: Operator, change: str, said: str) -> None:
    operator.runs_on_the_head(f"sed -e '{change}; s/nodes_s: 600/nodes_s: 1/' {DEMO} > changed.yaml && serve deploy changed.yaml")
    operator.awaits_failure(said)


def test_a_machine_with_another_token_is_refused(operator: Operator) -> None:
    address = f"{operator.hosts[HEAD].address}:6379"
    with pytest.raises(RuntimeError, match="Authentication token is missing or incorrect"):
        operator.types("env", f"RAY_AUTH_TOKEN={'f' * 32}", "ray", "start", f"--address={address}")
