"""The kernels of `bf16.c` over tensors: compiled by the machine's C compiler when first asked for, then kept in the user's cache.

Legend of shapes: N rows, I input and O output features, H hidden, M intermediate, K top-k, A heads, D head_dim.
A packed matrix is [panels, depth / 2, WIDTH, 2]: WIDTH output features a panel, pairs of inputs side by side.
"""

import ctypes
import functools
import hashlib
import logging
import os
import subprocess
import tempfile
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

WIDTH = 32
GATED_WIDTH = WIDTH // 2
"""Gate features of a panel, beside as many of up."""

_FEATURES = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512bf16", "fma")
_COMPILE = ("-O3", "-std=gnu11", "-fPIC", "-fopenmp", *(f"-m{feature}" for feature in _FEATURES))
_COMPILE_TIMEOUT_S = 120.0
_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float


class AttentionLayer(ctypes.Structure):
    """The C struct of that name: the addresses of a layer's packed matrices and norms, which must outlive it, and its shape."""

    _fields_ = (
        ("input_norm", _POINTER),
        ("qkv", _POINTER),
        ("latent_norm", _POINTER),
        ("wq", _POINTER),
        ("o_proj", _POINTER),
        ("output_norm", _POINTER),
        ("gate", _POINTER),  # None in a dense layer
        ("hidden", _LONG),
        ("latent", _LONG),
        ("heads", _LONG),
        ("dim", _LONG),
        ("experts", _LONG),
        ("top_k", _LONG),
        ("eps", _FLOAT),
        ("normalise", _INT),
    )


class FFNLayer(ctypes.Structure):
    """The C struct of that name: the addresses of a layer's packed matrices, which must outlive it, and its shape."""

    _fields_ = (
        ("shared_gate_up", _POINTER),  # of a dense layer: all there is; None where attention ranks compute it
        ("shared_down", _POINTER),
        ("gate_up", _POINTER),
        ("down", _POINTER),
        ("hidden", _LONG),
        ("shared_inner", _LONG),
        ("inner", _LONG),
        ("count", _LONG),
        ("first_id", _LONG),
        ("at_home", _INT),
    )


_SIGNATURES = {
    "linear": [_POINTER] * 3 + [_LONG] * 3 + [_INT],
    "feed_forward": [ctypes.POINTER(FFNLayer), _POINTER, _POINTER, _INT, _POINTER, _POINTER] + [_LONG] * 2 + [_INT],
    "attend": [_POINTER] * 6 + [_LONG] * 5 + [_FLOAT, _INT],
    "store": [_POINTER, _LONG, _POINTER, _LONG, _POINTER, _POINTER, _LONG, _LONG],
    "rms_norm": [_POINTER] * 3 + [_LONG] * 2 + [_FLOAT],
    "before": [ctypes.POINTER(AttentionLayer)] + [_POINTER] * 5 + [_LONG, _INT],
    "after": [ctypes.POINTER(AttentionLayer)] + [_POINTER] * 6 + [_LONG, _INT],
}


@functools.cache
def available() -> bool:
    """Whether this machine can run the kernels: AVX512-BF16 and a C compiler; says once why not."""
    if not torch.cpu._is_avx512_bf16_supported():
        logger.info("no bfloat16 kernels: this CPU has no AVX512-BF16; plain torch computes")
        return False
    try:
        _library()
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        logger.warning("no bfloat16 kernels: they cannot be compiled (%s); plain torch computes, more slowly", error)
        return False
    return True


def pack(weight: Tensor) -> Tensor:
    """[..., O, I] to packed [..., ceil(O / WIDTH), I / 2, WIDTH, 2]; missing output features are zeros."""
    *batch, outputs, inputs = weight.shape
    panels = -(-outputs // WIDTH)
    padded = weight.new_zeros(*batch, panels * WIDTH, inputs)
    padded[..., :outputs, :] = weight
    return padded.view(*batch, panels, WIDTH, inputs // 2, 2).transpose(-3, -2).contiguous()


def pack_gated(gate: Tensor, up: Tensor) -> Tensor:
    """Gate and up [..., M, H] to packed panels of GATED_WIDTH features of each; M is padded to a multiple of it."""
    *batch, inner, hidden = gate.shape
    panels = -(-inner // GATED_WIDTH)
    both = gate.new_zeros(*batch, 2, panels * GATED_WIDTH, hidden)
    both[..., 0, :inner, :], both[..., 1, :inner, :] = gate, up
    sides = both.view(*batch, 2, panels, GATED_WIDTH, hidden).transpose(-4, -3)  # [..., panels, 2, GATED_WIDTH, H]
    return pack(sides.reshape(*batch, panels * WIDTH, hidden))


def pack_down(down: Tensor) -> Tensor:
    """Down [..., H, M], M padded as `pack_gated` pads it."""
    *batch, hidden, inner = down.shape
    padded = down.new_zeros(*batch, hidden, -(-inner // GATED_WIDTH) * GATED_WIDTH)
    padded[..., :inner] = down
    return pack(padded)


def linear(x: Tensor, packed: Tensor) -> Tensor:
    """x [N, I] times a packed matrix: [N, panels * WIDTH]."""
    x = x.contiguous()
    rows, panels = len(x), len(packed)
    out = x.new_empty(rows, panels * WIDTH)
    _library().linear(x.data_ptr(), packed.data_ptr(), out.data_ptr(), rows, x.shape[1], panels, torch.get_num_threads())
    return out


def feed_forward(layer: FFNLayer, x: Tensor, ids: Tensor | None, weights: Tensor | None) -> Tensor:
    """x [N, H] through the layer's shared expert and those that it chose: [N, H].

    ids [N, K] of any integer dtype and weights [N, K]; None in a dense layer, or for a shared expert alone.
    """
    x = x.contiguous()
    out = torch.empty_like(x)
    if ids is None or weights is None:
        chosen, id_bytes, by, top_k = None, 0, None, 0
    else:
        ids, weights = ids.contiguous(), weights.contiguous()
        chosen, id_bytes, by, top_k = ids.data_ptr(), ids.itemsize, weights.data_ptr(), ids.shape[1]
    threads = torch.get_num_threads()
    _library().feed_forward(layer, x.data_ptr(), chosen, id_bytes, by, out.data_ptr(), len(x), top_k, threads)
    return out


def attend(q: Tensor, blocks: Tensor, tables: Tensor, starts: Tensor, contexts: Tensor, longest: int) -> Tensor:
    """q [N, A, D] over the first contexts[row] tokens of the blocks tables[starts[row]:]: [N, A, D].

    blocks [.., block_size, 2 * D] contiguous; tables, starts [N] and contexts [N] int32; `longest` is the largest context.
    """
    q = q.contiguous()
    rows, heads, dim = q.shape
    out = torch.empty_like(q)
    _library().attend(
        q.data_ptr(),
        blocks.data_ptr(),
        tables.data_ptr(),
        starts.data_ptr(),
        contexts.data_ptr(),
        out.data_ptr(),
        rows,
        heads,
        dim,
        blocks.shape[1],
        longest,
        dim**-0.5,
        torch.get_num_threads(),
    )
    return out


def store(k: Tensor, v: Tensor, slots: Tensor, tokens: Tensor) -> None:
    """k and v [N, D] into the slots [N] int64 of tokens [.., 2 * D] contiguous."""
    rows, dim = k.shape
    if k.stride(1) != 1 or v.stride(1) != 1:
        k, v = k.contiguous(), v.contiguous()
    _library().store(k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0), slots.data_ptr(), tokens.data_ptr(), rows, dim)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [N, H] to x / rms(x) * weight [N, H]."""
    x = x.contiguous()
    out = torch.empty_like(x)
    _library().rms_norm(x.data_ptr(), weight.data_ptr(), out.data_ptr(), *x.shape, eps)
    return out


def before(layer: AttentionLayer, residual: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """residual [N, H] to rotated q [N, A, D] and, side by side, rotated k and v [N, 2 * D]; cos and sin [N, D / 2] float32."""
    residual, cos, sin = residual.contiguous(), cos.contiguous(), sin.contiguous()
    rows = len(residual)
    q, kv = residual.new_empty(rows, layer.heads, layer.dim), residual.new_empty(rows, 2 * layer.dim)
    pointers = (tensor.data_ptr() for tensor in (residual, cos, sin, q, kv))
    _library().before(layer, *pointers, rows, torch.get_num_threads())
    return q, kv


def after(layer: AttentionLayer, residual: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention output [N, A, D] into the residual [N, H]; that, what goes to the FFN [N, H], expert ids [N, K] int64 and weights [N, K].

    Ids and weights mean nothing in a dense layer.
    """
    residual, context = residual.contiguous(), context.contiguous()
    rows = len(residual)
    out, hidden = torch.empty_like(residual), torch.empty_like(residual)
    weights = residual.new_empty(rows, layer.top_k)
    ids = residual.new_empty(rows, layer.top_k, dtype=torch.int64)
    pointers = (tensor.data_ptr() for tensor in (residual, context, out, hidden, ids, weights))
    _library().after(layer, *pointers, rows, torch.get_num_threads())
    return out, hidden, ids, weights


@functools.cache
def _library() -> ctypes.CDLL:
    """The compiled kernels; raises OSError, SubprocessError, or RuntimeError (no home directory) where they cannot be had."""
    source = (resources.files("afd_ray.kernels") / "bf16.c").read_bytes()
    digest = hashlib.sha256(source + " ".join(_COMPILE).encode()).hexdigest()[:16]
    directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "afd-ray"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = directory / f"bf16-{digest}.so"
    if not file.exists():
        _compile(source, file)
    library = ctypes.CDLL(str(file))
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    return library


def _compile(source: bytes, file: Path) -> None:
    """Into place at once, for several actors may do it at the same time."""
    with tempfile.TemporaryDirectory(dir=file.parent) as workplace:
        written, compiled, linked = (Path(workplace) / name for name in ("bf16.c", "bf16.o", "bf16.so"))
        written.write_bytes(source)
        _run([os.environ.get("CC", "cc"), *_COMPILE, "-c", str(written), "-o", str(compiled)])
        # Linked without OpenMP's library: torch's, which is loaded already, serves both, so that they share one pool of threads.
        _run([os.environ.get("CC", "cc"), "-shared", str(compiled), "-o", str(linked)])
        linked.replace(file)


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=_COMPILE_TIMEOUT_S)
