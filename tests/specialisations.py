"""Which compiled kernels launches would ask for on a GPU, recorded while Triton interprets them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

from triton._C.libtriton import native_specialize_impl
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.interpreter import InterpretedFunction


class Specialisation(NamedTuple):
    """What Triton looks a compiled kernel up by."""

    kernel: str
    arguments: tuple[Any, ...]
    """Of each its constant, or its type and what is known of its value."""
    options: tuple[tuple[str, Any], ...]


@contextmanager
def recorded() -> Iterator[set[Specialisation]]:
    """All that is launched meanwhile; does nothing where kernels are compiled."""
    found: set[Specialisation] = set()
    run = InterpretedFunction.run

    def noted(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        found.add(_specialisation(kernel, arguments, named))
        return run(kernel, *arguments, grid=grid, warmup=warmup, **named)

    with patch.object(InterpretedFunction, "run", noted):
        yield found


def _specialisation(kernel: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Specialisation:
    values = dict(zip(kernel.arg_names, arguments, strict=False))
    values |= {name: value for name, value in named.items() if name in kernel.arg_names}
    constants = {name for name, kind in kernel.fn.__annotations__.items() if "constexpr" in str(kind)}
    unspecialised, unaligned = (kernel.kwargs[key] or () for key in ("do_not_specialize", "do_not_specialize_on_alignment"))
    keys = tuple(
        ("constant", values[name])
        if name in constants
        else native_specialize_impl(CUDABackend, values[name], False, name not in unspecialised, name not in unaligned)
        for name in kernel.arg_names
    )
    options = tuple(sorted((name, value) for name, value in named.items() if name not in kernel.arg_names))
    return Specialisation(kernel.__name__, keys, options)
