"""What the tests rely on of Triton's interpreter."""

import pytest
import torch
import triton
import triton.language as tl

from tests.triton_device import DEVICE, error, noise


@triton.jit
def convert_kernel(x, y, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    tl.store(y + place, tl.load(x + place).to(y.dtype.element_ty))


@triton.jit
def product_kernel(x, y, out, SIZE: tl.constexpr):
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    place = row * SIZE + column
    tl.store(out + place, tl.dot(tl.load(x + place), tl.load(y + place)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float16], ids=str)
def test_rounds_to_nearest(dtype: torch.dtype) -> None:
    x = torch.randn(1024, generator=noise(0)) * 50
    y = torch.zeros(1024, dtype=dtype, device=DEVICE)
    convert_kernel[(1,)](x.to(DEVICE), y, SIZE=1024)
    assert torch.equal(y.cpu().float(), x.to(dtype).float())


def test_multiplies_bfloat16_matrices() -> None:
    x, y = torch.randn(2, 32, 32, generator=noise(0)).bfloat16().to(DEVICE).unbind(0)
    out = torch.zeros(32, 32, device=DEVICE)
    product_kernel[(1,)](x, y, out, SIZE=32)
    assert error(out, x.float() @ y.float()) < 1e-6
