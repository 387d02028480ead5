"""KubeRay's fields as tests/data/kuberay_v1.yaml has them, and our manifest, against the resource definition itself, which is KubeRay's and not here."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parent.parent
VARIABLE = "AFD_RAY_KUBERAY_CRD"
"""Names a copy of ray.io_rayservices.yaml."""
Schema = dict[str, Any]


def differences(fields: Any, schema: Schema, path: str = "") -> Iterator[str]:
    """What our fields say otherwise than `schema`, the OpenAPI schema of the place at `path`."""
    if isinstance(fields, list):
        yield from differences(fields[0], schema.get("items", {}), f"{path}[]")
    elif isinstance(fields, dict):
        there, required = schema.get("properties", {}), set(schema.get("required", ()))
        ours = {name.rstrip("!"): inner for name, inner in fields.items()}
        yield from (f"{path}.{name}: no such field" for name in ours.keys() - there.keys())
        if ".template" not in path:
            yield from (f"{path}.{name}: left out" for name in there.keys() - ours.keys())
        for name in required ^ {name.rstrip("!") for name in fields if name.endswith("!")}:
            yield f"{path}.{name}: {'' if name in required else 'not '}required"
        for name in ours.keys() & there.keys():
            yield from differences(ours[name], there[name], f"{path}.{name}")
    elif fields != word(schema):
        yield f"{path}: {word(schema)}, not {fields}"


def word(schema: Schema) -> str:
    """As our file would say it."""
    match schema:
        case {"x-kubernetes-int-or-string": True}:
            return "quantity"
        case {"enum": [*values]}:
            return f"one of {' '.join(values)}"
        case {"type": "array", "items": items}:
            return f"list of {word(items)}"
        case {"type": "object", "additionalProperties": dict() as values}:
            return f"map of {word(values)}"
    return str(schema.get("type"))


def closed(schema: Schema) -> Schema:
    """The same without room for unknown fields, which Kubernetes would drop."""
    inner: Schema = {"items": closed(schema["items"])} if "items" in schema else {}
    if isinstance(schema.get("additionalProperties"), dict):
        inner["additionalProperties"] = closed(schema["additionalProperties"])
    if "properties" in schema:
        inner["properties"] = {name: closed(field) for name, field in schema["properties"].items()}
        inner["additionalProperties"] = False
    return schema | inner


@pytest.fixture(scope="module")
def definition() -> Schema:
    """Of RayService, version v1."""
    if VARIABLE not in os.environ:
        pytest.skip(f"{VARIABLE} names no copy of KubeRay's ray.io_rayservices.yaml")
    resource = yaml.safe_load(Path(os.environ[VARIABLE]).read_text())
    (version,) = [version for version in resource["spec"]["versions"] if version["name"] == "v1"]
    return dict(version["schema"]["openAPIV3Schema"])


@pytest.mark.full
def test_our_fields_are_the_definitions(definition: Schema) -> None:
    fields = yaml.safe_load((ROOT / "tests" / "data" / "kuberay_v1.yaml").read_text())
    assert list(differences(fields["spec!"], definition["properties"]["spec"])) == []


@pytest.mark.full
def test_our_manifest_is_valid_by_the_definition(definition: Schema) -> None:
    manifest = yaml.safe_load((ROOT / "configs" / "cluster" / "kuberay.yaml").read_text())
    jsonschema.validate(manifest["spec"], closed(definition["properties"]["spec"]))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"a!": "integer", "b": "map of quantity"}, set()),
        ({"a!": "integer"}, {".b: left out"}),
        ({"a": "string", "b": "map of quantity"}, {".a: required", ".a: integer, not string"}),
        (
            {"a!": "integer", "b!": "map of string", "c": "string"},
            {".b: not required", ".b: map of quantity, not map of string", ".c: no such field"},
        ),
    ],
)
def test_a_difference_is_told(fields: Any, said: set[str]) -> None:
    quantities = {"type": "object", "additionalProperties": {"x-kubernetes-int-or-string": True}}
    assert set(differences(fields, {"properties": {"a": {"type": "integer"}, "b": quantities}, "required": ["a"]})) == said
