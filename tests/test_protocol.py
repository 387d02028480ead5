"""The coordinator, driven by hand: resizes, what comes too late, and restarts of the controller."""

import pytest

from afd_ray.membership.events import (
    Answered,
    Asked,
    Done,
    Gone,
    Late,
    Lost,
    Op,
    Provided,
    Stopping,
    Unlinked,
    Unprovided,
    Withdrawn,
)
from tests.protocol_world import World, cluster, shape

GROWN = ("attention-0", "attention-1", "attention-3", "ffn-2", "ffn-4")
"""Who serves when `cluster(2, 1, 1)` has grown to 3 attention and 2 FFN ranks."""


# --- resizing -----------------------------------------------------------------------------------------------------------------


def test_growing_prepares_beside_the_old_epoch_and_stops_it_only_to_switch() -> None:
    world = cluster(2, 1, 1)
    world.tell(Asked("grow", shape(3, 1, 2)))
    everybody = "attention-0 attention-1 attention-3 ffn-2 ffn-4"
    assert world.log == [
        "provide 2: attention-3 | ffn-4",
        f"load 2: {everybody}",
        f"prepare 2: {everybody}",
        f"connect 2: {everybody}",
        "drain 2: attention-0 attention-1",
        f"switch 2: {everybody}",
        f"retire 2: {everybody}",
        "grow committed",
    ]
    world.serves(*GROWN, shape=shape(3, 1, 2))


def test_shrinking_moves_requests_out_and_releases_who_leaves_in_the_end() -> None:
    world = cluster(3, 1, 2)
    world.tell(Asked("shrink", shape(1, 1, 1)))
    assert world.log == [
        "load 2: attention-0 ffn-3",
        "prepare 2: attention-0 ffn-3",
        "connect 2: attention-0 ffn-3",
        "move_out 2: attention-1 attention-2",
        "drain 2: attention-0 attention-1 attention-2",
        "switch 2: attention-0 ffn-3",
        "retire 2: attention-0 ffn-3",
        "release attention-1 attention-2 ffn-4",
        "shrink committed",
    ]
    world.serves("attention-0", "ffn-3")


def test_who_leaves_gets_no_requests_once_it_gives_its_own_back() -> None:
    world = cluster(2, 1, 1)
    world.held = {("move_out", "attention-1")}
    world.tell(Asked("shrink", shape(1, 1, 1)))
    assert world.coordinator.takers == ("attention-0",)
    assert world.coordinator.leaving == ("attention-1",)
    world.late("move_out")
    assert world.coordinator.takers == ("attention-0", "attention-1")
    assert world.coordinator.leaving == ()


@pytest.mark.parametrize("op", ["load", "prepare", "connect", "drain"])
@pytest.mark.parametrize("how", ["error", "silence", "death of a new member"])
def test_what_fails_before_the_commit_is_rolled_back(op: Op, how: str) -> None:
    world = cluster(2, 1, 1)
    if how == "error":
        world.errors[op, "attention-1"] = ("out of memory", None)
    else:
        world.held = {(op, "attention-1")}
    world.tell(Asked("grow", shape(3, 1, 2)))
    if how == "silence":
        assert world.coordinator.state == "resizing"
        world.late(op)
    elif how != "error":
        world.tell(Lost("ffn-4", "killed"))
    (done,) = world.done
    assert done.outcome == "rolled_back"
    assert {"error": "attention-1: ", "silence": "attention-1: "}.get(how, "ffn-4 is lost: killed") in done.reason
    assert world.log[-3:-1] == ["resume 2: attention-0 attention-1", "discard 2: attention-0 attention-1 ffn-2"]
    assert world.coordinator.state == "ready"
    world.serves("attention-0", "attention-1", "ffn-2")
    world.held, world.errors = set(), {}
    world.tell(Asked("again", shape(3, 1, 2)))
    assert world.done[-1] == Done("again", "committed")
    assert world.number == 3, "a number is never used again"


@pytest.mark.parametrize("room", [True, False])
def test_without_room_for_new_members_nobody_is_disturbed(room: bool) -> None:
    world = cluster(1, 1, 1)
    world.room = room
    if room:
        world.held = {("provide", "*")}
    world.tell(Asked("grow", shape(3, 1, 1)))
    if room:
        world.late("provide")
    assert world.log[1:] == [
        "release attention-2 attention-3",
        f"grow rolled_back: {'no room for it in 60 s' if room else 'no room'}",
    ]
    world.serves("attention-0", "ffn-1")


def test_members_that_come_up_after_they_were_given_up_are_released_again() -> None:
    world = cluster(1, 1, 1)
    world.held = {("provide", "*")}
    world.tell(Asked("grow", shape(2, 1, 1)))
    world.late("provide")
    world.tell(Provided(2, ("attention-2",)))
    assert world.log[-1] == "release attention-2"


def test_a_loss_in_the_serving_epoch_rolls_a_resize_back_and_is_recovered_from() -> None:
    world = cluster(2, 1, 2)
    world.held = {("drain", "attention-0")}
    world.tell(Asked("grow", shape(3, 1, 2)))
    world.tell(Lost("ffn-3", "killed"))
    assert world.done == [Done("grow", "rolled_back", "ffn-3 is lost: killed")]
    assert "resume" not in " ".join(world.log), "a recovery waits for nobody to go on"
    assert world.coordinator.wanted == shape(2, 1, 2)


def test_a_loss_after_the_commit_leaves_the_resize_committed() -> None:
    world = cluster(2, 1, 1)
    world.held = {("switch", "attention-3")}
    world.tell(Asked("grow", shape(3, 1, 2)))
    world.held = set()
    world.late("switch")
    assert world.done == [Done("grow", "committed", "attention-3: switch not over in 5 s")]
    assert world.coordinator.state == "ready", "it is replaced"
    world.serves("attention-0", "attention-1", "attention-5", "ffn-2", "ffn-4", shape=shape(3, 1, 2))


def test_who_does_not_resume_is_lost() -> None:
    world = cluster(2, 1, 1)
    world.errors["drain", "attention-0"] = ("stuck", None)
    world.held = {("resume", "attention-0")}
    world.tell(Asked("grow", shape(2, 1, 2)))
    world.late("resume")
    assert world.done == [Done("grow", "rolled_back", "attention-0: drain failed: stuck; attention-0: resume not over in 5 s")]
    assert "attention-0" not in world.members
    assert world.coordinator.state == "ready"


def test_a_second_resize_is_refused_with_a_reason() -> None:
    world = cluster(1, 1, 1)
    world.held = {("provide", "*")}
    world.tell(Asked("one", shape(2, 1, 1)), Asked("two", shape(3, 1, 1)))
    (done,) = world.done
    assert done.outcome == "refused"
    assert done.reason == (
        "a resize to 2 attention and 1 x 1 FFN ranks is in progress (starting new actors, epoch 2): "
        "try again after it, or call it off (afd-ray scale --cancel)"
    )


def test_who_asks_for_what_is_there_is_answered_at_once() -> None:
    world = cluster(1, 1, 1)
    world.tell(Asked("same", shape(1, 1, 1)))
    assert world.done == [Done("same", "committed", "it has this shape already")]
    world.tell(Asked("anew", shape(1, 1, 1), anew=True))
    assert world.done[-1] == Done("anew", "committed")
    assert world.number == 2


def test_it_knows_which_resize_somebody_asked_for() -> None:
    world = cluster(1, 1, 1)
    assert world.coordinator.asked is None
    world.held = {("provide", "*")}
    world.tell(Asked("one", shape(2, 1, 1)))
    assert world.coordinator.asked == "one"
    world.tell(Withdrawn("one", "in a hurry"))
    assert world.coordinator.asked is None
    world.held = {("load", "*")}
    world.tell(Lost("ffn-1", "killed"))
    assert (world.coordinator.state, world.coordinator.asked) == ("recovering", None)
    world.tell(Asked("kept", shape(2, 1, 1)))
    assert world.coordinator.asked == "kept"


def test_who_withdraws_is_rolled_back_and_disturbs_nobody_else() -> None:
    world = cluster(1, 1, 1)
    world.held = {("connect", "ffn-1")}
    world.tell(Asked("one", shape(2, 1, 1)), Withdrawn("two", "in a hurry"))
    assert world.done == []
    world.tell(Withdrawn("one", "in a hurry"))
    assert world.done == [Done("one", "rolled_back", "in a hurry")]
    world.held = {("switch", "ffn-1")}
    world.tell(Asked("three", shape(2, 1, 1)))
    world.tell(Withdrawn("three", "in a hurry"))
    assert len(world.done) == 1, "there is no way back from a commit"


def test_a_cluster_that_does_not_form_leaves_nothing() -> None:
    world = World()
    world.errors["connect", "ffn-1"] = ("wrong model", None)
    world.tell(Asked("start", shape(1, 1, 1)))
    assert world.done == [Done("start", "rolled_back", "ffn-1: connect failed: wrong model")]
    assert world.coordinator.record.members == ()
    assert world.coordinator.state == "starting"


def test_the_end_releases_everybody_and_answers_who_waits() -> None:
    world = cluster(1, 1, 1)
    world.held = {("provide", "*")}
    world.tell(Asked("one", shape(2, 1, 1)), Stopping(), Asked("two", shape(1, 1, 1)), Late(2, "provide"), Lost("ffn-1", "x"))
    assert [done.outcome for done in world.done] == ["rolled_back", "refused"]
    assert world.coordinator.record.members == ()
    assert world.coordinator.state == "stopping"


# --- what comes late, twice, or from another life -------------------------------------------------------------------------------


def test_what_is_not_about_the_change_in_progress_is_ignored() -> None:
    world = cluster(1, 1, 1)
    world.held = {("load", "*")}
    world.tell(Asked("grow", shape(2, 1, 1)))
    before = len(world.log)
    for op in ("load", "connect", "switch"):
        world.tell(Answered(1, op, "ffn-1"), Answered(1, op, "attention-0", "an error"))
    world.tell(Answered(2, "connect", "ffn-1"), Answered(2, "load", "nobody", "an error"))
    world.tell(Late(1, "load"), Late(2, "connect"), Provided(2, ("attention-2",)), Unprovided(1, "no room"))
    world.tell(Unlinked(0, "ffn-1", "broke"), Lost("attention-7", "killed"), Gone("ffn-1"))
    assert len(world.log) == before
    assert world.coordinator.change is not None
    assert world.coordinator.change.awaited == {"attention-0", "attention-2", "ffn-1"}


def restart(world: World) -> World:
    """The next controller, from the record that this one left."""
    return World(world.stored)


def test_a_restarted_controller_rolls_an_uncommitted_resize_back() -> None:
    world = cluster(2, 1, 1)
    world.held = {("drain", "attention-1")}
    world.tell(Asked("grow", shape(3, 1, 1)))
    after = restart(world)
    assert after.log == [
        "release attention-3",
        "resume 2: attention-0 attention-1",
        "discard 2: attention-0 attention-1 ffn-2",
    ]
    after.serves("attention-0", "attention-1", "ffn-2")
    after.tell(Asked("grow", shape(3, 1, 1)))
    assert after.number == 3
    assert "attention-4" in after.members, "nor is a name"


def test_a_restarted_controller_carries_a_committed_change_through() -> None:
    world = cluster(2, 1, 1)
    world.held = {("switch", "ffn-2")}
    world.tell(Asked("shrink", shape(1, 1, 1)))
    after = restart(world)
    assert after.log == ["release attention-1", "switch 2: attention-0 ffn-2", "retire 2: attention-0 ffn-2"]
    after.serves("attention-0", "ffn-2")


def test_a_restarted_controller_goes_on_with_a_recovery_under_a_new_number() -> None:
    world = cluster(2, 1, 1)
    world.held = {("connect", "attention-1")}
    world.tell(Lost("attention-0", "killed"))
    after = restart(world)
    assert after.log[0] == "load 3: attention-1 ffn-2"
    assert after.coordinator.state == "ready"


def test_a_restarted_controller_releases_again_what_may_not_be_gone() -> None:
    world = cluster(2, 1, 1)
    world.keeps_released = True
    world.tell(Asked("shrink", shape(1, 1, 1)))
    assert restart(world).log == ["release attention-1"]


def test_a_restarted_controller_finds_nothing_to_do_where_nothing_was_in_progress() -> None:
    after = restart(cluster(2, 1, 1))
    assert after.log == []
    after.serves("attention-0", "attention-1", "ffn-2")
