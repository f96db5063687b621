"""Rules, alerts and dashboards, as far as they can be checked without anything to scrape."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from exit_codes import DISRUPTED, promises

from deploy.grafana.dashboards import DASHBOARDS, FOLDER
from deploy.grafana.panels import to_json
from deploy.prometheus.servers import shorten
from pipeline.common.telemetry import METRICS

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
RULES = [rule for group in yaml.safe_load((PROMETHEUS / "rules.yml").read_text())["groups"] for rule in group["rules"]]
ALERTS = [rule["alert"] for rule in RULES if "alert" in rule]
RECORDED = {rule["record"] for rule in RULES if "record" in rule}
KNOWN = (
    {metric.name for metrics in METRICS.values() for metric in metrics}
    | {f"dcgan_train_step_duration_seconds_{part}" for part in ("bucket", "sum", "count")}
    | RECORDED
)


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def names_in(expr: str) -> set[str]:
    """Return the names of our metrics and recorded series in a PromQL expression, alternatives spelled out."""
    expr = re.sub(
        r'\{__name__=~"dcgan_\(([a-z|]+)\)_([a-z_]+)"',
        lambda match: " ".join(f"dcgan_{program}_{match[2]} " for program in match[1].split("|")) + "{",
        expr,
    )
    return set(re.findall(r"(?<![\w:])(?:(?:run|part):)?dcgan_[\w:]+", expr))


def test_promtool_accepts_the_configuration(promtool: str) -> None:
    command = [promtool, "check", "config", str(PROMETHEUS / "prometheus.yml")]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    assert "SUCCESS: " in checked.stdout


def test_alerts_fire_when_they_must_and_only_then(promtool: str) -> None:
    tested = subprocess.run(
        [promtool, "test", "rules", "rules_test.yml"], cwd=PROMETHEUS, capture_output=True, text=True, check=False
    )
    assert tested.returncode == 0, tested.stdout + tested.stderr


@pytest.mark.parametrize("alert", ALERTS)
def test_each_alert_is_tested_both_ways_and_has_a_runbook(alert: str) -> None:
    tests = yaml.safe_load((PROMETHEUS / "rules_test.yml").read_text())["tests"]
    cases = [case for test in tests for case in test.get("alert_rule_test", []) if case["alertname"] == alert]
    assert any(case.get("exp_alerts") for case in cases), "no test that it fires"
    assert any(not case.get("exp_alerts") for case in cases), "no test that it waits"
    rule = next(rule for rule in RULES if rule.get("alert") == alert)
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    sections = re.findall(r"^## (\w+)$", (ROOT / page).read_text(), re.MULTILINE)
    assert anchor == alert.lower()
    assert alert in sections
    assert sections == ALERTS, "the runbooks are in the order of the rules"


def test_every_exit_code_is_explained_in_alerts_and_runbooks() -> None:
    """Whom an alert wakes reads codes in it; the table of docs/operations.md is the list of all that pods end with."""
    codes = set(promises("Job")) - {DISRUPTED}
    assert {0, 1, 2, 65, 69, 75, 78, 130, 137, 143} <= codes
    runbook = (ROOT / "docs/runbooks.md").read_text().partition("## Exit codes\n")[2].partition("\n## ")[0]
    ended = ("DcganTrainVanished", "DcganRestarting", "DcganPartFailed", "DcganPartVanished")
    explained = {rule["alert"]: rule["annotations"]["description"] for rule in RULES if rule.get("alert") in ended}
    assert explained.keys() == set(ended)
    for code in codes:
        assert re.search(rf"^\| [^|]*\b{code}\b[^|]* \|", runbook, re.MULTILINE), f"no row in the runbooks: {code}"
        for alert, text in explained.items():
            assert re.search(rf"\b{code}\b", text), f"{alert} says nothing about {code}"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.get("alert") or rule["record"])
def test_rules_use_known_metrics(rule: dict[str, Any]) -> None:
    names = names_in(rule["expr"])
    assert names or "kube_pod_" in rule["expr"]
    assert names <= KNOWN


@pytest.mark.parametrize("name", DASHBOARDS)
def test_dashboards_are_in_step_with_their_code(name: str) -> None:
    assert json.loads((FOLDER / name).read_text()) == to_json(DASHBOARDS[name]), (
        "run python -m deploy.grafana.dashboards"
    )


@pytest.mark.parametrize("name", DASHBOARDS)
def test_panels_use_known_metrics_and_do_not_overlap(name: str) -> None:
    dashboard = to_json(DASHBOARDS[name])
    for panel in panels(dashboard):
        for target in panel["targets"]:
            assert names_in(target["expr"]) <= KNOWN
            assert names_in(target["expr"]) or "process_" in target["expr"] or "ALERTS" in target["expr"]
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells


@pytest.mark.parametrize("name", DASHBOARDS)
def test_grafanas_own_model_knows_every_key(name: str) -> None:
    models = pytest.importorskip(
        "grafana_foundation_sdk.models.dashboard", reason="needs the package grafana-foundation-sdk (extra dev)"
    )
    from grafana_foundation_sdk.cog.encoder import JSONEncoder

    ours = json.loads((FOLDER / name).read_text())
    theirs = json.loads(JSONEncoder().encode(models.Dashboard.from_json(ours)))

    def missing(left: Any, right: Any, where: str) -> list[str]:
        """Return the paths in `left` that `right` has lost."""
        if isinstance(left, dict):
            right = right if isinstance(right, dict) else {}
            return [path for key in left for path in missing(left[key], right.get(key), f"{where}.{key}")]
        if isinstance(left, list) and left:
            right = right if isinstance(right, list) else []
            right = [*right, *[None] * (len(left) - len(right))]
            return [
                path
                for i, pair in enumerate(zip(left, right, strict=False))
                for path in missing(*pair, f"{where}[{i}]")
            ]
        return [] if left == right or left in (None, []) else [where]

    # The model of annotations has no fields of single data sources; these two are Prometheus'.
    lost = [path for path in missing(ours, theirs, name) if not path.endswith((".titleFormat", ".textFormat"))]
    assert lost == []


def test_shortening_scales_every_time_alike() -> None:
    assert (
        shorten("a > 10 * 60\nfor: 20m\nrate(run:x:rate10m[1h])", 2)
        == "a > 10 * 2\nfor: 40s\nrate(run:x:rate10m[120s])"
    )
