"""What the kernels compile to for sm_90, without a GPU: tensor cores used, nothing spilled, everything fits."""

from functools import cache

import pytest

from tests.cross_compile import BINARIES, Compiled, in_a_process_of_its_own
from tests.gpu_launches import LAUNCHES, LAYERS

SHARED_BYTES = 227 * 1024
"""That one program may have on sm_90."""
THREADS_REGISTERS = 64 * 1024
"""Of one multiprocessor."""

LAYER_KERNELS = {
    "add_norm_quantise_kernel",
    "rotate_and_write_kernel",
    "attend_kernel",
    "prefill_kernel",
    "route_kernel",
    "order_kernel",
    "gate_up_kernel",
    "down_kernel",
}

pytestmark = pytest.mark.skipif(
    not (BINARIES / "ptxas").exists(), reason="this Triton comes without ptxas: nothing can be compiled for a GPU"
)


@cache
def compiled(full: bool) -> dict[str, list[Compiled]]:
    return in_a_process_of_its_own([name for name, launch in LAUNCHES.items() if launch.full is full])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.full] * launch.full) for name, launch in LAUNCHES.items()]
)
def test_a_launch_keeps_its_bounds(name: str) -> None:
    launch = LAUNCHES[name]
    kernels = compiled(launch.full)[name]
    assert [kernel.kernel for kernel in kernels] == list(launch.bounds)
    for kernel, bounds in zip(kernels, launch.bounds.values(), strict=True):
        assert kernel.spills <= bounds.spills
        assert kernel.registers <= bounds.registers
        assert kernel.shared_bytes <= bounds.shared_bytes <= SHARED_BYTES
        assert (kernel.wgmma > 0) == bounds.wgmma
        assert kernel.mma == 0
        assert not bounds.asynchronous_copies or kernel.asynchronous_copies > 0
        assert kernel.registers * kernel.warps * 32 <= THREADS_REGISTERS


@pytest.mark.full
@pytest.mark.parametrize("model", LAYERS)
def test_all_that_a_layer_of_either_half_launches_compiles(model: str) -> None:
    (kernels,) = in_a_process_of_its_own([model]).values()
    in_e4m3 = {"linear_kernel", "quantise_rows_kernel"} if "fp8" in model else set()
    assert {kernel.kernel for kernel in kernels} == LAYER_KERNELS | in_e4m3
    assert all(kernel.spills == 0 and kernel.shared_bytes <= SHARED_BYTES for kernel in kernels)
    assert all(kernel.registers * kernel.warps * 32 <= THREADS_REGISTERS for kernel in kernels)
