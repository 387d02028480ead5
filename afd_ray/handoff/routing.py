"""Which way rows take: which copy of an expert serves them, which instances they go to, and which rank returns them."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from afd_ray.membership.experts import ExpertMap


class RowRange(NamedTuple):
    """Rows start..stop-1 of those an attention rank sent to an instance, reduced and returned by `tp_rank` of it."""

    tp_rank: int
    start: int
    stop: int


class Owned(NamedTuple):
    """Rows of one attention rank that one rank of an instance reduces and returns."""

    attention: int
    tp_rank: int
    first_row: int
    """Of those that the attention rank sent."""
    start: int
    stop: int
    """In the rows of all attention ranks, one after the other."""


@lru_cache(maxsize=4096)
def row_owners(rows: int, a_rank: int, attention: int, tensor_parallel: int) -> tuple[RowRange, ...]:
    """The ranges that the ranks of one FFN instance return to attention rank `a_rank`, in row order, none empty.

    With at least as many attention ranks as TP ranks the hand-off is rail-aligned: rank `a_rank % tensor_parallel`
    returns all rows. Otherwise the rows are split into balanced contiguous ranges, one a TP rank.

    >>> row_owners(5, a_rank=1, attention=2, tensor_parallel=2)
    (RowRange(tp_rank=1, start=0, stop=5),)
    >>> row_owners(5, a_rank=0, attention=1, tensor_parallel=2)
    (RowRange(tp_rank=0, start=0, stop=3), RowRange(tp_rank=1, start=3, stop=5))
    """
    _check(rows, a_rank, attention, tensor_parallel)
    if attention >= tensor_parallel:
        return (RowRange(a_rank % tensor_parallel, 0, rows),) if rows else ()
    base, extra = divmod(rows, tensor_parallel)
    ranges = []
    start = 0
    for tp_rank in range(min(rows, tensor_parallel)):
        stop = start + base + (tp_rank < extra)
        ranges.append(RowRange(tp_rank, start, stop))
        start = stop
    return tuple(ranges)


@lru_cache(maxsize=4096)
def ownership(rows: tuple[int, ...], tensor_parallel: int) -> tuple[Owned, ...]:
    """Who returns what of the rows that an instance got, `rows[a]` of them from attention rank a.

    >>> ownership((0, 2, 3), tensor_parallel=1)
    (Owned(attention=1, tp_rank=0, first_row=0, start=0, stop=2), Owned(attention=2, tp_rank=0, first_row=0, start=2, stop=5))
    """
    owned = []
    offset = 0
    for a_rank, count in enumerate(rows):
        for part in row_owners(count, a_rank, len(rows), tensor_parallel):
            owned.append(Owned(a_rank, part.tp_rank, part.start, offset + part.start, offset + part.stop))
        offset += count
    return tuple(owned)


class RowRouting:
    """The ways that the rows of an attention rank take in one epoch. Decides from ids alone: equal rows, equal ways."""

    def __init__(self, experts: ExpertMap, routed: bool, device: torch.device | None = None) -> None:
        """`routed`: rows go only to instances that hold one of their experts; else each instance gets them all.

        `device`: where ids are given; None: in host memory, where they must be for `routed`, whose ways the host has to know.
        """
        self._instances = len(experts)
        self._routed = routed
        flat = [expert for held in experts for expert in held]
        copies: dict[int, list[int]] = {expert: [] for expert in range(len(set(flat)))}
        for place, expert in enumerate(flat):
            copies[expert].append(place)
        most = max(map(len, copies.values()), default=0)
        self.renumbers = flat != list(range(len(flat)))
        """Whether ids on the wire are others than the model's."""
        # [E, C]: ids of each expert's copies, the first one again where there are fewer.
        self._copies = torch.tensor([places + places[:1] * (most - len(places)) for places in copies.values()], device=device)
        self._counts = torch.tensor([len(places) for places in copies.values()], device=device)
        self._instance_of = torch.tensor([i for i, held in enumerate(experts) for _ in held])
        self.ids = len(flat)

    def choose_copies(self, experts: Tensor) -> Tensor:
        """experts [N, K] as the model numbers them, to ids on the wire [N, K].

        Of several copies a routed row takes one in an instance that it goes to anyway, if there is one; else rows take them in turn.
        """
        if not self.renumbers:
            return experts
        turn = torch.arange(len(experts), device=experts.device)[:, None] % self._counts[experts]  # [N, K]
        if not self._routed:
            return self._copies[experts, turn]
        return self._near_copies(experts, turn)

    def _near_copies(self, experts: Tensor, turn: Tensor) -> Tensor:
        offered = self._copies[experts]  # [N, K, C]
        instances = self._instance_of[offered]
        settled = self._counts[experts] == 1
        visited = torch.zeros(len(experts), self._instances + 1, dtype=torch.bool)  # the last column: nowhere yet
        visited.scatter_(1, instances[:, :, 0].where(settled, self._instances), True)
        visited[:, -1] = False
        for column in range(experts.shape[1]):
            known = visited.gather(1, instances[:, column])  # [N, C]
            turn[:, column] = torch.where(known.any(1), known.int().argmax(1), turn[:, column])
            visited.scatter_(1, instances[:, column].gather(1, turn[:, column : column + 1]), True)
        return offered.gather(2, turn[:, :, None]).squeeze(2)

    def rows_by_instance(self, ids: Tensor | None, rows: int) -> "list[Tensor | None]":
        """For each instance the rows [n] that go to it, ascending; None: all of them.

        `ids` [N, K] as `choose_copies` gave them, or None in a dense layer, whose rows are dealt to the instances in turn.
        """
        if not self._routed:
            return [None] * self._instances
        if ids is None:
            return [torch.arange(rows)[instance :: self._instances] for instance in range(self._instances)]
        visited = torch.zeros(self._instances, rows, dtype=torch.bool).scatter_(0, self._instance_of[ids].t(), True)
        return [column.nonzero().squeeze(1) for column in visited.unbind(0)]


def _check(rows: int, a_rank: int, attention: int, tensor_parallel: int) -> None:
    if rows < 0:
        raise ValueError(f"rows is {rows}, it must be at least 0")
    if tensor_parallel < 1:
        raise ValueError(f"tensor_parallel is {tensor_parallel}, it must be at least 1")
    if not 0 <= a_rank < attention:
        raise ValueError(f"a_rank is {a_rank}, it must be from 0 to attention - 1 = {attention - 1}")
