"""What members are told of an epoch, and who keeps which experts in a recovery."""

import pytest

from afd_ray.config import parse_config
from afd_ray.membership.epochs import Epochs
from afd_ray.membership.events import Roster
from afd_ray.membership.shape import Shape
from afd_ray.models.presets import PRESETS

MODEL = PRESETS["step3-tiny"]  # 8 experts


def roster(number: int, tensor_parallel: int, *ffn: str) -> Roster:
    return Roster(number, Shape(1, tensor_parallel, len(ffn) // tensor_parallel, None), ("attention-0",), ffn)


def epochs(redundant: int = 0) -> Epochs:
    return Epochs(parse_config({"ffn": {"redundant_experts": redundant, "expert_parallel": 2}}), MODEL)


@pytest.mark.parametrize(
    ("before", "after", "experts"),
    [
        (roster(1, 1, "f", "g"), roster(2, 1, "g"), [(0, 1, 2, 3, 4, 5, 6, 7)]),
        (roster(1, 1, "f", "g", "h"), roster(2, 1, "f", "h"), [(0, 1, 2, 3), (4, 5, 6, 7)]),
        (roster(1, 2, "f", "g", "h", "i"), roster(2, 2, "h", "i"), [(0, 1, 2, 3, 4, 5, 6, 7)]),
        (roster(1, 2, "f", "g", "h", "i", "j", "k"), roster(2, 2, "j", "k", "f", "h"), [(3, 5, 6, 7), (0, 1, 2, 4)]),
        (roster(1, 4, "f", "g", "h", "i"), roster(2, 3, "f", "h", "i"), [(0, 1, 2, 3, 4, 5, 6, 7)]),
    ],
)
def test_who_is_left_keeps_what_it_holds(before: Roster, after: Roster, experts: list[tuple[int, ...]]) -> None:
    assert list(epochs().of(after, lost=before).experts) == experts


def test_with_copies_of_all_that_was_lost_nothing_moves() -> None:
    made = epochs(redundant=4)
    before, after = roster(1, 1, "f", "g", "h"), roster(2, 1, "f", "h")
    first, _, last = made.of(before).experts
    kept = made.of(after, lost=before).experts
    assert [set(first) - set(kept[0]), set(last) - set(kept[1])] == [set(), set()]
    lost_for_good = set(range(8)) - set(first) - set(last)
    assert sum(map(len, kept)) == len(first) + len(last) + len(lost_for_good)
    everywhere = epochs(redundant=8)
    pair, one = roster(1, 1, "f", "g"), roster(2, 1, "f")
    assert everywhere.of(one, lost=pair).experts == (everywhere.of(pair).experts[0],)


def test_a_second_loss_is_recovered_from_what_the_first_recovery_left() -> None:
    made = epochs()
    first, second = roster(1, 1, "f", "g", "h"), roster(2, 1, "f", "h")
    (kept, _) = made.of(second, lost=first).experts
    third = made.of(roster(3, 1, "f"), lost=second).experts
    assert kept == (0, 1, 2, 3)
    assert third == (tuple(range(8)),)


def test_an_epoch_stays_what_it_was_decided_to_be_until_it_is_over() -> None:
    made = epochs(redundant=2)
    pair = roster(1, 1, "f", "g")
    before = made.of(pair)
    made.loads = [1, 1, 1, 1, 1, 1, 1, 100]
    assert made.of(pair) is before
    made.forget(but=())
    assert made.decided == {}
    assert made.of(pair) != before


def test_a_colocated_cluster_has_no_experts_to_keep() -> None:
    made = Epochs(parse_config({"ffn": {"colocated": True}}), MODEL)
    shape = Shape(2, 1, 0, None)
    before = Roster(1, shape, ("a", "b"), ())
    assert made.of(Roster(2, Shape(1, 1, 0, None), ("b",), ()), lost=before).experts == ()
