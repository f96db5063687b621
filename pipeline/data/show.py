"""`dcgan-data show`: a data set's numbers and a contact sheet."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from pipeline.common.errors import UsageError, escaped, one_line
from pipeline.common.imaging import grid, save_png
from pipeline.config import class_titles
from pipeline.data.classes import read_classes
from pipeline.data.dataset import Dataset
from pipeline.data.shard_reader import Columns, iterate, tar_columns

LABEL_IMAGES = 5_000
"""Labels are summarized over this many images: those that `iterate` takes, which stand for all."""


def show(dataset: Dataset, sheet: Path | None, images: int, label: tuple[str, ...] = ()) -> None:
    """Print the numbers, and write a contact sheet of the first `images` to `sheet`. Raises UserError.

    With `label`, also count the images of each class that a network conditioned on it has.

    The default of `sheet` is sheet.png in the data set's folder; one at a URL has no default.
    """
    if sheet is None and dataset.store.remote:
        raise UsageError(f"{dataset.location}: a URL has no default for the contact sheet; name its path with --out")
    sheet = sheet or Path(dataset.location) / "sheet.png"
    counted = read_classes(dataset, label, "--label") if label else None
    batches: list[Any] = []
    columns: Columns = {}
    seen = 0
    if dataset.index is not None:
        batches = list(iterate(dataset, limit=images))
        columns = tar_columns(dataset, dataset.columns.spread(LABEL_IMAGES))
        seen = len(columns["key"])
    else:
        for batch, labels in iterate(dataset, labels=True, limit=max(images, LABEL_IMAGES if dataset.labels else 0)):
            if seen < images:
                batches.append(batch[: images - seen])
            for name, values in labels.items():
                columns.setdefault(name, []).extend(values)
            seen += len(batch)
    table = Table(show_header=False, box=None)
    table.add_row("images", f"{dataset.images:,} of {dataset.in_words}, {dataset.encoding}")
    table.add_row("shards", f"{len(dataset.shards):,}, {dataset.bytes / 1e6:,.1f} MB")
    source = ", ".join(f"{k}={v}" for k, v in dataset.source.items() if v not in (None, [], "") and k != "sizes")
    table.add_row("source", one_line(source))
    table.add_row("left out", one_line(f"{dataset.refused.count:,} {dataset.refused.reasons or ''}"))
    table.add_row("fingerprint", dataset.fingerprint())
    for name, kind in dataset.labels.items():
        table.add_row(escaped(f"label {name}"), escaped(f"{kind}: {summary(columns[name], kind)}"))
    if dataset.labels and seen < dataset.images:
        table.add_row("", f"(labels: {seen:,} of the images)")
    if counted is not None:
        titles = class_titles(label, counted.names)
        table.add_row(escaped(f"classes of {','.join(label)}"), f"{len(titles):,}")
        for title, number in zip(titles, counted.images, strict=True):
            table.add_row("", escaped(f"{title}: {number:,} ({number / dataset.images:.1%})"))
    Console(markup=False, emoji=False).print(table)
    width = max(1, int(np.ceil(np.sqrt(images * 1.5))))
    save_png(sheet, grid(np.concatenate(batches), width))
    print(f"contact sheet: {sheet}")


def summary(values: list[Any], kind: str) -> str:
    """Return one line about a label's values."""
    present = [value for value in values if value is not None]
    gaps = f", {len(values) - len(present):,} without" if len(present) < len(values) else ""
    if not present:
        return "no values"
    if kind == "bool":
        return f"{np.mean(present):.1%} true{gaps}"
    common = Counter(present).most_common()
    if kind == "str" or (kind == "int" and len(common) <= 20):
        shown = f"{len(common)} classes: " + ", ".join(f"{value} {count:,}" for value, count in common[:10])
        return f"{shown}{f' and {len(common) - 10:,} more' if len(common) > 10 else ''}{gaps}"
    return f"{min(present):.4g} to {max(present):.4g}, mean {np.mean(present):.4g}{gaps}"
