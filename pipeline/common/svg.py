"""Line charts as inline SVG: sharp at any size, in the colors of the page, light or dark."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 440, 250
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 30
POINTS = 400
"""More points than these are averaged: a screen cannot show more, and the page stays small."""


@dataclass(frozen=True)
class Line:
    """One curve: its name in the legend, and its points (x, y); NaN and infinities are left out."""

    name: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


def line_chart(
    lines: Sequence[Line],
    *,
    label: str,
    zero: bool = False,
    until: float | None = None,
    marks: Sequence[tuple[float, str]] = (),
) -> str:
    """Return a chart of `lines` over a shared horizontal axis, or "" when there is no point to draw.

    `label` describes the chart to screen readers. With `zero` the vertical axis begins at 0. The horizontal axis begins
    at 0 and ends at `until`, by default at the last point. `marks` are places on it, and what happened there.
    """
    kept = [Line(line.name, _thin(_finite(line.points)), line.dashed) for line in lines]
    kept = [line for line in kept if line.points]
    if not kept:
        return ""
    xs = [x for line in kept for x, _ in line.points]
    ys = [y for line in kept for _, y in line.points]
    right = max(xs) if until is None else until
    y_ticks = ticks(0.0, max(ys) or 1.0) if zero else ticks(min(ys), max(ys))
    low, high = y_ticks[0], y_ticks[-1]
    x_ticks = [tick for tick in ticks(0, right, 5) if tick <= right]

    def place(x: float, y: float) -> str:
        across = LEFT + (WIDTH - LEFT - RIGHT) * x / (right or 1)
        return f"{across:.1f},{HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - low) / (high - low):.1f}"

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">']
    for tick in y_ticks:
        y = place(0, tick).split(",")[1]
        parts.append(f'<path class="rule" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{float(y) + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    for tick in x_ticks:
        x = place(tick, low).split(",")[0]
        parts.append(f'<text class="tick" x="{x}" y="{HEIGHT - 10}" text-anchor="middle">{short(tick)}</text>')
    for at, what in marks:
        x = place(at, low).split(",")[0]
        parts.append(f'<path class="mark" d="M{x} {TOP}V{HEIGHT - BOTTOM}"><title>{escape(what)}</title></path>')
    for index, line in enumerate(kept):
        style = f"line s{index}" + (" dashed" if line.dashed else "")
        if len(line.points) == 1:
            x, y = place(*line.points[0]).split(",")
            parts.append(f'<circle class="dot s{index}" cx="{x}" cy="{y}" r="3.5"/>')
        else:
            points = " ".join(place(*point) for point in line.points)
            parts.append(f'<polyline class="{style}" points="{points}"/>')
    parts.append("</svg>")
    names = "".join(
        f'<span class="key s{index}{" dashed" if line.dashed else ""}">{escape(line.name)}</span>'
        for index, line in enumerate(kept)
    )
    names += "".join(f'<span class="key mark">{escape(what)}</span>' for what in dict.fromkeys(w for _, w in marks))
    return f'{"".join(parts)}<div class="legend">{names}</div>'


def ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Return round numbers that enclose low and high, about `wanted` of them, in ascending order."""
    low, high = min(low, high), max(low, high)
    if high - low < 1e-12 * max(abs(high), 1e-9):
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def short(value: float) -> str:
    """Return a number in a short form: 1.5M, 20k, 0.25."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}" if abs(value) > 1e-9 else "0"


def _finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Average neighboring points until at most POINTS are left."""
    size = -(-len(points) // POINTS)
    if size <= 1:
        return points
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]
