"""Work that is launched once and replayed from then on, at the cost of one launch: CUDA graphs, or the same calls again where there are none."""

from collections.abc import Callable
from contextlib import suppress
from itertools import takewhile
from typing import Protocol

import torch

Run = Callable[[], None]
"""Launches over tensors that stay where they are, and nothing else: what it reads and writes by address is what a replay does."""

_SIZES = (1, 2, 4, *(size for power in range(3, 16) for size in (1 << power, 3 << (power - 1))))
"""1, 2, 4, 8, 12, 16, 24, 32, 48...: from 8 on at most a third of the rows is padding."""


class Capture(Protocol):
    """What makes replays."""

    def __call__(self, run: Run) -> Run:
        """What does the same as `run`, whenever it is called; `run` may be called meanwhile."""


def eagerly(run: Run) -> Run:
    """Instead of a graph: the calls themselves."""
    return run


class CUDAGraphs:
    """Graphs of one device that are replayed one after the other, on one stream: they share memory for what none of them leaves behind.

    Other threads may go on launching while one is captured. No GPU has run this yet.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Run) -> Run:
        """`run` is called twice: what libraries load for a shape they load at its first call, which a capture forbids."""
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            run()
            self._stream.synchronize()
            # Not torch.cuda.graph: it collects garbage and empties the allocator's cache each time, and steps served meanwhile would wait.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                run()
            except BaseException:
                with suppress(RuntimeError):  # what broke the capture is what is told
                    graph.capture_end()
                raise
            graph.capture_end()
        replay: Run = graph.replay
        return replay


def buckets(most: int) -> tuple[int, ...]:
    """The numbers of rows that graphs are made for, up to `most`, which is one of them.

    >>> buckets(20)
    (1, 2, 4, 8, 12, 16, 20)
    """
    return (*takewhile(lambda size: size < most, _SIZES), most)
