"""Meshes without a peer: what is sent is answered at once by what a peer would send some time later."""

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from afd_ray.handoff.message import Header, Kind, LinkError, Message

ATTENTION, FFN = 0, 1
"""Ranks of a pair."""


class Answering:
    """A mesh without a peer: what is sent is answered at once by what a peer would send some time later."""

    rank = world_size = epoch = 1
    device = None

    def __init__(self) -> None:
        self.due: deque[Message] = deque()

    def receive(self) -> Message | None:
        return self.due.popleft() if self.due else None

    def wait(self, timeout_s: float | None, busy: bool = False) -> None:
        raise LinkError(self.rank, "nothing will come")

    def wake(self) -> None:
        pass

    def settle(self) -> None:
        pass

    def close(self) -> None:
        pass

    def answer(self, header: Header, tensors: tuple[Tensor, ...] = ()) -> None:
        self.due.append(Message(header, tensors, _nothing))


class AnsweringFFN(Answering):
    """Returns zeros for every dispatch; knows what was sent in the first steps."""

    def __init__(self, hidden: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.sent: list[tuple[Header, tuple[Tensor, ...]]] = []
        self.on_layer: Any = None
        self._zeros = torch.zeros(1 << 12, hidden, dtype=dtype)

    def send(self, peer: int, header: Header, tensors: Sequence[Tensor] = ()) -> None:
        if header.kind is not Kind.DISPATCH:
            return
        if self.on_layer is not None:
            self.sent.append((header, tuple(tensor.clone() for tensor in tensors)))
            self.on_layer(header.layer)
        self.answer(header._replace(kind=Kind.PARTIAL, source=FFN), (self._zeros[: header.rows],))


class AnsweringAttention(Answering):
    """Sends the recorded rows of the next layer for every partial result."""

    def __init__(self, slots: int, recorded: list[tuple[Header, tuple[Tensor, ...]]]) -> None:
        super().__init__()
        self._recorded = recorded
        for slot in range(slots):
            self._dispatch(slot, 0)

    def send(self, peer: int, header: Header, tensors: Sequence[Tensor] = ()) -> None:
        if header.kind is Kind.PARTIAL:
            self._dispatch(header.slot, (header.layer + 1) % len(self._recorded))

    def _dispatch(self, slot: int, layer: int) -> None:
        header, tensors = self._recorded[layer]
        if layer == 0:
            self.answer(Header(Kind.STEP, 1, ATTENTION, slot=slot, rows=header.rows))
        self.answer(header._replace(slot=slot), tensors)


def _nothing() -> None:
    pass
