"""Who returns which rows: the ranks of an FFN instance that reduce for one attention rank."""

from typing import NamedTuple


class RowRange(NamedTuple):
    """Rows start..stop-1 of an attention rank's micro-batch, reduced and returned by `tp_rank` of the instance."""

    tp_rank: int
    start: int
    stop: int


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


def _check(rows: int, a_rank: int, attention: int, tensor_parallel: int) -> None:
    if rows < 0:
        raise ValueError(f"rows is {rows}, it must be at least 0")
    if tensor_parallel < 1:
        raise ValueError(f"tensor_parallel is {tensor_parallel}, it must be at least 1")
    if not 0 <= a_rank < attention:
        raise ValueError(f"a_rank is {a_rank}, it must be from 0 to attention - 1 = {attention - 1}")
