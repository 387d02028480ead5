"""Which versions run on this host: of what hosts have in common, and of this project's own files."""

import hashlib
import platform
from importlib import metadata
from pathlib import Path

DISTRIBUTION = "afd-ray"
DECISIVE = (DISTRIBUTION, "torch")
"""What must be alike for the members of one epoch to compute the same."""
COMMON = (*DECISIVE, "ray", "numpy", "msgpack", "grpcio")
OWN = ("afd_ray", "placement", "actors")


def versions(packages: tuple[str, ...] = COMMON) -> dict[str, str]:
    """By package; what is not installed is left out."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def all_versions() -> dict[str, str]:
    """`versions`, of Python, and of this project's own code."""
    return {"python": platform.python_version(), "code": code_digest(), **versions()}


def code_digest() -> str:
    """12 hexadecimal digits over the project's Python files, as they lie on this host."""
    root = Path(__file__).resolve().parent.parent
    total = hashlib.sha256()
    for file in sorted(file for package in OWN for file in (root / package).rglob("*.py")):
        total.update(str(file.relative_to(root)).encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()[:12]
