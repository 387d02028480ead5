"""The planner's search: its plan keeps the target, no row more would, and what cannot be met says why."""

from collections.abc import Sequence

import pytest

from afd_ray.planning import catalogue
from afd_ray.planning.costs import least_usd
from afd_ray.planning.deployment import USABLE_MEMORY, memory, performance
from afd_ray.planning.search import TOLERANCE, Infeasible, Plan, Target, plans

ACHIEVED = catalogue.hardware().achieved


def target(
    model: str = "step3",
    gpus: Sequence[str] = ("h100",),
    context: int = 8192,
    tpot_ms: float = 50.0,
    micro_batches: Sequence[int] = (1, 2, 3, 4),
    max_gpus: int = 64,
) -> Target:
    found = {name: catalogue.accelerator(name) for name in gpus}
    return Target(catalogue.model(model), found, context, tpot_ms, micro_batches, max_gpus)


def keeps(plan: Plan, wanted: Target) -> bool:
    held, d = memory(plan.deployment), plan.deployment
    fits = held.attention <= USABLE_MEMORY * d.attention.memory_bytes and held.ffn_weights <= USABLE_MEMORY * d.ffn.memory_bytes
    return fits and performance(d, ACHIEVED).tpot_ms <= wanted.tpot_ms and d.gpus <= wanted.max_gpus


@pytest.mark.parametrize("model", sorted(catalogue.models()))
def test_a_plan_keeps_the_target_and_one_row_more_would_not(model: str) -> None:
    wanted = target(model, ("h200",), max_gpus=64)
    (plan,) = plans(wanted, ACHIEVED)
    assert keeps(plan, wanted)
    more = plan._replace(deployment=plan.deployment._replace(rows=plan.deployment.rows + 1))
    assert not keeps(more, wanted)
    assert plan.performance.usd_per_million >= 1e6 * least_usd(wanted.shape, list(wanted.gpus.values()), wanted.context)


def test_no_other_deployment_is_cheaper() -> None:
    wanted = target(max_gpus=32, micro_batches=(3,))
    (plan,) = plans(wanted, ACHIEVED)
    others = [
        candidate
        for a in range(1, 4)
        for f in range(1, 5 - a)
        for rows in range(1, 400)
        if keeps(
            candidate := plan._replace(deployment=plan.deployment._replace(attention_servers=a, ffn_servers=f, rows=rows)), wanted
        )
    ]
    cheapest = min(performance(other.deployment, ACHIEVED).usd_per_million for other in others)
    assert cheapest <= plan.performance.usd_per_million <= cheapest * (1 + TOLERANCE)


def test_every_pair_is_planned_cheapest_first() -> None:
    found = plans(target(gpus=("h800", "h20")), ACHIEVED)
    assert {(p.attention, p.ffn) for p in found} == {("h800", "h800"), ("h800", "h20"), ("h20", "h800"), ("h20", "h20")}
    prices = [p.performance.usd_per_million for p in found]
    assert prices == sorted(prices)


def test_large_pools_are_searched_in_steps() -> None:
    """One target that only large pools could use up: found without trying every pair of 4,096 GPUs."""
    wanted = target(context=32768, max_gpus=4096, micro_batches=(3,))
    (plan,) = plans(wanted, ACHIEVED)
    assert keeps(plan, wanted)
    assert plan.performance.usd_per_million <= plans(wanted._replace(max_gpus=64), ACHIEVED)[0].performance.usd_per_million * (
        1 + TOLERANCE
    )


def test_longer_contexts_ask_for_more_attention() -> None:
    short, long = (plans(target(context=context, max_gpus=128), ACHIEVED)[0].deployment for context in (4096, 32768))
    assert long.attention_servers / long.ffn_servers > short.attention_servers / short.ffn_servers


def test_a_tighter_target_is_never_cheaper() -> None:
    usd = [plans(target(tpot_ms=ms), ACHIEVED)[0].performance.usd_per_million for ms in (100, 50, 25)]
    assert usd[0] <= usd[1] * (1 + TOLERANCE)
    assert usd[1] <= usd[2] * (1 + TOLERANCE)


def test_what_binds_is_named() -> None:
    assert plans(target(tpot_ms=500), ACHIEVED)[0].bound == "attention memory"
    assert plans(target(tpot_ms=20), ACHIEVED)[0].bound != "attention memory"


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (
            target(tpot_ms=2),
            r"^tpot-ms: 2 cannot be met with 64 GPUs at most, the least is [\d.]+ \(attention on h100, FFN on h100\)",
        ),
        (target(context=10**8), r"^context: at 100000000 tokens the cache of 1 request\(s\) takes .* at most \d+ tokens fit$"),
        (target(gpus=("l4",), max_gpus=16), r"^max-gpus: 16 cannot hold Step-3: 304 GB .* at least 24$"),
        (
            target("minimax-m1", ("l4",)),
            r"^hardware: MiniMax M1's attention weights take 23.7 GB on every accelerator.* is 21.6 GB$",
        ),
    ],
)
def test_what_cannot_be_met_says_what_binds(wanted: Target, message: str) -> None:
    with pytest.raises(Infeasible, match=message):
        plans(wanted, ACHIEVED)


def test_the_nearest_that_is_named_can_be_met() -> None:
    with pytest.raises(Infeasible) as refused:
        plans(target(tpot_ms=2), ACHIEVED)
    least_ms = float(str(refused.value).partition("the least is ")[2].split()[0])
    assert plans(target(tpot_ms=least_ms + 0.1), ACHIEVED)
