"""Pictures of a comparison (needs matplotlib, in the extra `plots`)."""

import io
from collections.abc import Callable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from afd_ray.simulation.serving.measures import Point
from afd_ray.simulation.serving.outcome import Outcome

Value = Callable[[Point], float | None]


def pictures(outcomes: Sequence[Outcome], tpot_target_ms: float, ttft_target_ms: float) -> Mapping[str, bytes]:
    """Titles and PNG files: the course of each policy, and what each paid for what it held."""
    drawn = {outcome.policy: _course(outcome, tpot_target_ms, ttft_target_ms) for outcome in outcomes}
    return {"Cost and attainment": _cost(outcomes), **drawn}


def _course(outcome: Outcome, tpot_target_ms: float, ttft_target_ms: float) -> bytes:
    figure = Figure(figsize=(11, 8), layout="constrained")
    ranks, tpot, ttft, load = figure.subplots(4, 1, sharex=True)
    _draw(ranks, outcome, {"attention": lambda p: p.attention, "FFN": lambda p: p.ffn}, "ranks", step=True)
    _draw(tpot, outcome, {"TPOT p95": lambda p: p.tpot_p95_ms}, "ms")
    _draw(ttft, outcome, {"TTFT p95": lambda p: p.ttft_p95_ms}, "ms")
    _draw(load, outcome, {"requests": lambda p: p.requests, "waiting": lambda p: p.waiting}, "requests")
    tpot.axhline(tpot_target_ms, color="gray", linestyle="--", label="target")
    ttft.axhline(ttft_target_ms, color="gray", linestyle="--", label="target")
    for axes in (tpot, ttft):
        axes.set_yscale("log")
        axes.legend(loc="upper right")
    load.set_xlabel("hours")
    return _png(figure)


def _draw(axes: Axes, outcome: Outcome, values: Mapping[str, Value], unit: str, step: bool = False) -> None:
    hours = [point.at_s / 3600 for point in outcome.points]
    for name, value in values.items():
        read = [value(point) for point in outcome.points]
        axes.plot(
            hours, [float("nan") if y is None else y for y in read], drawstyle="steps-post" if step else "default", label=name
        )
    axes.set_ylabel(unit)
    axes.legend(loc="upper right")


def _cost(outcomes: Sequence[Outcome]) -> bytes:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for outcome in outcomes:
        axes.plot([outcome.gpu_hours], [100 * outcome.attainment], "o", label=outcome.policy)
    axes.set(xlabel="GPU-hours", ylabel="requests within both targets, %")
    axes.legend()
    return _png(figure)


def _png(figure: Figure) -> bytes:
    FigureCanvasAgg(figure)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=100)
    return out.getvalue()
