"""An FFN half's layers as replays over static tensors: one set of tensors, for the half keeps nothing, and a graph for each layer and bucket of rows.

Rows that pad a bucket chose nobody, and what they give is not looked at.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from afd_ray.handoff.quantise import blocks_of
from afd_ray.kernels.gpu.capture import Capture, Run, buckets
from afd_ray.kernels.gpu.halves import FedFFN, GPUFFNLayer
from afd_ray.kernels.gpu.transfers import Spec, Staging, nbytes_of, views
from afd_ray.models.step3 import Narrow, Routed

MOST_ROWS = 4096
"""Of a graph; rows beyond that take so long that launching does not count."""


class FFNGraphs:
    """Of one half."""

    def __init__(self, half: FedFFN, rows: int, narrow: bool, capture: Capture) -> None:
        """Captures them all, for up to so many rows, which come in 8 bits or wide; `half` is warmed up."""
        self._config, self._device, self._narrow, self._stays = half.config, half.device, narrow, half.stays
        self._sizes = buckets(min(rows, MOST_ROWS))
        most = self._sizes[-1]
        out = (half.config.dtype, (most, half.config.hidden_size))
        self._memory = torch.zeros(nbytes_of(self._given(most)), dtype=torch.uint8, device=half.device)
        self._out = torch.zeros(nbytes_of([out]), dtype=torch.uint8, device=half.device)
        self._graphs = [{size: capture(self._run(layer, size)) for size in self._sizes} for layer in half.layers]

    def __call__(self, layer: int, routed: Routed) -> Tensor | None:
        """As `FFNHalf.forward`; None where there is no graph for these rows."""
        count = len(routed.hidden)
        if count > self._sizes[-1] or (routed.narrow is not None) != self._narrow:
            return None
        size = next(size for size in self._sizes if size >= count)
        self._put(routed, size)
        self._graphs[layer][size]()
        of_out = (self._config.dtype, (count, self._config.hidden_size))
        return views(self._out, [of_out])[0].clone() if self._stays else Staging(self._device, of_out).receive(self._out)[0]

    def _given(self, rows: int) -> list[Spec]:
        """Ids and weights, then hidden rows, or their values and exponents."""
        width, choice = self._config.hidden_size, (rows, self._config.moe_top_k)
        narrow = [(torch.float8_e4m3fn, (rows, width)), (torch.uint8, (rows, blocks_of(width)))]
        return [
            (torch.int32, choice),
            (self._config.dtype, choice),
            *(narrow if self._narrow else [(self._config.dtype, (rows, width))]),
        ]

    def _put(self, routed: Routed, size: int) -> None:
        """Into the graphs' memory; from host memory one copy that the host does not wait for."""
        staging = None if self._stays else Staging(self._device, *self._given(size))
        self._write(routed, views(self._memory, self._given(size)) if staging is None else staging.tensors)
        if staging is not None:
            staging.send_into(self._memory)

    def _write(self, routed: Routed, places: Sequence[Tensor]) -> None:
        """Padded."""
        count = len(routed.hidden)
        ids, weights, *leaves = places
        if routed.experts is not None and routed.weights is not None:
            ids[:count], weights[:count] = routed.experts, routed.weights
        ids[count:] = -1
        for place, tensor in zip(leaves, routed.narrow or (routed.hidden,), strict=True):
            place[:count] = tensor
            place[count:].zero_()

    def _run(self, layer: nn.Module, rows: int) -> Run:
        assert isinstance(layer, GPUFFNLayer)
        ids, weights, *leaves = views(self._memory, self._given(rows))
        (out,) = views(self._out, [(self._config.dtype, (rows, self._config.hidden_size))])
        narrow = Narrow(*leaves) if self._narrow else None
        choice = (None, None) if layer.moe is None else (ids, weights)

        def run() -> None:
            out.copy_(layer(leaves[0], *choice, narrow))

        return run
