"""The options that several commands of dcgan-eval share, and how they show their numbers."""

from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.common.errors import UsageError

Ckpt = Annotated[str, typer.Option(help="A run, a checkpoint, or a weights file; path or URL.", show_default=False)]
OptionalCkpt = Annotated[str | None, typer.Option(help="A run, a checkpoint, or a weights file; path or URL.")]
Samples = Annotated[str | None, typer.Option(help="Judge these sample shards (dcgan-generate) instead of a --ckpt.")]
Data = Annotated[str, typer.Option(help="Shards of real images; a folder or URL.", show_default=False)]
OptionalData = Annotated[str | None, typer.Option(help="Shards of real images; a folder or URL.")]
Out = Annotated[Path | None, typer.Option(help="Folder of the results; RUN/evaluation when --ckpt is a run.")]
Seed = Annotated[int, typer.Option(help="Decides every random draw.")]


def check_count(value: int) -> int:
    """Refuse counts that make no set."""
    if value < 2:
        raise UsageError(f"--count {value}: expected at least 2 images")
    return value


NUMBERED_SAMPLES = 4_096
"""Samples that a person may name by their index: as many as a contact sheet holds."""

Limit = Annotated[int | None, typer.Option(help="Use the first so many images of --data.", min=1)]
Count = Annotated[int, typer.Option(help="Images a side, or as many as the data set has.", callback=check_count)]


def show(numbers: dict[str, Any], out: Path, name: str) -> None:
    """Print a command's numbers and where they were written."""
    width = max(map(len, numbers), default=0)
    for key, value in numbers.items():
        typer.echo(f"{key:{width}}  {value:.4f}" if isinstance(value, float) else f"{key:{width}}  {value}")
    typer.echo(f"written: {out / name}.json and the pictures beside it")


Classifier = Annotated[
    str | None, typer.Option(help="A classifier.safetensors; else one is trained on --data and kept in --out.")
]
