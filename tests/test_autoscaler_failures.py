"""The known failures of autoscalers (as in `test_autoscaling_failures`) do not happen to the live controller: built-in policies on what actors answer."""

import itertools
from typing import Any

import pytest

from afd_ray.histogram import Histogram
from tests.autoscaler_fake import LARGE, SMALL, Setting
from tests.measured_scenes import histogram

OURS = ["tpot", "balance", "predictive"]
AT_ONCE = {"shrink_after_s": 0.0, "shrink_cooldown_s": 0.0, "grow_cooldown_s": 0.0}
TARGET_MS = 60.0


def many(value_ms: float) -> Histogram:
    return histogram(*100 * [value_ms])


@pytest.mark.parametrize("policy", OURS)
async def test_without_traffic_it_shrinks_to_the_minimum(policy: str) -> None:
    async with Setting(policy, shape=LARGE, measured=lambda member: {}, options=AT_ONCE) as setting:
        await setting.until(lambda: setting.shape == SMALL)
        await setting.more(3)
        assert (setting.shape, setting.actions()) == (SMALL, ["resize", "committed"])


@pytest.mark.parametrize("policy", OURS)
async def test_requests_that_wait_make_it_grow_whatever_those_that_run_are_like(policy: str) -> None:
    measured = {"running": 4, "waiting": 4, "oldest_waiting_s": 5.0, "tpot_ms": many(TARGET_MS / 3)}
    async with Setting(policy, measured=lambda member: measured, options=AT_ONCE, tpot_target_ms=TARGET_MS) as setting:
        await setting.until(lambda: "committed" in setting.actions())
        first = next(entry for entry in setting.autoscaler.decisions() if entry["action"] == "resize")
        assert first["before"]["attention"] < first["wanted"]["attention"]


async def test_it_does_not_shrink_to_what_would_not_hold() -> None:
    measured = {"running": 4, "tpot_ms": many(0.7 * TARGET_MS)}
    async with Setting(
        "tpot", shape=LARGE, measured=lambda member: measured, options=AT_ONCE, tpot_target_ms=TARGET_MS
    ) as setting:
        await setting.more(5)
        assert (setting.shape, setting.actions()) == (LARGE, [])


async def test_a_target_that_is_out_of_reach_is_not_chased() -> None:
    def measured(member: str) -> dict[str, Any]:
        return {"running": 4 if member == "attention-0" else 0, "tpot_ms": many(10 * TARGET_MS)}

    # A growth is judged after a minute of a clock that goes on when it is read.
    ticks = itertools.count(0.0, 5.0)
    options = AT_ONCE | {"grow_cooldown_s": 100.0}
    async with Setting("tpot", measured=measured, clock=ticks.__next__, options=options, tpot_target_ms=TARGET_MS) as setting:
        await setting.until(lambda: any("the target is out of reach" in reason for reason in setting.reasons()))
        await setting.more(3)
        assert setting.actions() == 2 * ["resize", "committed"]
