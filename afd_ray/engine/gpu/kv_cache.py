"""Keys and values in a GPU's memory, and their way to another rank and from there: through host memory, a layer at a time."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from afd_ray.engine.kv_cache import PagedCache, slot_indices
from afd_ray.kernels.gpu.transfers import download, upload


class GPUPagedCache(PagedCache):
    """Any thread may have keys and values brought or fetched: a stream aside does it, behind what steps have launched by then."""

    def __init__(self, *, device: torch.device, **sizes: Any) -> None:
        """As `PagedCache`. Of the streams that torch gives out in turn, those of this priority capture no graph."""
        super().__init__(device=device, **sizes)
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def outgoing(self, block_table: list[int], tokens: int) -> Iterator[list[memoryview]]:
        slots = self._slots(block_table, tokens)
        for layer in self._bytes():
            yield [_flat(self._fetched(layer, slots))]

    def incoming(self, block_table: list[int], tokens: int) -> Iterator[list[memoryview]]:
        slots, layers = self._slots(block_table, tokens), self._bytes()
        rows = torch.empty(tokens, layers.shape[2], dtype=torch.uint8)
        for layer in layers:
            yield [_flat(rows)]
            self._brought(layer, slots, rows)

    def _bytes(self) -> Tensor:
        """[layers, slots, bytes of a token] uint8: not every operation knows e4m3."""
        return self.blocks.view(torch.uint8).flatten(1, 2)

    def _slots(self, block_table: list[int], tokens: int) -> Tensor:
        return torch.tensor(slot_indices(block_table, 0, tokens, self.block_size))

    def _fetched(self, layer: Tensor, slots: Tensor) -> Tensor:
        """In host memory."""
        with self._aside():
            return download([layer.index_select(0, upload([slots], layer.device)[0])])[0]

    def _brought(self, layer: Tensor, slots: Tensor, rows: Tensor) -> None:
        with self._aside():
            layer.index_copy_(0, *upload([slots, rows], layer.device))

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """What this thread orders meanwhile goes to a stream of the cache's, and is done at the end."""
        if self._stream is None:
            with torch.inference_mode():
                yield
            return
        self._stream.wait_stream(torch.cuda.default_stream(self.blocks.device))  # the step loop's
        aside: AbstractContextManager[None] = torch.cuda.stream(self._stream)
        with aside, torch.inference_mode():
            yield
            self._stream.synchronize()


def _flat(rows: Tensor) -> memoryview:
    flat: memoryview = rows.view(-1).numpy().data
    return flat
