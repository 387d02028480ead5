"""Policies written for Ray Serve, used here, and ours in the form that Ray Serve calls.

Ray Serve calls `policy(ctx)` with an `AutoscalingContext` and takes (replicas, state). Nothing of Ray is imported: what is read of a context are its
documented attributes.
"""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, Literal

from afd_ray.autoscaling.guard import decide
from afd_ray.autoscaling.values import Counts, Decision, Goals, Observation, Policy, Quantiles, State

ServePolicy = Callable[[Any], tuple[int | float, dict[str, Any]]]


def from_serve(policy: ServePolicy, config: object | None = None) -> Policy:
    """Lets a Ray Serve policy scale the attention ranks as replicas; FFN ranks follow in the ratio of the start.

    `config` is what the context's `config` is to be: an `AutoscalingConfig` for Ray Serve's own policies.
    """

    def adapted(observation: Observation, state: State, now: float) -> Decision:
        ratio = state.get("ratio", observation.counts.ffn / observation.counts.attention)
        context = _context(observation, dict(state.get("policy", {})), state, now, config)
        replicas, remembered = policy(context)
        attention = max(1, round(replicas))
        wanted = observation.goals.bound(Counts(attention, max(1, round(attention * ratio))))
        memory = {"ratio": ratio, "policy": remembered, **_changes(wanted.attention, observation, state, now)}
        return Decision(wanted, f"{replicas:g} replicas", memory)

    return adapted


def to_serve(policy: Policy, role: Literal["attention", "ffn"], goals: Goals) -> ServePolicy:
    """Scales a Ray Serve deployment whose replicas are ranks of `role`, by what a context tells: requests, and the metrics `tpot_ms` and `ttft_ms`.

    The other role's count is taken to be equal.
    """

    def adapted(context: Any) -> tuple[int | float, dict[str, Any]]:
        least, most = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
        replicas = max(1, context.current_num_replicas)
        observation = Observation(
            counts=Counts(replicas, replicas),
            goals=Goals(
                goals.tpot_ms, goals.ttft_ms, Counts(max(1, least), 1), Counts(most, max(most, 1)), options=goals.options
            ),
            running=round(context.total_num_requests - (context.total_queued_requests or 0)),
            waiting=round(context.total_queued_requests or 0),
            tpot_ms=_worst(context.aggregated_metrics, "tpot_ms"),
            ttft_ms=_worst(context.aggregated_metrics, "ttft_ms"),
        )
        decision = decide(policy, observation, context.policy_state, context.current_time or 0.0)
        return getattr(decision.counts, role), dict(decision.state)

    return adapted


def _context(observation: Observation, policy_state: dict[str, Any], state: State, now: float, config: object | None) -> Any:
    goals, replicas = observation.goals, observation.counts.attention
    metrics = {"tpot_ms": observation.tpot_ms, "ttft_ms": observation.ttft_ms}
    shared = {name: dict.fromkeys(range(replicas), value.p95) for name, value in metrics.items() if value is not None}
    return SimpleNamespace(
        deployment_id="attention",
        deployment_name="attention",
        app_name="afd",
        current_num_replicas=replicas,
        target_num_replicas=observation.resize.to.attention if observation.resize else replicas,
        running_replicas=list(range(replicas)),
        total_num_requests=float(observation.requests),
        total_queued_requests=float(observation.waiting),
        total_running_requests=float(observation.running),
        aggregated_metrics=shared,
        raw_metrics={},
        capacity_adjusted_min_replicas=goals.least.attention,
        capacity_adjusted_max_replicas=goals.most.attention,
        policy_state=policy_state,
        last_scale_up_time=state.get("last_up"),
        last_scale_down_time=state.get("last_down"),
        current_time=now,
        config=config,
    )


def _changes(attention: int, observation: Observation, state: State, now: float) -> dict[str, float | None]:
    current = observation.counts.attention
    up, down = state.get("last_up"), state.get("last_down")
    return {"last_up": now if attention > current else up, "last_down": now if attention < current else down}


def _worst(metrics: Mapping[str, Mapping[Any, float]] | None, name: str) -> Quantiles | None:
    values = list((metrics or {}).get(name, {}).values())
    return Quantiles(*[max(values)] * 3) if values else None
