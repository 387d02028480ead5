"""Which attention ranks' rows make up the next wave of each micro-batch slot: decided once, by the conductor, for every FFN rank."""

from dataclasses import dataclass, field
from typing import NamedTuple


class Wave(NamedTuple):
    """One pass of one slot through all layers: the step descriptor that every FFN rank follows."""

    slot: int
    number: int
    rows: tuple[int, ...]
    """Rows of each attention rank, in rank order; 0: not in this wave."""

    @property
    def members(self) -> tuple[int, ...]:
        return tuple(rank for rank, rows in enumerate(self.rows) if rows)

    @property
    def total_rows(self) -> int:
        return sum(self.rows)


@dataclass(slots=True)
class _Slot:
    announced: dict[int, int] = field(default_factory=dict)
    expected: set[int] = field(default_factory=set)
    running: bool = False
    number: int = 0


class Conductor:
    """Gathers the attention ranks' announcements into waves.

    A rank that was in a slot's last wave is waited for until it announces its next rows or parks the slot, so that
    rows of all ranks share each pass over the expert weights; a parked rank is never waited for.
    """

    def __init__(self, attention: int, slots: int) -> None:
        self._attention = attention
        self._slots = [_Slot() for _ in range(slots)]

    def announce(self, rank: int, slot: int, rows: int) -> Wave | None:
        """`rank` has `rows` for `slot`; gives the wave that can now start, if any. Raises ValueError on a second announcement."""
        state = self._slots[slot]
        if rank in state.announced:
            raise ValueError(f"attention rank {rank} announced slot {slot} twice")
        state.announced[rank] = rows
        return self._start(slot)

    def park(self, rank: int, slot: int) -> Wave | None:
        """`rank` has nothing for `slot` until it announces again; gives the wave that was waiting for it, if any."""
        self._slots[slot].expected.discard(rank)
        return self._start(slot)

    def finish(self, slot: int) -> Wave | None:
        """The slot's wave has passed its last layer; gives the next one if it can start."""
        self._slots[slot].running = False
        return self._start(slot)

    def _start(self, slot: int) -> Wave | None:
        state = self._slots[slot]
        if state.running or not state.announced or not state.expected <= state.announced.keys():
            return None
        rows = tuple(state.announced.get(rank, 0) for rank in range(self._attention))
        state.expected = set(state.announced)
        state.announced = {}
        state.running = True
        state.number += 1
        return Wave(slot, state.number, rows)
