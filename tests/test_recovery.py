"""The coordinator, driven by hand: losses, and what is made of those who live."""

import pytest

from afd_ray.membership.events import (
    Answered,
    Asked,
    Done,
    Gone,
    Lost,
    Provided,
    Unlinked,
)
from afd_ray.membership.protocol import INSTEAD
from afd_ray.membership.shape import Shape
from tests.protocol_world import cluster, shape


def test_a_lost_attention_member_is_done_without_at_once_and_replaced_behind() -> None:
    world = cluster(2, 1, 1)
    world.held = {("provide", "*")}
    world.tell(Lost("attention-0", "killed"))
    assert world.log == [
        "release attention-0",
        "load 2: attention-1 ffn-2",
        "prepare 2: attention-1 ffn-2",
        "connect 2: attention-1 ffn-2",
        "switch 2: attention-1 ffn-2",
        "retire 2: attention-1 ffn-2",
        "provide 3: attention-3 | ",
    ]
    assert world.coordinator.state == "recovering"
    assert world.coordinator.takers == ("attention-1",)
    world.tell(Provided(3, ("attention-3",)))
    assert world.coordinator.state == "ready"
    world.serves("attention-1", "attention-3", "ffn-2")


@pytest.mark.parametrize(
    ("before", "lost", "survivors", "serving"),
    [
        (shape(1, 1, 3), ["ffn-2"], shape(1, 1, 2), "attention-0 ffn-1 ffn-3"),
        (shape(1, 2, 2), ["ffn-1"], shape(1, 2, 1), "attention-0 ffn-3 ffn-4"),
        (shape(1, 2, 2), ["ffn-1", "ffn-4"], shape(1, 2, 1), "attention-0 ffn-2 ffn-3"),
        (shape(1, 4, 1), ["ffn-2"], shape(1, 3, 1), "attention-0 ffn-1 ffn-3 ffn-4"),
        (shape(3, 1, 1), ["attention-0", "attention-2"], shape(1, 1, 1), "attention-1 ffn-3"),
    ],
)
def test_what_lives_serves_first(before: Shape, lost: list[str], survivors: Shape, serving: str) -> None:
    world = cluster(before.attention, before.tensor_parallel, before.expert_parallel)
    world.held = {("provide", "*")}
    world.tell(*(Lost(member, "killed") for member in lost))
    roster, change = world.coordinator.roster, world.coordinator.change
    assert roster is not None
    assert change is not None
    assert (roster.shape, " ".join(roster.members)) == (survivors, serving)
    assert (change.kind, change.roster.shape, change.phase) == ("resize", before, "provide")
    assert len(change.fresh) == len(lost), "living ranks without a place are used for the rest"
    world.tell(Provided(change.number, change.fresh))
    assert world.coordinator.state == "ready"
    assert set(world.coordinator.record.members) == set(world.members)


def test_without_any_ffn_member_new_ones_are_provided_first() -> None:
    world = cluster(2, 1, 1)
    world.tell(Lost("ffn-2", "killed"))
    assert world.log[1] == "provide 2:  | ffn-3"
    world.serves("attention-0", "attention-1", "ffn-3")


def test_where_nothing_can_serve_it_tries_again_and_again_for_less_in_between() -> None:
    world = cluster(2, 1, 1)
    world.room = False
    world.tell(Lost("attention-0", "killed"), Lost("attention-1", "killed"))
    assert world.coordinator.state == "degraded"
    assert world.coordinator.takers == ()
    for _ in range(6):
        world.late("backoff")
    assert world.backoffs == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    provided = [line.partition(": ")[2] for line in world.log if line.startswith("provide")][-2:]
    assert sorted(len(line.split(" | ")[0].split()) for line in provided) == [1, 2]
    world.room = True
    world.late("backoff")
    assert world.coordinator.state == "ready"
    assert len(world.members) == 3


def test_where_the_replacement_cannot_be_had_it_serves_degraded_and_takes_a_smaller_wish() -> None:
    world = cluster(2, 1, 1)
    world.room = False
    world.tell(Lost("attention-0", "killed"))
    assert world.coordinator.state == "degraded"
    assert world.coordinator.takers == ("attention-1",)
    world.tell(Asked("less", shape(1, 1, 1)))
    assert world.coordinator.state == "ready"
    assert world.done == [Done("less", "committed", "it has this shape already")]


def test_another_loss_in_a_recovery_starts_it_over() -> None:
    world = cluster(3, 1, 2)
    world.held = {("connect", "*")}
    world.tell(Lost("attention-0", "killed"))
    world.held = {("provide", "*")}
    world.tell(Lost("ffn-3", "killed"))
    assert "prepare 3: attention-1 attention-2 ffn-4" in world.log
    assert world.members == ("attention-1", "attention-2", "ffn-4")


@pytest.mark.parametrize("lost", ["attention-0", "ffn-2"])
def test_a_new_member_that_still_loads_is_not_waited_for_in_a_recovery(lost: str) -> None:
    world = cluster(2, 1, 2)
    world.held = {("load", "attention-4"), ("load", "ffn-5")}
    world.tell(Asked("grow", shape(3, 1, 3)))
    world.tell(Lost(lost, "killed"))
    assert set(world.members) == {"attention-0", "attention-1", "ffn-2", "ffn-3"} - {lost}
    change = world.coordinator.change
    assert change is not None
    assert (change.kind, change.fresh) == ("resize", ()), "it takes the place of the lost one, in the resize that follows"
    assert len(set(change.roster.members) & {"attention-4", "ffn-5"}) == 1


def test_a_new_member_that_has_loaded_serves_in_a_recovery_at_once() -> None:
    world = cluster(2, 1, 1)
    world.held = {("connect", "*")}
    world.tell(Asked("grow", shape(3, 1, 1)))
    world.held = {("provide", "*")}
    world.tell(Lost("attention-0", "killed"))
    assert world.members == ("attention-1", "attention-3", "ffn-2")


def test_a_resize_asked_for_in_a_recovery_is_kept_and_only_one() -> None:
    world = cluster(2, 1, 1)
    world.held = {("load", "*")}
    world.tell(Lost("attention-0", "killed"), Asked("one", shape(1, 1, 2)), Asked("two", shape(3, 1, 1)))
    assert [done.ask_id for done in world.done] == ["two"]
    waits = "a resize to 1 attention and 2 x 1 FFN ranks waits for its end"
    assert world.done[0].reason == f"a recovery is in progress, and {waits}: {INSTEAD}"
    world.held = set()
    world.tell(*(Answered(2, "load", member) for member in ("attention-1", "ffn-2")))
    assert world.done[-1] == Done("one", "committed")
    world.serves("attention-1", "ffn-2", "ffn-3")


def test_a_broken_link_between_two_that_live_is_made_anew() -> None:
    world = cluster(2, 1, 1)
    world.tell(Unlinked(1, "attention-0", "link to ffn-2 broke", "ffn-2"), Unlinked(1, "ffn-2", "link broke", "attention-0"))
    assert world.log[0] == "load 2: attention-0 attention-1 ffn-2"
    assert world.coordinator.state == "ready"
    assert world.number == 2


def test_where_it_does_not_connect_again_one_end_is_given_up() -> None:
    world = cluster(2, 1, 1)
    world.errors = {("connect", "attention-0"): ("no answer", "ffn-2")}
    world.tell(Unlinked(1, "attention-0", "link to ffn-2 broke", "ffn-2"))
    assert [line for line in world.log if line.startswith("release")] == ["release attention-0"], "it takes no experts with it"
    world.serves("attention-1", "attention-3", "ffn-2")


def test_who_was_at_the_end_of_a_failed_edge_before_is_given_up_next() -> None:
    world = cluster(1, 1, 1)
    world.errors = {("connect", "ffn-1"): ("no answer", "attention-0"), ("connect", "attention-2"): ("no answer", "ffn-1")}
    world.tell(Unlinked(1, "ffn-1", "link to attention-0 broke", "attention-0"))
    assert [line for line in world.log if line.startswith("release")][:2] == ["release attention-0", "release ffn-1"]
    assert world.coordinator.state == "ready"


def test_who_does_not_answer_connect_is_lost_and_not_those_who_name_it() -> None:
    world = cluster(3, 1, 2)
    world.held = {("connect", "ffn-4")}
    world.errors = {("connect", member): ("no answer", "ffn-4") for member in ("attention-0", "attention-1", "attention-2")}
    world.tell(Unlinked(1, "attention-0", "link to ffn-4 broke", "ffn-4"))
    world.errors = {}
    world.late("connect")
    assert [line for line in world.log if line.startswith("release")] == ["release ffn-4"]
    assert world.coordinator.state == "ready"


def test_who_connects_in_a_recovery_gets_less_time() -> None:
    world = cluster(2, 1, 1)
    world.held = {("connect", "ffn-2")}
    world.tell(Asked("grow", shape(2, 1, 2)))
    resize = world.coordinator.change
    world.tell(Lost("attention-0", "killed"))
    recovery = world.coordinator.change
    assert resize is not None
    assert recovery is not None
    assert (resize.phase, recovery.phase) == ("connect", "connect")
    assert recovery.deadline_s < resize.deadline_s / 4


def test_living_ranks_that_cannot_hold_more_wait_for_the_replacement() -> None:
    world = cluster(1, 1, 2)
    world.errors["load", "ffn-1"] = ("out of memory", None)
    world.held = {("provide", "*")}
    world.tell(Lost("ffn-2", "killed"))
    assert world.log[-1] == "provide 3:  | ffn-3"
    world.errors = {}
    world.tell(Provided(3, ("ffn-3",)))
    world.serves("attention-0", "ffn-1", "ffn-3")


def test_a_spare_that_does_not_answer_holds_nobody_up() -> None:
    world = cluster(1, 2, 2)
    world.held = {("retire", "ffn-2"), ("provide", "*")}
    world.tell(Lost("ffn-1", "killed"))
    change = world.coordinator.change
    assert change is not None
    assert (change.phase, change.awaited) == ("retire", {"ffn-2"})
    world.late("retire")
    assert world.coordinator.change is not None
    assert world.coordinator.change.kind == "resize"


# --- no two epochs --------------------------------------------------------------------------------------------------------------


def test_nothing_is_committed_while_the_whole_old_ffn_may_still_serve() -> None:
    world = cluster(2, 1, 2)
    world.keeps_released = True
    world.tell(Lost("ffn-2", "silent"), Lost("ffn-3", "silent"))
    change = world.coordinator.change
    assert change is not None
    assert change.phase == "fence"
    world.tell(Gone("ffn-3"))
    assert world.coordinator.roster is change.roster, "an epoch that lacks one FFN member can emit nothing"


def test_a_member_that_cannot_be_ended_holds_nobody_up_for_long() -> None:
    world = cluster(2, 1, 1)
    world.keeps_released = True
    world.tell(Lost("ffn-2", "silent"))
    world.late("fence")
    assert world.coordinator.state == "ready"


def test_an_epoch_whose_ffn_member_has_ended_holds_no_later_recovery_up() -> None:
    world = cluster(2, 1, 1)
    world.tell(Lost("ffn-2", "killed"))
    world.tell(Lost("attention-0", "killed"))
    world.serves("attention-1", "attention-4", "ffn-3")


def test_a_member_that_cannot_be_ended_holds_one_recovery_up_and_no_later_one() -> None:
    world = cluster(2, 1, 1)
    world.keeps_released = True
    world.tell(Lost("ffn-2", "silent"))
    world.late("fence")
    world.tell(Lost("attention-0", "killed"))
    assert world.coordinator.state == "ready"
    assert world.members == ("attention-1", "attention-4", "ffn-3")


def test_only_what_was_waited_for_in_vain_is_not_waited_for_again() -> None:
    world = cluster(1, 1, 2)
    world.keeps_released = True
    world.held = {("connect", "*")}
    world.tell(Asked("grow", shape(1, 1, 4)))
    world.held = {("switch", member) for member in ("ffn-1", "ffn-2", "ffn-3", "ffn-4")}
    world.tell(Lost("ffn-1", "silent"))
    assert world.members == ("attention-0", "ffn-2", "ffn-3")
    world.tell(Lost("ffn-2", "silent"))  # of the first epoch none is known to have left it, and none serves on
    world.late("fence")
    assert world.members == ("attention-0", "ffn-3", "ffn-4")
    world.tell(Lost("ffn-3", "silent"), Lost("ffn-4", "killed"), Gone("ffn-4"))
    change = world.coordinator.change
    assert change is not None
    assert change.phase == "fence", "ffn-2 and ffn-3 may still serve in the second epoch"
    world.tell(Gone("ffn-3"))
    assert world.members[:1] == ("attention-0",)
    assert set(world.members).isdisjoint({"ffn-1", "ffn-2", "ffn-3", "ffn-4"})


def test_where_one_of_the_old_ffn_members_takes_part_there_is_nothing_to_wait_for() -> None:
    world = cluster(2, 1, 2)
    world.keeps_released = True
    world.held = {("provide", "*")}
    world.tell(Lost("ffn-2", "silent"))
    assert world.members == ("attention-0", "attention-1", "ffn-3")
