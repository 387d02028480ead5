"""The coordinator, driven by hand: what it asks of whom, in which order, and what it makes of every answer."""

from collections.abc import Iterable

import pytest

from afd_ray.membership.events import (
    Adopted,
    Answered,
    Ask,
    Asked,
    Deadline,
    Done,
    Effect,
    Event,
    Gone,
    Late,
    Lost,
    Op,
    Phase,
    Provide,
    Provided,
    Publish,
    Record,
    Release,
    Stopping,
    Store,
    Unlinked,
    Unprovided,
    Watch,
    Withdrawn,
)
from afd_ray.membership.protocol import Coordinator
from afd_ray.membership.shape import Shape
from afd_ray.membership.steps import Deadlines


class World:
    """Does at once what the coordinator wants, but for what a test holds back, and writes it all down."""

    def __init__(self, record: Record | None = None) -> None:
        self.coordinator = Coordinator(Deadlines())
        self.log: list[str] = []
        self.done: list[Done] = []
        self.stored = Record()
        self.held: set[tuple[str, str]] = set()
        """(call, member) that is not answered; member * for all."""
        self.errors: dict[tuple[str, str], tuple[str, str | None]] = {}
        """Error and peer for (call, member)."""
        self.room = True
        self.backoffs: list[float] = []
        self.keeps_released = False
        if record is not None:
            self.tell(Adopted(record))

    def tell(self, *events: Event) -> None:
        todo = list(events)
        while todo:
            effects = self.coordinator.on(todo.pop(0))
            assert all(not isinstance(effect, Store) for effect in effects[1:]), "the record comes first"
            for effect in effects:
                todo += self._does(effect)

    def _does(self, effect: Effect) -> Iterable[Event]:
        line = _line(effect)
        if line:
            self.log.append(line)
        if isinstance(effect, Store):
            self.stored = effect.record
        elif isinstance(effect, Provide) and ("provide", "*") not in self.held:
            members = effect.attention + sum(effect.ffn, ())
            return [Provided(effect.number, members) if self.room else Unprovided(effect.number, "no room")]
        elif isinstance(effect, Ask):
            return [self._answer(effect, member) for member in effect.members if not self._is_held(effect.op, member)]
        elif isinstance(effect, Release) and not self.keeps_released:
            return [Gone(member) for member in effect.members]
        elif isinstance(effect, Deadline) and effect.phase == "settle":
            return [Late(effect.number, "settle")]
        elif isinstance(effect, Deadline) and effect.phase == "backoff":
            self.backoffs.append(effect.seconds)
        elif isinstance(effect, Done):
            self.done.append(effect)
        return []

    def _is_held(self, op: str, member: str) -> bool:
        return (op, member) in self.held or (op, "*") in self.held

    def _answer(self, ask: Ask, member: str) -> Answered:
        error, peer = self.errors.get((ask.op, member), (None, None))
        return Answered(ask.number, ask.op, member, error, peer)

    def late(self, phase: Phase) -> None:
        change = self.coordinator.change
        self.tell(Late(change.number if change else self.number, phase))

    @property
    def number(self) -> int:
        return self.coordinator.record.number

    @property
    def members(self) -> tuple[str, ...]:
        roster = self.coordinator.roster
        assert roster is not None
        return roster.members

    def serves(self, *members: str, shape: Shape | None = None) -> None:
        """Nothing is in progress, and these serve, in the order of the ranks."""
        assert self.coordinator.change is None
        assert not self.coordinator.broken
        assert self.members == members
        assert set(self.coordinator.record.members) == set(members), "nobody else is left"
        if shape is not None:
            assert self.coordinator.roster is not None
            assert self.coordinator.roster.shape == shape


def _line(effect: Effect) -> str:
    if isinstance(effect, Ask):
        return f"{effect.op} {effect.number}: {' '.join(effect.members)}"
    if isinstance(effect, Provide):
        return f"provide {effect.number}: {' '.join(effect.attention)} | {' | '.join(' '.join(group) for group in effect.ffn)}"
    if isinstance(effect, Release):
        return f"release {' '.join(effect.members)}"
    if isinstance(effect, Done):
        return f"{effect.ask_id} {effect.outcome}{': ' + effect.reason if effect.reason else ''}"
    assert isinstance(effect, Store | Deadline | Watch | Publish)
    return ""


def shape(attention: int, tensor_parallel: int, expert_parallel: int) -> Shape:
    return Shape(attention, tensor_parallel, expert_parallel, None)


def cluster(attention: int, tensor_parallel: int, expert_parallel: int) -> World:
    world = World()
    world.tell(Asked("start", shape(attention, tensor_parallel, expert_parallel)))
    assert world.done == [Done("start", "committed")]
    assert world.coordinator.state == "ready"
    world.log, world.done = [], []
    return world


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
    assert "a resize to 2 attention and 1 x 1 FFN ranks is in progress (starting new actors, epoch 2)" in done.reason


def test_who_asks_for_what_is_there_is_answered_at_once() -> None:
    world = cluster(1, 1, 1)
    world.tell(Asked("same", shape(1, 1, 1)))
    assert world.done == [Done("same", "committed", "it has this shape already")]
    world.tell(Asked("anew", shape(1, 1, 1), anew=True))
    assert world.done[-1] == Done("anew", "committed")
    assert world.number == 2


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


# --- recovery -----------------------------------------------------------------------------------------------------------------


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


def test_a_resize_asked_for_in_a_recovery_is_kept_and_only_one() -> None:
    world = cluster(2, 1, 1)
    world.held = {("load", "*")}
    world.tell(Lost("attention-0", "killed"), Asked("one", shape(1, 1, 2)), Asked("two", shape(3, 1, 1)))
    assert [done.ask_id for done in world.done] == ["two"]
    assert world.done[0].reason == "a recovery is in progress, and a resize to 1 attention and 2 x 1 FFN ranks waits for its end"
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


def test_where_one_of_the_old_ffn_members_takes_part_there_is_nothing_to_wait_for() -> None:
    world = cluster(2, 1, 2)
    world.keeps_released = True
    world.held = {("provide", "*")}
    world.tell(Lost("ffn-2", "silent"))
    assert world.members == ("attention-0", "attention-1", "ffn-3")


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
