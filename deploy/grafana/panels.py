"""Panels and dashboards, and their JSON in Grafana's format."""

from dataclasses import dataclass, field
from typing import Any, Literal

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
COLUMNS = 24


@dataclass(frozen=True)
class Panel:
    """One panel. `queries` maps PromQL to the text of the legend."""

    title: str
    queries: dict[str, str]
    unit: str = "short"
    about: str = ""
    kind: Literal["timeseries", "stat"] = "timeseries"
    width: int = 8
    red_above: float | None = None
    red_below: float | None = None
    bounds: tuple[float, float] | None = None
    """Smallest range of the vertical axis."""
    stacked: bool = False
    logarithmic: bool = False


@dataclass(frozen=True)
class Dashboard:
    """Rows of panels, each row under a question."""

    uid: str
    title: str
    runs: str
    """PromQL for the values of the variable `run`."""
    rows: dict[str, list[Panel]] = field(default_factory=dict)


def stat(title: str, query: str, unit: str = "short", **more: Any) -> Panel:
    """Return a panel that shows one number."""
    return Panel(title, {query: ""}, unit, kind="stat", width=4, **more)


def to_json(dashboard: Dashboard) -> dict[str, Any]:
    """Return a dashboard in Grafana's format (schema 36, Grafana 9 and later)."""
    panels: list[dict[str, Any]] = []
    x = y = height = 0
    for question, row in dashboard.rows.items():
        y, x = y + height, 0
        panels.append(
            {
                "type": "row",
                "title": question,
                "collapsed": False,
                "gridPos": {"h": 1, "w": COLUMNS, "x": 0, "y": y},
                "panels": [],
            }
        )
        y, height = y + 1, 0
        for panel in row:
            if x + panel.width > COLUMNS:
                x, y = 0, y + height
            height = 4 if panel.kind == "stat" else 8
            panels.append(_panel(panel, {"h": height, "w": panel.width, "x": x, "y": y}))
            x += panel.width
    for number, made in enumerate(panels, 1):
        made["id"] = number
    return {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "tags": ["dcgan"],
        "editable": True,
        "schemaVersion": 36,
        "refresh": "15s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_datasource_variable(), _run_variable(dashboard.runs)]},
        "annotations": {"list": [_alerts()]},
        "panels": panels,
    }


def _panel(panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "color": {"mode": "palette-classic"}}
    if panel.bounds is not None:
        low, high = panel.bounds
        defaults |= {"min": low, "max": high}
    if panel.red_above is not None or panel.red_below is not None:
        steps = [{"color": "green", "value": None}, {"color": "red", "value": panel.red_above}]
        if panel.red_below is not None:
            steps = [{"color": "red", "value": None}, {"color": "green", "value": panel.red_below}]
        defaults["thresholds"] = {"mode": "absolute", "steps": steps}
        if panel.kind == "stat":
            defaults["color"] = {"mode": "thresholds"}
    options: dict[str, Any]
    if panel.kind == "stat":
        options = {"reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}, "graphMode": "none"}
    else:
        options = {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
            "tooltip": {"mode": "multi", "sort": "none"},
        }
        custom: dict[str, Any] = {"fillOpacity": 60 if panel.stacked else 0, "spanNulls": True}
        if panel.stacked:
            custom["stacking"] = {"mode": "normal", "group": "A"}
        if panel.logarithmic:
            custom["scaleDistribution"] = {"type": "log", "log": 10}
        if "thresholds" in defaults:
            custom["thresholdsStyle"] = {"mode": "dashed"}
        defaults["custom"] = custom
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "gridPos": place,
        "datasource": DATASOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": [
            {"refId": chr(ord("A") + number), "datasource": DATASOURCE, "expr": expr, "legendFormat": legend}
            for number, (expr, legend) in enumerate(panel.queries.items())
        ],
    }


def _datasource_variable() -> dict[str, Any]:
    return {"type": "datasource", "name": "datasource", "label": "Prometheus", "query": "prometheus"}


def _run_variable(query: str) -> dict[str, Any]:
    return {
        "type": "query",
        "name": "run",
        "label": "Run",
        "datasource": DATASOURCE,
        "query": {"query": query, "refId": "run"},
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
    }


def _alerts() -> dict[str, Any]:
    return {
        "name": "Alerts",
        "enable": True,
        "iconColor": "red",
        "datasource": DATASOURCE,
        "expr": 'ALERTS{alertstate="firing", run=~"$run"}',
        "titleFormat": "{{alertname}}",
        "textFormat": "{{run}} {{part}}",
    }
