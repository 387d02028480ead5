"""The cluster configurations: valid by Ray's and KubeRay's own rules, and alike in what matters."""

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from actors.serve import SERVE_ENVIRONMENT
from afd_ray.config import Config, check_supported, load_config

ROOT = Path(__file__).parent.parent
CLUSTER = ROOT / "configs" / "cluster"
LAUNCHED = ("local", "aws", "gcp")
CLOUDS = ("aws", "gcp")
BOOT_MINUTES = 10
"""More than a machine takes to boot, install the project and join."""
QUANTITY = r"^[+-]?(\d+(\.\d*)?|\.\d+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?\d+)?$"
"""How Kubernetes writes an amount: `500m`, `16Gi`."""


def read(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((CLUSTER / f"{name}.yaml").read_text()))


def schema_of(fields: Any) -> dict[str, Any]:
    """The JSON schema that an entry of tests/data/kuberay_v1.yaml stands for."""
    match fields:
        case dict():
            known = {name.rstrip("!"): schema_of(inner) for name, inner in fields.items()}
            required = [name.rstrip("!") for name in fields if name.endswith("!")]
            return {"type": "object", "properties": known, "required": required, "additionalProperties": False}
        case [item]:
            return {"type": "array", "items": schema_of(item)}
        case "quantity":
            return {"type": ["string", "integer"], "pattern": QUANTITY}
        case str() if fields.startswith("list of "):
            return {"type": "array", "items": schema_of(fields.removeprefix("list of "))}
        case str() if fields.startswith("map of "):
            return {"type": "object", "additionalProperties": schema_of(fields.removeprefix("map of "))}
        case str() if fields.startswith("one of "):
            return {"enum": fields.removeprefix("one of ").split()}
    return {"type": fields}


KUBERAY = schema_of(yaml.safe_load((ROOT / "tests" / "data" / "kuberay_v1.yaml").read_text()))


def served(deployed: dict[str, Any]) -> Config:
    """The configuration that a Serve application of ours comes to."""
    (application,) = ServeDeploySchema.model_validate(deployed).applications
    assert application.import_path == "actors.ingress:app"
    args = dict(application.args)
    config = load_config(args.pop("config"), [f"{key}={value}" for key, value in args.items()])
    check_supported(config)
    return config


def pools(name: str) -> dict[str, dict[str, str]]:
    """Labels by node type, of those that have any."""
    if name == "kuberay":
        groups = read(name)["spec"]["rayClusterConfig"]["workerGroupSpecs"]
        return {group["groupName"]: group["labels"] for group in groups}
    types = read(name)["available_node_types"]
    return {kind: node["labels"] for kind, node in types.items() if "labels" in node}


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_itself_accepts_it(name: str) -> None:
    """Against its schema (ray-schema.json), once its defaults are filled in as `ray up` does."""
    validate_config(prepare_config(read(name)))


@pytest.mark.parametrize("mistake", ["wrong key", "too few workers", "no such head"])
def test_rays_rules_find_a_mistake(mistake: str) -> None:
    config = read("aws")
    if mistake == "wrong key":
        config["available_node_types"]["ffn"]["label"] = {}
    elif mistake == "too few workers":
        config["max_workers"] = 1
    else:
        config["head_node_type"] = "boss"
    with pytest.raises((jsonschema.ValidationError, ValueError)):
        validate_config(prepare_config(config))


def test_the_manifest_is_what_kuberay_knows() -> None:
    jsonschema.validate(read("kuberay"), KUBERAY)


GROUP = ("spec", "rayClusterConfig", "workerGroupSpecs", 0)


@pytest.mark.parametrize(
    "path",
    [
        ("kind",),
        (*GROUP, "label"),
        (*GROUP, "maxReplicas"),
        ("spec", "rayClusterConfig", "authOptions", "mode"),
        (*GROUP, "template", "spec", "containers", 0, "resources", "limits", "memory"),
    ],
    ids=lambda path: path[-1],
)
def test_the_rules_for_manifests_find_a_mistake(path: tuple[Any, ...]) -> None:
    manifest = read("kuberay")
    place: Any = manifest
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = "x"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(manifest, KUBERAY)


@pytest.mark.parametrize("name", [*CLOUDS, "kuberay"])
def test_both_pools_have_the_labels_that_the_application_asks_for(name: str) -> None:
    config = served(yaml.safe_load((ROOT / "configs" / "serve" / "demo.yaml").read_text()))
    assert pools(name) == {"attention": config.attention.labels, "ffn": config.ffn.labels}


def test_the_manifests_application_is_the_one_of_configs_serve() -> None:
    manifest = served(yaml.safe_load(read("kuberay")["spec"]["serveConfigV2"]))
    own = served(yaml.safe_load((ROOT / "configs" / "serve" / "demo.yaml").read_text()))
    keys = {"admin_keys_file": None}
    assert manifest.model_copy(update={"server": manifest.server.model_copy(update=keys)}) == own.model_copy(
        update={"server": own.server.model_copy(update=keys)}
    )
    assert own.server.admin_keys_file
    assert manifest.server.admin_keys_file


@pytest.mark.parametrize("name", LAUNCHED)
def test_whoever_logs_in_has_the_environment_with_token_authentication(name: str) -> None:
    environment = (CLUSTER / "ray.env").read_text()
    assert "export RAY_AUTH_MODE=token\n" in environment
    config = read(name)
    assert any(
        command.endswith("echo '. ~/afd-ray/configs/cluster/ray.env' >> ~/.bashrc") for command in config["setup_commands"]
    )
    assert "~/.ray/auth_token" in config["file_mounts"]


def test_kuberay_gives_every_pod_the_token() -> None:
    assert read("kuberay")["spec"]["rayClusterConfig"]["authOptions"]["mode"] == "token"


@pytest.mark.parametrize(("name", "value"), SERVE_ENVIRONMENT.items())
def test_serve_runs_as_the_command_line_starts_it(name: str, value: str) -> None:
    assert f"export {name}={value}\n" in (CLUSTER / "ray.env").read_text()
    ray = read("kuberay")["spec"]["rayClusterConfig"]
    for group in (ray["headGroupSpec"], *ray["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        assert {"name": name, "value": value} in container["env"]


def test_idle_machines_stay_longer_than_they_take_to_boot() -> None:
    minutes = [read(name)["idle_timeout_minutes"] for name in LAUNCHED]
    minutes.append(read("kuberay")["spec"]["rayClusterConfig"]["autoscalerOptions"]["idleTimeoutSeconds"] / 60)
    assert min(minutes) > BOOT_MINUTES
