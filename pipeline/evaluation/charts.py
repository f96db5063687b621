"""Charts and captioned sheets of images, in one style."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.common.imaging import Pixels, labeled_sheet

COLORS = ("#2563eb", "#94a3b8", "#d97706", "#0d9488", "#be185d", "#7c3aed")


def axes(width: float = 7.0, height: float = 3.6) -> tuple[Figure, Axes]:
    """Return an empty chart of `width` by `height` inches and its axes."""
    chart = Figure(figsize=(width, height), layout="constrained")
    area = chart.add_subplot()
    area.spines[["top", "right"]].set_visible(False)
    area.grid(axis="y", color="#e2e8f0", linewidth=0.8)
    area.set_axisbelow(True)
    return chart, area


def bars(labels: Sequence[str], values: Mapping[str, Sequence[float]], unit: str) -> Figure:
    """Return grouped bars: a group for each label, a color for each row of `values`, a number on each bar."""
    chart, area = axes(max(6.0, 0.42 * len(labels) * (len(values) + 1)))
    width = 0.82 / len(values)
    for index, (name, row) in enumerate(values.items()):
        places = [position + (index - (len(values) - 1) / 2) * width for position in range(len(labels))]
        drawn = area.bar(places, row, width * 0.94, label=name, color=COLORS[index % len(COLORS)])
        area.bar_label(drawn, fmt="%.3g", fontsize=7, padding=1)
    area.set_xticks(range(len(labels)), labels)
    area.set_ylabel(unit)
    if len(values) > 1:
        area.legend(frameon=False, fontsize=8)
    return chart


def sheet(rows: Sequence[tuple[str, Pixels]], columns: int, scale: int = 2) -> Pixels:
    """Return rows of (caption, uint8 (N, H, W, C)) as one RGB picture, enlarged `scale` times to be seen easily."""
    enlarged = [(caption, images.repeat(scale, 1).repeat(scale, 2)) for caption, images in rows]
    return labeled_sheet(enlarged, columns)
