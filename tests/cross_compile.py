"""What a launch on a Hopper GPU would compile to, found without one: `python -m tests.cross_compile NAME...`, as JSON.

It runs in a process of its own, because Triton decides once whether kernels are interpreted.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

HOPPER = GPUTarget("cuda", 90, 32)
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}


class Compiled(NamedTuple):
    """One kernel as ptxas made it."""

    kernel: str
    registers: int
    spills: int
    """Instructions that move registers to and from local memory."""
    shared_bytes: int
    wgmma: int
    """Warp-group matrix instructions, of 16 bits (HGMMA) or 8 (QGMMA)."""
    mma: int
    """Matrix instructions of single warps."""
    asynchronous_copies: int
    warps: int


def compiled_by(launch: Callable[[], object]) -> list[Compiled]:
    """The kernels that a launcher starts when it is called with tensors on the meta device, compiled with the options that it chose."""
    compiled: list[Compiled] = []

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        compiled.append(_compile(kernel, arguments, named))

    with patch.object(JITFunction, "run", run):
        launch()
    return compiled


def _compile(kernel: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Compiled:
    values = dict(zip(kernel.arg_names, arguments, strict=False)) | {
        name: named[name] for name in kernel.arg_names if name in named
    }
    options = {name: value for name, value in named.items() if name not in values}
    constants = {p.name: values[p.name] for p in kernel.params if p.is_constexpr or values[p.name] is None}
    signature = {name: "constexpr" if name in constants else _type(values[name]) for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name not in constants and _is_aligned(kernel.params[i], values[name])
    }
    built = triton.compile(ASTSource(kernel, signature, constants, aligned), target=HOPPER, options=options)
    resources, code = _read(built.asm["cubin"])
    count = Counter(code)
    return Compiled(
        kernel=kernel.__name__,
        registers=int(re.findall(r"REG:(\d+)", resources)[0]),
        spills=count["STL"] + count["LDL"],
        shared_bytes=built.metadata.shared,
        wgmma=count["HGMMA"] + count["QGMMA"],
        mma=count["HMMA"] + count["QMMA"],
        asynchronous_copies=count["LDGSTS"] + count["UTMALDG"],
        warps=built.metadata.num_warps,
    )


def _type(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"*{TYPES[value.dtype]}"
    return "fp32" if isinstance(value, float) else "i32"


def _is_aligned(parameter: Any, value: object) -> bool:
    """As Triton takes it at a launch; torch's allocator aligns every tensor."""
    if parameter.do_not_specialize or parameter.do_not_specialize_on_alignment:
        return False
    return isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)


def _read(cubin: bytes) -> tuple[str, list[str]]:
    """What cuobjdump says of the resources used, and the opcodes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        resources = _output("cuobjdump", "-res-usage", file.name)
        listing = _output("nvdisasm", "-c", file.name)
    return resources, re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)", listing, re.MULTILINE)


def _output(program: str, *arguments: str) -> str:
    return subprocess.run([str(BINARIES / program), *arguments], check=True, capture_output=True, text=True).stdout


def in_a_process_of_its_own(names: list[str]) -> dict[str, list[Compiled]]:
    """The launches and layers of `tests.gpu_launches` by their names; raises CalledProcessError where one does not compile."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "tests.cross_compile", *names]
    found = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=environment, cwd=Path(__file__).parent.parent
    )
    return {name: [Compiled(**kernel) for kernel in kernels] for name, kernels in json.loads(found.stdout).items()}


def main(names: list[str]) -> None:
    from tests.gpu_launches import LAUNCHES, LAYERS

    launches = {name: launch.launch for name, launch in LAUNCHES.items()} | LAYERS
    compiled = {name: compiled_by(launches[name]) for name in names or LAUNCHES}
    print(json.dumps({name: [kernel._asdict() for kernel in kernels] for name, kernels in compiled.items()}, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
