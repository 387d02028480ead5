"""Imports go one way: afd_ray <- placement <- actors <- benchmarks, tests; read from every import statement, lazy ones too."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import ray

ROOT = Path(__file__).resolve().parent.parent
GPU = [ROOT / "afd_ray" / part / "gpu" for part in ("kernels", "engine", "handoff")]
LOADS_THE_GPU = ROOT / "actors" / "device.py"
"""Where a configuration asks for it, and not before."""
FORBIDDEN = {
    "afd_ray": {"ray", "placement", "actors", "benchmarks", "tests"},
    "configs": {"ray", "placement", "actors", "benchmarks", "tests", "afd_ray"},
    "placement": {"actors", "benchmarks", "tests"},
    "actors": {"benchmarks", "tests"},
}
LAZY_ALLOWED: dict[str, str] = {}
"""Modules of afd_ray that may import inside a function, and why."""


class Import(NamedTuple):
    file: str
    line: int
    top: str
    """First part of the imported name."""
    is_lazy: bool


def imports_of(source: str, file: str) -> Iterator[Import]:
    """Every import of a module, with whether it stands in a function; TYPE_CHECKING blocks count as well."""
    tree = ast.parse(source, file)
    lazy = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        for name in _imported(node, file):
            yield Import(file, getattr(node, "lineno", 0), name.split(".")[0], id(node) in lazy)


def _imported(node: ast.AST, file: str) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""] if node.level == 0 else [file.split("/")[0]]
    if isinstance(node, ast.Call) and _called(node.func) in ("import_module", "__import__") and node.args:
        name = node.args[0]
        return [name.value] if isinstance(name, ast.Constant) and isinstance(name.value, str) else []
    return []


def _called(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def package_imports(package: str) -> list[Import]:
    files = sorted((ROOT / package).rglob("*.py"))
    return [found for file in files for found in imports_of(file.read_text(), str(file.relative_to(ROOT)))]


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_go_one_way(package: str) -> None:
    wrong = [found for found in package_imports(package) if found.top in FORBIDDEN[package]]
    assert not wrong, "\n".join(f"{found.file}:{found.line} imports {found.top}" for found in wrong)


def test_only_the_gpu_s_own_folders_import_triton() -> None:
    """The CPU path does without: neither Triton nor what imports it."""
    files = [
        file for package in FORBIDDEN for file in (ROOT / package).rglob("*.py") if not any(gpu in file.parents for gpu in GPU)
    ]
    found = {file for file in files if re.search(r"^\s*(import|from) (triton|afd_ray\.\w+\.gpu)", file.read_text(), re.M)}
    assert found == {LOADS_THE_GPU}
    lazy = imports_of(LOADS_THE_GPU.read_text(), LOADS_THE_GPU.name)
    assert {entry.top for entry in lazy if entry.is_lazy} == {"afd_ray"}


def test_the_core_imports_at_the_top() -> None:
    lazy = [found for found in package_imports("afd_ray") if found.is_lazy and found.file not in LAZY_ALLOWED]
    assert not lazy, "\n".join(f"{found.file}:{found.line} imports {found.top} in a function" for found in lazy)


def test_the_reader_sees_every_form_of_import() -> None:
    source = (
        "import ray.util\ndef f():\n    from actors import cli\n    importlib.import_module('placement.x')\nfrom . import y\n"
    )
    found = {(entry.top, entry.is_lazy) for entry in imports_of(source, "afd_ray/x.py")}
    assert found == {("ray", False), ("actors", True), ("placement", True), ("afd_ray", False)}


def test_ray_cannot_be_started_here() -> None:
    with pytest.raises(RuntimeError, match="without the `ray` marker"):
        ray.init()
