"""The dashboard and the alerts ask for metrics and labels that nodes have."""

import json
import re
from pathlib import Path

import pytest
import yaml

from kvstore.metrics import Metrics
from kvstore.settings import Settings, variable

DOCS = Path(__file__).parents[2] / "docs"
OF_PROMETHEUS = {"instance", "le"}
METRIC = re.compile(r"\bkvstore_\w+")
SELECTED = re.compile(r"(kvstore_\w+)\s*\{([^}]*)\}")
GROUPED = re.compile(r"\b(?:by|ignoring|on)\s*\(([^)]*)\)")
VALUED = re.compile(r'(\w+)\s*(=~|=)\s*"([^"]*)"')


def exported() -> dict[str, set[str]]:
    """Names under which samples are served, and their labels."""
    metrics = Metrics()
    suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}
    found = {}
    for collector in metrics.registry._collector_to_names:
        metric = collector.describe()[0]
        for suffix in suffixes.get(metric.type, [""]):
            found[metric.name + suffix] = set(collector._labelnames)
    return found


def panels() -> list[dict]:
    return json.loads((DOCS / "grafana.json").read_text())["panels"]


def rules() -> list[dict]:
    (group,) = yaml.safe_load((DOCS / "alerts.yml").read_text())["groups"]
    return group["rules"]


PANEL_QUERIES = [(f"{panel['title']}-{target['refId']}", target["expr"], target["legendFormat"])
                 for panel in panels() for target in panel.get("targets", ())]  # fmt: skip
RULE_QUERIES = [(rule["alert"], rule["expr"], json.dumps(rule["annotations"])) for rule in rules()]
QUERIES = PANEL_QUERIES + RULE_QUERIES
EXPORTED = exported()


@pytest.mark.parametrize(
    ("expression", "shown"), [each[1:] for each in QUERIES], ids=[each[0] for each in QUERIES]
)
def test_what_is_asked_for_is_exported(expression, shown):
    asked = set(METRIC.findall(expression))
    assert asked
    assert asked <= EXPORTED.keys()
    labels = set().union(*(EXPORTED[name] for name in asked)) | OF_PROMETHEUS
    grouped = {label.strip() for group in GROUPED.findall(expression) for label in group.split(",")}
    assert grouped <= labels
    for metric, selectors in SELECTED.findall(expression):
        assert {label for label, _, _ in VALUED.findall(selectors)} <= EXPORTED[metric] | OF_PROMETHEUS
    assert set(re.findall(r"\{\{\s*(\w+)\s*\}\}", shown)) <= grouped
    assert set(re.findall(r"\$labels\.(\w+)", shown)) <= grouped


def test_the_dashboard_shows_every_metric():
    shown = {name for _, expression, _ in PANEL_QUERIES for name in METRIC.findall(expression)}
    histograms = {name.removesuffix("_bucket") for name in shown if name.endswith("_bucket")}
    missing = {name for name in EXPORTED if name not in shown and name.rpartition("_")[0] not in histograms}
    assert missing == set()


def test_panels_of_the_dashboard_do_not_overlap():
    cells = set()
    for panel in panels():
        place = panel["gridPos"]
        own = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert max(x for x, _ in own) < 24
        assert cells.isdisjoint(own)
        cells |= own
    assert len({panel["id"] for panel in panels()}) == len(panels())


def test_values_that_alerts_select_exist():
    from kvstore.errors import MissReason
    from kvstore.handles import SaveOutcome

    known = {"outcome": set(SaveOutcome), "reason": set(MissReason)}
    for _, expression, _ in RULE_QUERIES:
        for label, _, value in VALUED.findall(expression):
            for pattern in value.split("|"):
                assert any(re.fullmatch(pattern, each) for each in known[label])


def test_the_alerts_are_the_documented_ones():
    rows = [row for row in (DOCS / "operations.md").read_text().splitlines() if row.startswith("| `KVStore")]
    named = {name for row in rows for name in re.findall(r"`(KVStore\w+)`", row)}
    assert named == {rule["alert"] for rule in rules()}


def test_settings_that_alerts_name_exist():
    named = set(re.findall(r"KVSTORE_[A-Z_]+", (DOCS / "alerts.yml").read_text()))
    assert named <= set(map(variable, Settings.model_fields))


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_every_alert_says_what_to_do(rule):
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    assert rule["annotations"].keys() == {"summary", "description"}
