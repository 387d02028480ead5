"""Epoch changes under faults, from seeds: nothing is violated, and each of these planted bugs is found."""

import hashlib
import os
import runpy
import subprocess
import sys
from dataclasses import replace

import pytest

from afd_ray.membership.attempts import Journal
from afd_ray.membership.events import Adopted, Answered, Change, Effect, Event, Gone, Late, Release, Store
from afd_ray.membership.protocol import Coordinator
from afd_ray.membership.seat import Seat
from afd_ray.membership.staffing import Living
from afd_ray.simulation.protocol import Parts, run_seed, trace_seed

FIND_WITHIN = 10_000


def check(first: int, count: int) -> None:
    for seed in range(first, first + count):
        report = run_seed(seed)
        if report.violation is not None:
            pytest.fail("\n".join([*trace_seed(seed)[-200:], f"seed {seed}: {report.violation}"]), pytrace=False)


def test_nothing_is_violated() -> None:
    check(0, 1000)


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("first", range(0, 100_000, 10_000))
def test_nothing_is_violated_in_many_seeds(first: int) -> None:
    check(first, 10_000)


def test_storms_are_storms() -> None:
    """The checks above say nothing unless a lot goes wrong."""
    reports = [run_seed(seed) for seed in range(200)]
    assert sum(report.recoveries for report in reports) > 100
    assert sum(report.rollbacks for report in reports) > 50
    assert sum(report.commits for report in reports) > 400


@pytest.mark.parametrize("seed", [61_205], ids=["colocated, and who moves out goes on in the old epoch"])
def test_what_a_seed_once_found_stays_mended(seed: int) -> None:
    check(seed, 1)


def test_a_seed_replays_exactly_in_any_process() -> None:
    code = "from afd_ray.simulation.protocol import trace_seed; print('\\n'.join(trace_seed(20)))"
    digests = set()
    for hash_seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True).stdout
        assert told.count(b"\n") > 50
        digests.add(hashlib.sha256(told).digest())
    assert len(digests) == 1


def test_the_command_counts_seeds_and_prints_the_trace_of_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments, expected in ((["--seeds", "3"], "3 seeds without a violation"), (["--first", "5", "--trace"], "Ask switch 1")):
        monkeypatch.setattr(sys, "argv", ["protocol", *arguments])
        with pytest.raises(SystemExit, match="0"):
            runpy.run_module("afd_ray.simulation.protocol", run_name="__main__")
        assert expected in capsys.readouterr().out


# --- planted bugs -------------------------------------------------------------------------------------------------------------


class CommitsBeforeAllHaveDrained(Coordinator):
    def _on_answered(self, event: Answered) -> None:
        _is_enough(self._change, event, "drain")
        super()._on_answered(event)


class RetiresBeforeAllHaveSwitched(Coordinator):
    def _on_answered(self, event: Answered) -> None:
        _is_enough(self._change, event, "switch")
        super()._on_answered(event)


class TakesLateAnswersForNewOnes(Coordinator):
    def _on_answered(self, event: Answered) -> None:
        super()._on_answered(replace(event, number=self._change.number) if self._change else event)


class LeavesMembersDrainedWhenRollingBack(Coordinator):
    def _enter(self, change: Change) -> bool:
        return False if change.phase == "resume" else super()._enter(change)


class LeavesStandbySeatsWhenRollingBack(Coordinator):
    def _enter(self, change: Change) -> bool:
        return False if change.phase == "discard" else super()._enter(change)


class UsesNumbersAgainAfterARestart(Coordinator):
    def _on_adopted(self, event: Adopted) -> None:
        roster = event.record.roster
        super()._on_adopted(Adopted(replace(event.record, number=roster.number if roster else 0)))


class RollsACommittedChangeBackAfterARestart(Coordinator):
    def _on_adopted(self, event: Adopted) -> None:
        change = event.record.change
        if change is not None and change.committed and change.base is not None:
            event = Adopted(replace(event.record, roster=change.base, change=replace(change, committed=False)))
        super()._on_adopted(event)


class ActsBeforeTheRecordIsKept(Coordinator):
    def on(self, event: Event) -> list[Effect]:
        return sorted(super().on(event), key=lambda effect: isinstance(effect, Store))


class BelievesThatWhatWasReleasedIsGone(Coordinator):
    def on(self, event: Event) -> list[Effect]:
        effects = super().on(event)
        released = [member for effect in effects if isinstance(effect, Release) for member in effect.members]
        return effects + [effect for member in released for effect in super(type(self), self).on(Gone(member))]


class CommitsWhileTheOldFFNMayServe(Coordinator):
    def _must_fence(self, change: Change) -> bool:
        return False


class WaitsForTheEndedInEveryRecovery(Coordinator):
    def _may_serve(self, ffn: tuple[str, ...]) -> bool:
        return bool(ffn)


class WaitsForSparesToLoadInARecovery(Coordinator):
    def _living(self) -> Living:
        return super()._living()._replace(blank=())


class WaitsForeverForASwitch(Coordinator):
    def _on_late(self, event: Late) -> None:
        if event.phase != "switch":
            super()._on_late(event)


class GivesRequestsToTheDead(Coordinator):
    @property
    def takers(self) -> tuple[str, ...]:
        return self._roster.attention if self._roster else ()


class DoesWhateverItIsAsked(Seat):
    def _check_coming(self, number: int, call: str) -> None:
        self.coming = max(self.coming, number)


class EntersAnEpochThatWasReplaced(Seat):
    def _check_standby(self, number: int, call: str) -> None:
        self.coming = number
        super()._check_standby(number, call)


class BelievesEveryAttempt(Journal):
    def accept(self, attempt: int, position: int, token: int) -> bool:
        return super().accept(self.attempt, position, token)


class TakesTokensAsTheyCome(Journal):
    def accept(self, attempt: int, position: int, token: int) -> bool:
        return super().accept(self.attempt, len(self.tokens), token)


def _is_enough(change: Change | None, event: Answered, op: str) -> None:
    """One answer stands for all."""
    if change is not None and (event.number, event.op, change.phase, event.error) == (change.number, op, op, None):
        change.awaited &= {event.member}


def find(parts: Parts) -> str:
    """What the first seed that finds it says."""
    for seed in range(FIND_WITHIN):
        violation = run_seed(seed, parts).violation
        if violation is not None:
            return violation
    return ""


@pytest.mark.parametrize(
    ("bug", "what"),
    [
        (CommitsBeforeAllHaveDrained, "had not drained"),
        (RetiresBeforeAllHaveSwitched, "has not switched"),
        (LeavesMembersDrainedWhenRollingBack, "after a roll back"),
        (LeavesStandbySeatsWhenRollingBack, "standby="),
        (UsesNumbersAgainAfterARestart, "was used twice"),
        (RollsACommittedChangeBackAfterARestart, "was committed"),
        (ActsBeforeTheRecordIsKept, ""),
        (WaitsForTheEndedInEveryRecovery, "would wait for members that have ended"),
        (WaitsForSparesToLoadInARecovery, "a recovery waits for"),
        (WaitsForeverForASwitch, "nothing has disturbed it"),
        (GivesRequestsToTheDead, "requests are given to released members"),
        pytest.param(TakesLateAnswersForNewOnes, "", marks=pytest.mark.full),
        pytest.param(BelievesThatWhatWasReleasedIsGone, "", marks=pytest.mark.full),
        pytest.param(CommitsWhileTheOldFFNMayServe, "split brain", marks=pytest.mark.full),
    ],
)
def test_a_bug_in_the_coordinator_is_found(bug: type[Coordinator], what: str) -> None:
    violation = find(Parts(coordinator=bug))
    assert violation
    assert what in violation


@pytest.mark.parametrize("bug", [DoesWhateverItIsAsked, EntersAnEpochThatWasReplaced])
def test_a_bug_in_a_member_is_found(bug: type[Seat]) -> None:
    assert find(Parts(seat=bug))


@pytest.mark.parametrize("bug", [BelievesEveryAttempt, TakesTokensAsTheyCome])
def test_a_bug_in_an_ingress_is_found(bug: type[Journal]) -> None:
    assert find(Parts(journal=bug))
