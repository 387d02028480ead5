"""Where Triton kernels run in tests: interpreted on the CPU, or compiled on a GPU with TRITON_INTERPRET=0.

Triton's interpreter (3.6 and 3.7) rounds to bfloat16 by cutting off, makes some numbers half as large as it rounds them to e4m3, and
multiplies the bits of bfloat16 matrices as integers. Here it converts as torch does, to nearest and ties to even, which is what a GPU does.
It keeps the program that it is at in one place for all threads: here one launch waits for the other.
"""

import threading
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

COMPILED = not triton.knobs.runtime.interpret
DEVICE = "cuda" if COMPILED else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CLOSE = {torch.float32: 1e-3, torch.float16: 1e-3, torch.bfloat16: 1e-2, torch.float8_e4m3fn: 1e-2}
"""Largest relative error against the same arithmetic in float32, by what is read."""

_FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8e4nv": torch.float8_e4m3fn}
_BITS = {1: (np.uint8, torch.uint8), 2: (np.int16, torch.int16), 4: (np.int32, torch.int32)}
_convert, _dot, _launch = interpreter._convert_float, InterpreterBuilder.create_dot, GridExecutor.__call__
_one_launch = threading.RLock()


def _convert_as_torch(numbers: Any, source: Any, target: Any, rounding: Any) -> Any:
    if source.name not in _FLOATS or target.name not in _FLOATS:
        return _convert(numbers, source, target, rounding)
    bits = torch.from_numpy(np.frombuffer(numbers.tobytes(), dtype=_BITS[numbers.itemsize][0]).copy())
    converted = bits.view(_FLOATS[source.name]).to(_FLOATS[target.name])
    return converted.view(_BITS[converted.itemsize][1]).numpy().reshape(numbers.shape)


def _dot_of_numbers(builder: Any, a: Any, b: Any, *others: Any) -> Any:
    return _dot(builder, _widened(a), _widened(b), *others)


def _widened(matrix: Any) -> Any:
    if matrix.dtype.scalar != tl.bfloat16:
        return matrix
    return TensorHandle(_convert_as_torch(matrix.data, tl.bfloat16, tl.float32, None).view(np.float32), tl.float32)


def _launch_alone(grid: GridExecutor, *arguments: Any, **named: Any) -> Any:
    with _one_launch:
        return _launch(grid, *arguments, **named)


interpreter._convert_float, InterpreterBuilder.create_dot = _convert_as_torch, _dot_of_numbers
GridExecutor.__call__ = _launch_alone


def noise(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected; nan where anything found is not finite."""
    difference = (found.cpu().double() - expected.cpu().double()).norm().item()
    return difference / max(expected.double().norm().item(), 1e-30) if found.isfinite().all() else float("nan")
