"""The paper's tables, computed, beside what it prints (arXiv:2507.19427 Tables 2, 3, 5 to 8 and section 6)."""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from afd_ray.planning import catalogue
from afd_ray.planning.accelerators import SERVER, Accelerator
from afd_ray.planning.costs import TPOT_MS, attention_usd, ffn_usd, least_sparsity, most_rows
from afd_ray.planning.deployment import Deployment, performance
from afd_ray.planning.shapes import ModelShape
from afd_ray.planning.sizing import equal_bandwidth_cards, ffn_cards, requests_within, stage_budget

MICRO_BATCHES = 3
HOPPER = "h100"
EIGHT_K = 8000
"""As the paper rounds it in section 6."""


class Comparison(NamedTuple):
    """One figure, computed and printed."""

    table: str
    row: str
    column: str
    computed: float
    printed: float
    tolerance: float
    kind: Literal["relative", "absolute"]

    @property
    def deviation(self) -> float:
        """In the figure's own unit, or as a share of what is printed."""
        difference = self.computed - self.printed
        return difference / self.printed if self.kind == "relative" else difference

    @property
    def holds(self) -> bool:
        return abs(self.deviation) <= self.tolerance


def comparisons() -> Iterator[Comparison]:
    """Every figure in the order of the paper."""
    printed = catalogue.read("published.yaml")
    gpus = {name: catalogue.accelerator(name) for name in printed["hardware"]}
    yield from _work(printed["tables_2_3"])
    yield from _unit_costs(printed["table_5"], gpus)
    yield from _token_costs(printed["table_6"], gpus, printed["tables_2_3"]["contexts"])
    yield from _sparsity(printed["table_7"], gpus)
    yield from _throughput(printed["deployments"])
    yield from _sizing(printed["sizing"])


def _work(printed: dict[str, Any]) -> Iterator[Comparison]:
    columns = ("KV bytes", "attention FLOP", "linear FLOP", "FFN FLOP")
    for number, context in zip((2, 3), printed["contexts"], strict=True):
        for name, figures in printed["rows"].items():
            shape = catalogue.model(name)
            ours = (shape.moved_bytes(context), shape.attention_flops(context), shape.linear_flops, shape.ffn_flops)
            at = [2 * (number - 2), 2 * (number - 2) + 1, 4, 5]
            table = f"Table {number}: work for each token at {context:,} tokens"
            for column, computed, index in zip(columns, ours, at, strict=True):
                value = figures[index] * printed["units"][index]
                yield Comparison(table, shape.name, column, computed, value, 0.01, "relative")


def _unit_costs(printed: dict[str, Any], gpus: dict[str, Accelerator]) -> Iterator[Comparison]:
    table = "Table 5: unit costs"
    for index, gpu in enumerate(gpus.values()):
        flops, moved = printed["usd_per_exaflop"][index], printed["usd_per_petabyte"][index]
        yield Comparison(table, gpu.name, "USD/EFLOP", gpu.usd_per_flop * 1e18, flops, 0.01, "relative")
        yield Comparison(table, gpu.name, "USD/PB", gpu.usd_per_byte * 1e15, moved, 0.01, "relative")


def _token_costs(printed: dict[str, Any], gpus: dict[str, Accelerator], contexts: list[int]) -> Iterator[Comparison]:
    for part, title in enumerate([*(f"attention at {context:,} tokens" for context in contexts), "FFN"]):
        for name, figures in printed.items():
            shape = catalogue.model(name)
            for (key, gpu), value in zip(gpus.items(), figures[part], strict=True):
                usd = attention_usd(shape, gpu, contexts[part]) if part < len(contexts) else ffn_usd(shape, gpu)
                table = f"Table 6: USD for a million tokens, {title}"
                yield Comparison(table, shape.name, key, usd * 1e6, value, 0.0015, "absolute")


def _sparsity(printed: list[float], gpus: dict[str, Accelerator]) -> Iterator[Comparison]:
    shape = catalogue.model("step3")
    for gpu, value in zip(gpus.values(), printed, strict=True):
        computed = least_sparsity(shape.hidden_size, shape.layers, gpu)
        yield Comparison("Table 7: the least sparsity", gpu.name, "share", computed, value, 0.0005, "absolute")


def _throughput(printed: list[dict[str, Any]]) -> Iterator[Comparison]:
    table = "Table 8: tokens/s for each GPU"
    for row in printed:
        computed = tokens_per_gpu_s(**{key: row[key] for key in ("attention", "ffn", "context", "cache_bytes", "batch")})
        for column, tolerance in (("printed", 0.03), ("measured", 0.05)):
            if column in row:
                yield Comparison(table, row["name"], column, computed, row[column], tolerance, "relative")


def tokens_per_gpu_s(attention: int, ffn: int, context: int, cache_bytes: Literal[1, 2], batch: int | None) -> float:
    """Step-3 on servers of Hopper GPUs, three micro-batches; without a `batch`, the largest that the network allows, at the target."""
    gpu, achieved = catalogue.accelerator(HOPPER), catalogue.hardware().achieved
    shape = catalogue.model("step3").with_cache_bytes(cache_bytes)
    if batch is None:
        # A server of attention sends its rows to every FFN server: for each of them the rows of its network divided by theirs.
        rows = most_rows(
            shape.hidden_size, shape.layers, SERVER * gpu.nic_bytes_s * achieved.network.value * min(1, attention / ffn)
        )
        return MICRO_BATCHES * rows / (SERVER * (attention + ffn)) / (TPOT_MS * 1e-3)
    rows = batch // (MICRO_BATCHES * SERVER * attention)
    deployment = Deployment(shape, gpu, gpu, attention, ffn, MICRO_BATCHES, rows, context)
    return performance(deployment, achieved).tokens_per_gpu_s


def _sizing(printed: dict[str, float]) -> Iterator[Comparison]:
    """Tolerances: as the paper rounds."""
    shape: ModelShape = catalogue.model("step3")
    h800, l20, l4 = (catalogue.accelerator(name) for name in ("h800", "l20", "l4"))
    stage_us = printed["stage_us"]
    budget, ffn = stage_budget(shape, l20, stage_us), ffn_cards(shape, l20, stage_us)
    computed: dict[str, tuple[float, float]] = {
        "l20_bytes_a_stage_mb": (budget.moved_bytes / 1e6, 0.5),
        "l20_linear_mb": (budget.linear_bytes / 1e6, 0.5),
        "l20_kv_mb": (budget.cache_bytes / 1e6, 0.5),
        "l20_kv_kilotokens": (budget.cached_tokens(shape) / 1e3, 1.0),
        "l20_requests_at_8k": (requests_within(budget, shape, EIGHT_K), 0.0),
        "l20_for_an_h800": (equal_bandwidth_cards(1, h800, l20), 0.0),
        "l20_ffn_mb": (ffn.bytes_a_layer / 1e6, 0.7),
        "l20_ffn_gb_a_card": (ffn.bytes_a_card / 1e9, 0.1),
        "l20_ffn_cards": (ffn.cards, 0.0),
        "l4_bytes_a_stage_mb": (stage_budget(shape, l4, stage_us).moved_bytes / 1e6, 0.1),
        "l4_ffn_cards": (equal_bandwidth_cards(ffn.cards, l20, l4, whole=SERVER), 0.0),
    }
    for key, (value, tolerance) in computed.items():
        yield Comparison("Section 6: L20 and L4", key, "printed", value, printed[key], tolerance, "absolute")
