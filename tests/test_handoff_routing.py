"""Every row of every attention rank is returned exactly once by each instance."""

import itertools

import pytest

from afd_ray.handoff.routing import row_owners


@pytest.mark.parametrize(("attention", "tensor_parallel"), list(itertools.product(range(1, 7), repeat=2)))
def test_every_row_has_one_owner(attention: int, tensor_parallel: int) -> None:
    for a_rank, rows in itertools.product(range(attention), (0, 1, 2, 3, 5, 6, 7, 64)):
        ranges = row_owners(rows, a_rank, attention, tensor_parallel)
        assert [row for owned in ranges for row in range(owned.start, owned.stop)] == list(range(rows))
        assert all(owned.start < owned.stop and 0 <= owned.tp_rank < tensor_parallel for owned in ranges)
        assert len({owned.tp_rank for owned in ranges}) == len(ranges)


def test_enough_attention_ranks_are_rail_aligned() -> None:
    assert [row_owners(9, a_rank, 5, 2)[0].tp_rank for a_rank in range(5)] == [0, 1, 0, 1, 0]


def test_few_attention_ranks_are_split_in_balance() -> None:
    sizes = [owned.stop - owned.start for owned in row_owners(11, 0, 1, 4)]
    assert sizes == [3, 3, 3, 2]


def test_a_rank_out_of_range_is_named() -> None:
    with pytest.raises(ValueError, match="a_rank is 2, it must be from 0"):
        row_owners(1, 2, 2, 1)
