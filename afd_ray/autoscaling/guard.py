"""Around any policy: what raises, answers nonsense or takes too long leaves the cluster as it is."""

import json
import threading
from collections.abc import Callable, Mapping

from afd_ray.autoscaling.values import Counts, Decision, Observation, Policy, State

LONGEST_REASON = 200
LARGEST_STATE = 1 << 18
"""Characters of JSON."""


def checked(answer: object, observation: Observation, state: State) -> Decision:
    """The decision, within the bounds; for anything else than a sound one the present counts, the earlier state, and a reason that says what is wrong."""
    if not isinstance(answer, Decision):
        return _failed(observation, state, f"the policy gave {_shown(answer)}, not a Decision")
    counts = answer.counts
    whole = isinstance(counts, tuple) and len(counts) == 2 and all(type(count) is int and count > 0 for count in counts)
    if not whole:
        return _failed(observation, state, f"the policy wants {_shown(counts)} ranks, not two positive integers")
    if not isinstance(answer.state, Mapping) or not isinstance(answer.reason, str):
        return _failed(observation, state, "the policy's state must be a mapping and its reason a text")
    fault = _fault_of(answer.state)
    if fault is not None:
        return _failed(observation, state, fault)
    override = observation.override
    if override is not None and counts != observation.counts:
        return Decision(observation.counts, f"set to {override.counts} by hand; the policy wants {Counts(*counts)}", answer.state)
    wanted = Counts(*counts)
    kept = wanted if wanted == observation.counts else observation.goals.bound(wanted)
    reason = " ".join(answer.reason.split())[:LONGEST_REASON]
    if kept != wanted:
        reason += f"; {wanted} is outside the bounds"
    return Decision(kept, reason, answer.state, bool(answer.give_up) and observation.resize is not None)


def decide(policy: Policy, observation: Observation, state: State, now: float) -> Decision:
    """One guarded decision on the caller's thread; never raises."""
    try:
        answer: object = policy(observation, state, now)
    except (Exception, SystemExit) as error:
        return _failed(observation, state, f"the policy raised {type(error).__name__}: {_shown(error)}")
    return checked(answer, observation, state)


class Guard:
    """Runs a policy on a thread of its own, and waits for it no longer than `deadline_s`.

    A late answer is dropped, and while the policy is still busy with an earlier question it is not asked another one. `decide` blocks up to the deadline: an
    event loop calls it aside.
    """

    def __init__(self, policy: Policy, deadline_s: float = 1.0, state: State | None = None) -> None:
        self.state: State = state or {}
        """What the policy remembers; kept by who wants to go on with it after a restart."""
        self._policy, self._deadline_s = policy, deadline_s
        self._asked: _Question | None = None

    def decide(self, observation: Observation, now: float) -> Decision:
        """Never raises, and is over by the deadline."""
        if self._asked is not None and not self._asked.answered.is_set():
            return _failed(observation, self.state, "the policy is still busy with an earlier question")
        policy, state = self._policy, self.state
        self._asked = _Question(lambda: decide(policy, observation, state, now))
        decision = self._asked.wait(self._deadline_s)
        if decision is None:
            return _failed(observation, self.state, f"the policy did not answer in {self._deadline_s:g} s")
        self.state = decision.state
        return decision


class _Question:
    """One call on a daemon thread: a policy that never returns does not keep the process from ending."""

    def __init__(self, call: Callable[[], Decision]) -> None:
        self.answered = threading.Event()
        self._decision: Decision | None = None
        threading.Thread(target=self._run, args=(call,), name="policy", daemon=True).start()

    def _run(self, call: Callable[[], Decision]) -> None:
        try:
            self._decision = call()
        finally:
            self.answered.set()

    def wait(self, timeout_s: float) -> Decision | None:
        """None when there is no answer by then."""
        self.answered.wait(timeout_s)
        return self._decision


def _failed(observation: Observation, state: State, reason: str) -> Decision:
    return Decision(observation.counts, reason, state, failed=True)


def _fault_of(state: State) -> str | None:
    """Why this cannot be kept for a restarted controller; None: it can."""
    try:
        size = len(json.dumps(dict(state)))
    except (TypeError, ValueError, RecursionError) as error:
        return f"the policy's state must hold JSON values alone: {_shown(error)}"
    return None if size <= LARGEST_STATE else f"the policy's state is {size} characters of JSON, more than {LARGEST_STATE}"


def _shown(value: object) -> str:
    return " ".join(str(value).split())[:LONGEST_REASON]
