"""`dcgan-eval report`: one self-contained page about a run. Parts whose files are missing are left out."""

import base64
import io
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from pipeline.common import svg
from pipeline.common.errors import DataError, UsageError
from pipeline.common.imaging import BadImage, open_image, upright
from pipeline.common.records import LARGEST, parse_json
from pipeline.common.storage import Store, write_atomic
from pipeline.evaluation.metrics.collapse import collapses
from pipeline.evaluation.report import curves, sections, verdict
from pipeline.evaluation.results import FOLDER, read_results

LIMIT_BYTES = 5_000_000
STRIP = 6
"""Grids to show, from the beginning to the end of training."""
QUALITIES = ((88, 1400), (75, 1100), (60, 800), (45, 560))
"""WebP quality and largest width of the pictures, tried in turn until the page is small enough."""

MOST_ANIMATED = 1_500_000
"""Bytes of the largest moving picture that the page shows as it is; of others it shows the first frame."""


def write_report(
    run: Path, out: Path, *, results: Path | None = None, bench: Sequence[Path] = (), title: str | None = None
) -> Path:
    """Write the page and return its path.

    Raises DataError when RUN is no run directory or a file in it is damaged, UsageError when RUN is not there.
    """
    if not run.is_dir():
        raise UsageError(f"{run}: no such folder; expected a run directory")
    if not (run / "config.json").is_file() and not (run / "metrics.jsonl").is_file():
        raise DataError(f"{run}: neither config.json nor metrics.jsonl in it; expected a run directory")
    if results is not None and not results.is_dir():
        raise UsageError(f"--results {results}: no such folder")
    for path in bench:
        if not path.is_file():
            raise UsageError(f"--bench {path}: no such file; expected the bench.json of dcgan-export bench")
    folder = results or run / FOLDER
    content = _collect(run, read_results(folder), folder, bench)
    content["title"] = title or f"{run.resolve().name}: what the GAN learned"
    for quality, width in QUALITIES:
        page = _render(content, quality, width)
        if len(page) <= LIMIT_BYTES:
            write_atomic(out, page)
            return out
    raise DataError(f"{out}: the page has {len(page) / 1e6:.1f} MB, over {LIMIT_BYTES / 1e6:.0f} MB: "
                    f"move some results out of {folder}")  # fmt: skip


def _collect(run: Path, read: dict[str, dict[str, Any]], folder: Path, bench: Sequence[Path]) -> dict[str, Any]:
    """Return everything that the template shows, with pictures as paths."""
    config = _read_run(run / "config.json")
    metrics, timing = read_lines(run / "metrics.jsonl"), read_lines(run / "timing.jsonl")
    settings = sections.run_config(config)
    fallen = collapses(metrics, settings.recipe.batch) if settings is not None else []
    store = Store(run)
    names = (name for name in store.names("samples") if re.fullmatch(r"[0-9]{1,15}\.png", name))
    grids = [(int(name[:-4]), run / store.inside(f"samples/{name}")) for name in names]
    return {
        "facts": sections.facts(config, metrics, timing),
        "summary": sections.summary(config, metrics),
        "verdict": verdict.verdict(metrics, read),
        "warning": verdict.fell_apart(metrics, fallen) or verdict.discriminator_wins(metrics),
        "grids": _spread(grids),
        "grid_samples": sections.grid_samples(config),
        "last_grid": grids[-1] if grids else None,
        "charts": curves.charts(metrics, timing, fallen),
        "quality": sections.quality_table(metrics, read),
        "analyses": sections.analyses(read, folder),
        "benches": [sections.bench_table(_read_json(path), path.stem) for path in bench],
        "settings": sections.settings(config),
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


@cache
def _environment() -> Environment:
    """Return the environment that keeps the compiled template."""
    environment = Environment(
        loader=PackageLoader("pipeline.evaluation.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["short"] = svg.short
    return environment


def _render(content: dict[str, Any], quality: int, width: int) -> bytes:
    environment = _environment()
    environment.filters["picture"] = lambda path, most=width: picture(path, quality, min(most, width))
    return environment.get_template("report.html").render(**content).encode()


def picture(path: Path, quality: int, width: int) -> dict[str, Any]:
    """Return {"src": data URL, "width", "height"} of a picture, scaled down to `width` if it is wider.

    Of a film {"film": data URL}.
    """
    data = path.read_bytes()
    if path.suffix == ".mp4":
        return {"film": "data:video/mp4;base64," + base64.b64encode(data).decode()}
    try:
        opened = open_image(data)
        if len(data) <= MOST_ANIMATED and quality > QUALITIES[-1][0] and getattr(opened, "is_animated", False):
            source = f"data:image/{str(opened.format).lower()};base64," + base64.b64encode(data).decode()
            return {"src": source, "width": opened.width, "height": opened.height}
        image = upright(opened, 3)
    except (BadImage, OSError) as error:
        raise DataError(f"{path}: not a readable picture ({error}); remove it or write it again") from None
    if image.width > width:
        image = image.resize((width, round(image.height * width / image.width)), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality, method=4)
    source = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"src": source, "width": image.width, "height": image.height}


def _spread(grids: Sequence[tuple[int, Path]]) -> list[tuple[int, Path]]:
    """Return STRIP of the grids from first to last, denser at the beginning, where samples change fastest."""
    if len(grids) <= STRIP:
        return list(grids)
    places = np.unique(np.round((len(grids) - 1) * np.linspace(0, 1, STRIP) ** 1.7).astype(int))
    return [grids[place] for place in places]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a .jsonl file, or [] if there is none. A last line that a crash cut short is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(errors="replace").splitlines()
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(parse_json(line, str(path), nan=True))
        except DataError:
            if number < len(lines):
                raise DataError(f"{path}: line {number} is not JSON; restore the file or remove the line") from None
    entries = [_numbers(entry) for entry in found if isinstance(entry, dict)]
    return [entry for entry in entries if isinstance(entry.get("images"), int)]


def _numbers(entry: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a line that a chart can show: a diverging run may have written others."""
    numbers = {key: value for key, value in entry.items() if type(value) in (int, float)}
    return {key: value for key, value in numbers.items() if abs(value) <= LARGEST}


def _read_run(path: Path) -> dict[str, Any]:
    """Return config.json, of which `config` and `dataset` are objects if they are there."""
    content = _read_json(path)
    data = content.get("dataset", {})
    images = data.get("images", 1) if isinstance(data, dict) else None
    if not isinstance(content.get("config", {}), dict) or type(images) is not int or not 1 <= images <= LARGEST:
        raise DataError(f"{path}: not what the trainer writes; restore it or remove it")
    return content


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content = parse_json(path.read_bytes(), str(path), hint="restore it or remove it", nan=True)
    return content if isinstance(content, dict) else {"rows": content}
