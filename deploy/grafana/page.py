"""Draws the dashboards as a web page without Grafana, from the same JSON files and the same Prometheus."""

import json
import math
import time
from datetime import timedelta
from html import escape
from pathlib import Path
from typing import Any, Protocol

from deploy.grafana.dashboards import DASHBOARDS, FOLDER
from pipeline.common.svg import Line, line_chart, short

REFRESH_SECONDS = 5
POINTS = 200

STYLE = """
:root { color-scheme: light dark; --ink: #1c1f24; --soft: #667; --rule: #8884; --card: #fff; --page: #f1f2f5;
  --s0: #2563c9; --s1: #d9731a; --s2: #2a9152; --s3: #b8348b; --s4: #7a5cc8; --s5: #8a8f16; --bad: #c8281e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ec; --soft: #9aa; --card: #1d2026; --page: #121418;
  --s0: #6ea2f5; --s1: #f0a15a; --s2: #63c487; --s3: #e583c4; --s4: #ab94ec; --s5: #c9ce5c; --bad: #ff6f64; } }
body { margin: 0 auto; padding: 16px; max-width: 1500px; background: var(--page); color: var(--ink);
  font: 14px/1.4 system-ui, sans-serif; }
nav a { margin-right: 16px; color: var(--s0); }
h2 { font-size: 16px; margin: 20px 0 8px; }
.row { display: grid; grid-template-columns: repeat(24, 1fr); gap: 10px; }
.panel { background: var(--card); border-radius: 6px; padding: 8px 10px; min-width: 0; }
.panel h3 { font-size: 13px; font-weight: 600; margin: 0; }
.panel p { font-size: 12px; color: var(--soft); margin: 0; }
.number { font-size: 28px; font-variant-numeric: tabular-nums; }
.bad { color: var(--bad); }
.legend { font-size: 12px; }
.key { margin-right: 12px; }
.key::before { content: "\\25ac  "; color: var(--c); }
svg { width: 100%; height: auto; }
.rule { stroke: var(--rule); } .tick { fill: var(--soft); font-size: 11px; }
.line { fill: none; stroke: var(--c); stroke-width: 1.6; } .dot { fill: var(--c); }
""" + "".join(f".s{number} {{ --c: var(--s{number % 6}); }}\n" for number in range(24))


class Prometheus(Protocol):
    """The part of deploy.prometheus.servers.Monitoring that the page uses."""

    def query(self, expr: str) -> Any:
        """Return the series of an expression now."""
        ...

    def query_range(self, expr: str, start: float, end: float, step: float) -> Any:
        """Return the series of an expression over time."""
        ...


def fill_in(expr: str, *, scrape_seconds: float) -> str:
    """Return an expression as Grafana sends it: for all runs, with the interval of rates filled in."""
    return expr.replace("$__rate_interval", f"{max(4 * scrape_seconds, 1):.0f}s").replace("$run", ".*")


def render(name: str, prometheus: Prometheus, *, scrape_seconds: float, window_seconds: float) -> str:
    """Return a dashboard (a key of DASHBOARDS) as an HTML page with the last `window_seconds`."""
    dashboard = json.loads((Path(FOLDER) / name).read_text())
    end = time.time()
    shown = (end - window_seconds, end, scrape_seconds)
    body: list[str] = []
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            body.append(f'{"</div>" if body else ""}<h2>{escape(panel["title"])}</h2><div class="row">')
        else:
            body.append(_panel(panel, prometheus, *shown))
    links = " ".join(f'<a href="/{key}">{escape(each.title)}</a>' for key, each in DASHBOARDS.items())
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="{REFRESH_SECONDS}">
<title>{escape(dashboard["title"])}</title><style>{STYLE}</style>
<nav>{links} <span>The last {window_seconds / 60:.0f} minutes; time axes are in minutes.</span></nav>
<main>{"".join(body)}</div></main></html>"""


def _panel(panel: dict[str, Any], prometheus: Prometheus, start: float, end: float, scrape_seconds: float) -> str:
    place, defaults = panel["gridPos"], panel["fieldConfig"]["defaults"]
    scale, unit = {"percentunit": (100.0, "%"), "s": (1.0, "s"), "bytes": (1.0, "B"), "Bps": (1.0, "B/s")}.get(
        defaults["unit"], (1.0, "")
    )
    if panel["type"] == "stat":
        content = _number(panel, prometheus, scrape_seconds, scale, unit)
    else:
        step = max((end - start) / POINTS, scrape_seconds)
        lines = []
        for target in panel["targets"]:
            for series in prometheus.query_range(
                fill_in(target["expr"], scrape_seconds=scrape_seconds), start, end, step
            ):
                legend = _legend(target["legendFormat"], series.labels)
                lines.append(Line(legend, [((at - start) / 60, scale * value) for at, value in series.points]))
        content = line_chart(lines, label=panel["title"], zero=True, until=(end - start) / 60) or "<p>no data yet</p>"
    title = panel["title"] + (f" ({unit})" if unit else "")
    about = f"<p>{escape(panel['description'])}</p>" if panel["description"] else ""
    return f'<div class="panel" style="grid-column: span {place["w"]}"><h3>{escape(title)}</h3>{about}{content}</div>'


def _number(panel: dict[str, Any], prometheus: Prometheus, scrape_seconds: float, scale: float, unit: str) -> str:
    found = prometheus.query(fill_in(panel["targets"][0]["expr"], scrape_seconds=scrape_seconds))
    value = found[0].points[-1][1] if found else math.nan
    if not math.isfinite(value):
        return '<div class="number">–</div>'
    steps = panel["fieldConfig"]["defaults"].get("thresholds", {"steps": []})["steps"]
    bad = any(step["color"] == "red" and step["value"] is not None and value >= step["value"] for step in steps)
    text = str(timedelta(seconds=round(value))) if unit == "s" else f"{short(scale * value)} {unit}"
    return f'<div class="number{" bad" if bad else ""}">{text}</div>'


def _legend(pattern: str, labels: dict[str, str]) -> str:
    for key, value in labels.items():
        pattern = pattern.replace(f"{{{{{key}}}}}", value)
    return pattern
