"""The Grafana dashboard and the Prometheus alert rules: what they are made of, and that they ask for what is exported."""

import json
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml

from actors.http.metrics import IngressMetrics
from afd_ray.metrics import CATALOGUE

ROOT = Path(__file__).resolve().parent.parent
DASHBOARD = json.loads((resources.files("configs") / "grafana" / "afd-ray.json").read_text())
RULES = yaml.safe_load((resources.files("configs") / "alerts" / "afd-ray.yaml").read_text())
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
HTTP = {name: (kind, help_text) for name, help_text, kind, _ in IngressMetrics().snapshot()}
HTTP_LABELS = {"route", "status", "reason", "replica", "le"}


def exported() -> set[str]:
    """Every name that a Prometheus has after scraping `/metrics`."""
    suffixes = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_count", "_sum")}
    return {*CATALOGUE, *(name + suffix for name, (kind, _) in HTTP.items() for suffix in suffixes[kind])}


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def rules() -> list[dict[str, Any]]:
    return [rule for group in RULES["groups"] for rule in group["rules"]]


def expressions() -> Iterator[str]:
    for panel in panels():
        yield from (target["expr"] for target in panel["targets"])
    for variable in DASHBOARD["templating"]["list"]:
        yield variable.get("definition", "")
    yield from (annotation["expr"] for annotation in DASHBOARD["annotations"]["list"])
    yield from (rule["expr"] for rule in rules())


def test_every_expression_asks_for_what_is_exported() -> None:
    asked = {name for expression in expressions() for name in re.findall(r"\bafd_\w+", expression)}
    assert asked
    assert asked <= exported()


def test_every_selector_is_by_a_label_that_the_metric_has() -> None:
    for expression in expressions():
        for name, selector in re.findall(r"\b(afd_\w+)\{([^}]*)\}", expression):
            known = set(CATALOGUE[name].labels) if name in CATALOGUE else HTTP_LABELS
            assert set(re.findall(r"(\w+)\s*[=!]", selector)) <= known, expression


def test_quantiles_are_never_averaged_nor_summed() -> None:
    assert not [e for e in expressions() if re.search(r"\b(avg|sum)\b[^(]*\((?=[^()]*quantile=)", e)]


def test_brackets_are_closed_in_every_expression() -> None:
    for expression in expressions():
        assert [expression.count(b) for b in "([{"] == [expression.count(b) for b in ")]}"], expression


def test_the_dashboard_loads_into_any_grafana() -> None:
    assert DASHBOARD["schemaVersion"] >= 36
    assert DASHBOARD["uid"]
    assert "id" not in DASHBOARD  # given by the Grafana that imports it
    (source, *_) = DASHBOARD["templating"]["list"]
    assert (source["name"], source["type"], source["query"]) == ("datasource", "datasource", "prometheus")
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


@pytest.mark.parametrize("panel", panels(), ids=lambda panel: panel["title"])
def test_a_panel_has_what_grafana_needs_and_people_read(panel: dict[str, Any]) -> None:
    assert panel["type"] in ("timeseries", "stat")
    assert panel["title"]
    assert panel["description"]
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["datasource"] == DATASOURCE
    assert [target["datasource"] for target in panel["targets"]] == [DATASOURCE] * len(panel["targets"])
    assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) >= 1


def test_no_panel_lies_on_another() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, panel["title"]
        taken |= cells


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_an_alert_says_how_bad_it_is_and_what_to_do(rule: dict[str, Any]) -> None:
    assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    assert set(rule["annotations"]) == {"summary", "description"}
    assert re.fullmatch(r"\d+[smh]", rule.get("for", "0s"))


def test_alert_groups_are_as_prometheus_reads_them() -> None:
    assert set(RULES) == {"groups"}
    assert all(set(group) <= {"name", "interval", "rules"} for group in RULES["groups"])
    assert len({rule["alert"] for rule in rules()}) == len(rules())


def test_the_docs_list_every_metric_and_no_other() -> None:
    rows = re.findall(r"^\| `(afd_\w+)` \| (\w+) \| ([^|]*) \| ([^|]*) \|$", (ROOT / "docs" / "telemetry.md").read_text(), re.M)
    told = {name: (kind, help_text) for name, kind, _, help_text in rows}
    of_http = {name + ("_total" if kind == "counter" else ""): (kind, text) for name, (kind, text) in HTTP.items()}
    assert told == {name: (metric.kind, metric.help) for name, metric in CATALOGUE.items()} | of_http
