"""The built-in policies and the closed form behind them."""

import json
import math
import random
import re

import pytest

from afd_ray.autoscaling import Counts, Goals, Observation, Quantiles, Stages, decide, load_policy
from afd_ray.autoscaling.forecast import MOST_GROWTH, Forecast, forecast
from afd_ray.autoscaling.lateness import ATTAINMENT, LEAST, RISEN_START, SPENT, START, learned_margin
from afd_ray.autoscaling.learning import StageBook
from afd_ray.autoscaling.policies import DEVIATIONS, MARGIN, SHRINK_MARGIN
from afd_ray.autoscaling.serve_policy import from_serve, to_serve
from afd_ray.autoscaling.sizing import CONTEXT_SPREAD, Demand, Sizing, fullest
from afd_ray.autoscaling.values import State
from afd_ray.engine.stage_costs import CostLine, StageCosts
from tests.serving_scenes import LAYERS, MOST, STAGES, counts_at, play, steady

COSTS = StageCosts(CostLine(40, 2.0, 0.004), CostLine(160, 6.0), CostLine(20, 0.2))
SIZING = Sizing(COSTS, Counts(1, 1), LAYERS, 3)


def seen(**changes: object) -> Observation:
    base = {"counts": Counts(4, 4), "goals": Goals(tpot_ms=40.0, most=MOST), "layers": LAYERS, "micro_batches": 3, "costs": COSTS}
    return Observation(**(base | changes))  # type: ignore[arg-type]


# --- sizing ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_the_counts_needed_hold_the_target_and_one_rank_fewer_does_not(seed: int) -> None:
    drawn = random.Random(seed)
    sequences = drawn.uniform(1, 400)
    demand, target = Demand(sequences, sequences * drawn.uniform(100, 8000), drawn.uniform(0, 3000)), drawn.uniform(30, 60)
    needed = SIZING.needed(demand, target)
    assert needed is not None
    assert SIZING.tpot_ms(needed, demand, target) <= target * (1 + 1e-9)
    for fewer in (needed._replace(attention=needed.attention - 1), needed._replace(ffn=needed.ffn - 1)):
        assert min(fewer) == 0 or SIZING.tpot_ms(fewer, demand, target) > target


def test_of_many_requests_a_smaller_part_is_spare() -> None:
    assert Demand(4, 4000).spare(1) == 1.5
    assert Demand(400, 400_000).spare(1) == 1.05


def test_the_fullest_rank_has_as_much_more_than_the_mean_as_dealt_contexts_have() -> None:
    drawn, ranks, each = random.Random(0), 8, 6
    spread = math.sqrt(math.log(1 + CONTEXT_SPREAD**2))
    shares = []
    for _ in range(2000):
        held = [sum(drawn.lognormvariate(-(spread**2) / 2, spread) for _ in range(each)) for _ in range(ranks)]
        shares.append(max(held) / each)
    assert fullest(ranks * each, ranks) == pytest.approx(sum(shares) / len(shares), rel=0.05)
    assert fullest(100, 1) == 1


def test_context_asks_for_attention_and_rows_for_ffn() -> None:
    base, long, many = (SIZING.needed(demand, 40) for demand in (Demand(60, 60_000), Demand(60, 480_000), Demand(300, 60_000)))
    assert base is not None
    assert long is not None
    assert many is not None
    assert long.attention > base.attention
    assert long.ffn == base.ffn
    assert many.ffn / base.ffn > many.attention / base.attention


def test_a_target_below_what_an_empty_pass_takes_needs_no_number() -> None:
    assert SIZING.needed(Demand(10, 1000), 0.1) is None


def test_the_book_learns_the_lines_whatever_the_counts() -> None:
    book, drawn = StageBook(), random.Random(0)
    for _ in range(400):
        rows, context, ranks = drawn.randint(1, 200), drawn.randint(0, 100_000), drawn.randint(1, 16)
        book.attended(rows, context, COSTS.attention.duration_us(rows, context))
        book.fed(rows, ranks, COSTS.ffn.duration_us(rows) / ranks)
    learned = book.costs(4)
    assert learned.attention.duration_us(100, 50_000) == pytest.approx(COSTS.attention.duration_us(100, 50_000), rel=0.1)
    assert learned.ffn.duration_us(100) == pytest.approx(COSTS.ffn.duration_us(100) / 4, rel=0.1)


# --- policies ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fixed", "queue", "tpot", "balance", "predictive"])
def test_states_are_json_and_answers_depend_on_nothing_else(name: str) -> None:
    policy, state, drawn = load_policy(name), {}, random.Random(0)
    for step in range(50):
        running = drawn.randint(0, 300)
        tpot = Quantiles(*(drawn.uniform(5, 100),) * 3) if running else None
        stages = Stages(100, 120, 20, 5, drawn.uniform(0, 10)) if running else None
        looked = seen(running=running, context_tokens=running * 700, output_tokens_s=running * 20.0, tpot_ms=tpot, stages=stages)
        first = policy(looked, state, step * 5.0)
        assert first == policy(looked, json.loads(json.dumps(state)), step * 5.0)
        assert first == decide(policy, looked, state, step * 5.0), "nothing for the guard to mend"
        state = json.loads(json.dumps(first.state))


def test_balance_grows_attention_when_the_kv_cache_fills() -> None:
    decision = load_policy("balance")(seen(running=10, context_tokens=5000, kv_used=0.95), {}, 0.0)
    assert decision.counts.attention > 4
    assert decision.counts.ffn == 4


def test_balance_counts_more_for_the_half_that_the_other_waits_for() -> None:
    waits_for_ffn, waits_for_attention = Stages(100, 120, 0, 90, 0), Stages(120, 100, 0, 0, 90)
    wanted = []
    for stages in (waits_for_ffn, waits_for_attention):
        state: State = {}
        for step in range(40):
            late = seen(running=150, context_tokens=75_000, output_tokens_s=3000.0, tpot_mean_ms=80.0, stages=stages)
            state = load_policy("balance")(late, state, step * 5.0).state
        wanted.append(load_policy("balance")(late, state, 200.0).reason.split()[-1])
    attention, ffn = ([int(count) for count in re.findall(r"\d+", text)] for text in reversed(wanted))
    assert attention[0] > ffn[0]
    assert attention[1] < ffn[1]


@pytest.mark.parametrize("name", ["balance", "predictive"])
def test_attention_shrinks_though_the_ffn_has_nothing_to_spare(name: str) -> None:
    just_enough = Counts(16, 8)
    loaded = seen(
        goals=Goals(tpot_ms=40.0, most=Counts(16, 16)),
        counts=just_enough,
        running=91,
        context_tokens=182_000,
        output_tokens_s=91 / 0.04,
    )
    demand = Demand.of(loaded)
    reached = SIZING._replace(at=just_enough).tpot_ms(just_enough, demand.times(demand.spare(DEVIATIONS)), 40)
    assert SHRINK_MARGIN * MARGIN * 40 < reached <= MARGIN * 40, "for the FFN's sake, whatever attention has"
    state: State = {}
    for step in range(40):
        decision = load_policy(name)(loaded, state, step * 20.0)
        state = decision.state
    assert decision.counts.attention < just_enough.attention
    assert decision.counts.ffn >= just_enough.ffn


@pytest.mark.parametrize("name", ["tpot", "balance", "predictive"])
def test_a_load_that_doubles_is_met_and_one_that_goes_is_followed(name: str) -> None:
    arrivals = [*steady(0.5, 300), *steady(4, 900, since_s=300), *steady(0.1, 1800, since_s=900)]
    outcome = play(load_policy(name), arrivals)
    before, during, after = (sum(counts_at(outcome, at_s)) for at_s in (290, 880, 1790))
    assert before < during > after
    # Each role turns once, when the load goes; and what was a rank too much or too few when it came may be put right, once up and once down.
    assert outcome.summary()["reversals"] <= 6
    late = [point.tpot_p95_ms for point in outcome.points if 600 < point.at_s < 900]
    assert sum(ms is not None and ms > 40.0 for ms in late) <= len(late) / 10


# --- how near to the target ---------------------------------------------------------------------------------------------------


def margins(late: list[float], **options: float) -> list[float]:
    """After each of these spans of 10 s in which 100 requests ended, so much of them late."""
    memory: dict[str, object] = {}
    learned = []
    for step, share in enumerate([0.0, *late]):
        looked = seen(goals=Goals(options=options), completions_s=10.0, late_s=10.0 * share)
        learned.append(learned_margin(looked, memory, 10.0 * step))
        memory = json.loads(json.dumps(memory))
    return learned[1:]


def test_late_requests_move_ranks_away_from_the_target_and_time_brings_them_back() -> None:
    calm, burst, after = margins([0.0, 0.3, 0.0])
    assert calm > START
    assert burst < calm
    assert burst < after < calm


def test_the_margin_stands_still_where_as_many_are_late_as_may_be() -> None:
    allowed = SPENT * (1 - ATTAINMENT)
    assert margins([allowed] * 50)[-1] == pytest.approx(START)
    assert margins([SPENT * 0.05] * 50, attainment=0.95)[-1] == pytest.approx(START)


def test_a_steady_share_of_late_requests_comes_to_what_is_allowed() -> None:
    """Whatever the margin that a load needs: here more of them are late the nearer to the target ranks are counted."""
    memory: dict[str, object] = {}
    margin, late, ended = START, 0.0, 0.0
    for step in range(2000):
        share = max(0.0, margin - 0.9)
        margin = learned_margin(seen(completions_s=10.0, late_s=10.0 * share), memory, 10.0 * step)
        late, ended = late + 100 * share, ended + 100
    assert late / ended == pytest.approx(SPENT * (1 - ATTAINMENT), rel=0.1)


def test_of_a_load_that_has_risen_the_margin_is_another_one() -> None:
    memory: dict[str, object] = {}
    for step, risen in enumerate((False, True, True)):
        learned = learned_margin(seen(completions_s=10.0, late_s=2.0), memory, 10.0 * step, risen)
    assert memory["margin"] == START
    assert START < learned == memory["margin_risen"] < RISEN_START


def test_a_load_that_is_always_late_asks_for_no_more_than_the_least_margin() -> None:
    assert margins([1.0] * 50)[-1] == LEAST
    assert margins([1.0] * 50, margin=0.7)[-1] == 0.7, "who starts further away stays there"


def test_who_allows_nobody_to_be_late_keeps_the_margin() -> None:
    assert margins([1.0, 0.0], attainment=1.0, margin=0.9) == [0.9, 0.9]
    looked = seen(goals=Goals(options={"attainment": 1.0, "margin": 0.9}), completions_s=10.0)
    assert learned_margin(looked, {}, 0.0, risen=True) == 0.9


# --- forecast --------------------------------------------------------------------------------------------------------------------


STAY_S = 20.0
"""How long answers of 500 tokens take at the target."""
CONTEXT = 700


def foreseen(
    arrivals_s: list[float], requests: int, *, context: int = CONTEXT, horizon_s: float = 60.0, deviations: float = 0.0
) -> Demand:
    """After looks every 20 s at a cluster that has 40 requests and at last `requests`, with so much context each."""
    return seen_to_come(arrivals_s, requests, context, horizon_s, deviations).demand


def seen_to_come(
    arrivals_s: list[float], requests: int = 40, context: int = CONTEXT, horizon_s: float = 60.0, deviations: float = 0.0
) -> Forecast:
    state: State = {}
    for step, rate in enumerate(arrivals_s):
        last = step == len(arrivals_s) - 1
        count, each = (requests, context) if last else (40, CONTEXT)
        looked = seen(arrivals_s=rate, output_tokens_s=1000.0, completions_s=2.0, running=count, context_tokens=count * each)
        to_come = forecast(looked, horizon_s, deviations, state, step * 20.0)
        state = to_come.memory
    return to_come


USUAL = [2.0] * 60


def test_what_arrivals_lead_to_is_foreseen_before_it_is_there() -> None:
    assert foreseen(USUAL, 40).sequences == pytest.approx(2 * STAY_S)
    assert foreseen([*USUAL, 4.0], 40, horizon_s=0.0).sequences == pytest.approx(4 * STAY_S, rel=0.2)
    assert foreseen([*USUAL, *[4.0] * 10], 40).sequences == pytest.approx(4 * STAY_S, rel=0.05)
    assert foreseen([*USUAL, *[1000.0] * 4], 40).sequences == MOST_GROWTH * 40


def test_what_a_rise_leaves_unserved_until_there_are_ranks_is_made_up_for() -> None:
    soon, later = foreseen([*USUAL, *[4.0] * 4], 60), foreseen([*USUAL, *[4.0] * 10], 60)
    assert soon.sequences == pytest.approx(1.5 * later.sequences, rel=0.1), (
        "half of it is new, and is not served for as long as it stays"
    )
    assert foreseen([*USUAL, *[0.5] * 3], 40, horizon_s=0.0).sequences == pytest.approx(2 * STAY_S), "a fall leaves nothing"


def test_the_load_has_risen_once_those_who_were_late_because_it_came_have_ended() -> None:
    assert not seen_to_come(USUAL).risen
    assert not seen_to_come([*USUAL, *[4.0] * 4]).risen
    assert seen_to_come([*USUAL, *[4.0] * 10]).risen
    assert not seen_to_come([*USUAL, *[4.0] * 10, *[2.0] * 10]).risen
    assert not seen_to_come([*USUAL, *[4.0] * 2000]).risen, "what there is for hours is usual"


def test_a_burst_is_counted_with_the_context_that_its_requests_will_have() -> None:
    demand = foreseen([*USUAL, *[4.0] * 4], 60, context=CONTEXT // 2)
    assert demand.context_tokens / demand.sequences == pytest.approx(CONTEXT, rel=0.05)


def test_arrivals_that_vary_by_chance_move_nothing() -> None:
    assert foreseen([*USUAL, 2.5], 40).sequences == pytest.approx(2 * STAY_S, rel=0.02)
    assert foreseen([*USUAL, 1.5], 40).sequences == pytest.approx(2 * STAY_S, rel=0.02)
    assert foreseen(USUAL, 30).sequences == pytest.approx(2 * STAY_S), "fewer requests than usual are more again soon"


def test_of_more_requests_than_usual_those_that_will_be_left_are_foreseen() -> None:
    assert foreseen(USUAL, 80).sequences == pytest.approx(40 + 40 * math.exp(-60 / STAY_S), rel=0.01)
    assert foreseen(USUAL, 80, horizon_s=0.0).sequences == pytest.approx(80)


def test_chance_is_spared_for_but_not_on_top_of_what_it_has_added() -> None:
    spare = 1 + 1 / math.sqrt(40)
    assert foreseen(USUAL, 40, deviations=1.0).sequences == pytest.approx(40 * spare, rel=0.01)
    assert foreseen(USUAL, 80, horizon_s=0.0, deviations=1.0).sequences == pytest.approx(80)


def test_a_load_that_goes_is_foreseen_once_it_is_no_chance() -> None:
    assert foreseen([*USUAL, *[0.5] * 6], 20).sequences < 0.5 * 2 * STAY_S


def test_without_any_answer_that_ended_the_present_is_expected() -> None:
    looked = seen(arrivals_s=50.0, running=10, context_tokens=7000)
    demand, _, _ = forecast(looked, 60.0, 0.0, {}, 0.0)
    assert demand == Demand.of(looked)


# --- Ray Serve's form ----------------------------------------------------------------------------------------------------------------


def test_ray_serves_own_policy_scales_the_simulated_cluster() -> None:
    from ray.serve.autoscaling_policy import replica_queue_length_autoscaling_policy
    from ray.serve.config import AutoscalingConfig

    config = AutoscalingConfig(
        min_replicas=1, max_replicas=8, target_ongoing_requests=2, upscale_delay_s=10, downscale_delay_s=60
    )
    outcome = play(from_serve(replica_queue_length_autoscaling_policy, config), [*steady(4, 300), *steady(0.2, 900, since_s=300)])
    assert sum(counts_at(outcome, 290)) > 2
    assert counts_at(outcome, 890) == Counts(1, 1)


def test_ours_answer_ray_serves_context() -> None:
    from ray.serve.config import AutoscalingContext

    context = AutoscalingContext(
        deployment_id=None,  # type: ignore[arg-type]
        deployment_name="attention",
        app_name="afd",
        current_num_replicas=2,
        target_num_replicas=2,
        running_replicas=[],
        total_num_requests=100.0,
        total_queued_requests=0.0,
        aggregated_metrics={"tpot_ms": {"a": 45.0, "b": 60.0}},  # type: ignore[dict-item]
        raw_metrics=None,
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=6,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=0.0,
        config=None,
    )
    replicas, state = to_serve(load_policy("tpot"), "attention", Goals(tpot_ms=40.0))(context)
    assert replicas == 3
    json.dumps(state)


def test_a_policy_of_ones_own_is_loaded_by_name() -> None:
    assert load_policy("tests.serving_scenes:by_completions").__name__ == "by_completions"
    with pytest.raises(ValueError, match=r"tests\.serving_scenes:STAGES is no function"):
        load_policy("tests.serving_scenes:STAGES")
    assert STAGES
