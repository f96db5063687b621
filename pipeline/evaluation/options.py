"""The options that several commands of dcgan-eval share, and how their numbers are printed."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.common.errors import UsageError
from pipeline.evaluation.results import how_measured

if TYPE_CHECKING:
    from pipeline.evaluation.metrics.extractors import Extractor

Ckpt = Annotated[str, typer.Option(help="A run, a checkpoint, or a weights file; path or URL.", show_default=False)]
OptionalCkpt = Annotated[str | None, typer.Option(help="A run, a checkpoint, or a weights file; path or URL.")]
FORMS = "tars, or pictures in a folder, zip, .npz, parquet or another form that dcgan-data build recognizes"
Samples = Annotated[
    str | None,
    typer.Option(help=f"Evaluate these samples, not a --ckpt: dcgan-generate's, or anyone's {FORMS}."),
]
REAL_IMAGES = f"Real images: a data set, or anyone's {FORMS}; path or URL."
Data = Annotated[str, typer.Option(help=REAL_IMAGES, show_default=False)]
OptionalData = Annotated[str | None, typer.Option(help=REAL_IMAGES)]
ClassifierFile = Annotated[
    str | None, typer.Option(help="A classifier.safetensors; by default one is trained on --data and kept in --out.")
]
Out = Annotated[Path | None, typer.Option(help="Folder for the results; RUN/evaluation when --ckpt is a run.")]
Seed = Annotated[int, typer.Option(help="Seed of every random draw.")]


def check_count(value: int) -> int:
    """Raise UsageError for a --count below 2."""
    if value < 2:
        raise UsageError(f"--count {value}: expected at least 2 images")
    return value


NUMBERED_SAMPLES = 4_096
"""Samples that a user can name by index; a contact sheet holds as many."""

Limit = Annotated[int | None, typer.Option(help="Use only the first images of --data, this many.", min=1)]
Count = Annotated[
    int, typer.Option(help="Samples, and as many real images; fewer if the data set has fewer.", callback=check_count)
]
WantedLabel = Annotated[
    str, typer.Option(help="NAME or NAME,NAME: what --samples of others were made to show.", show_default=False)
]

OfLabel = Annotated[
    str | None,
    typer.Option(
        "--label",
        help="Of a conditional --ckpt: the class of all samples, such as 7 or male+eyeglasses.",
        show_default=False,
    ),
]
Labels = Annotated[
    str | None,
    typer.Option(
        "--label", help="Classes of a conditional --ckpt to walk in or between, such as 3,5,8; by default all."
    ),
]


EXTRACTORS = (
    "inception (that of published numbers; 96 MB, fetched once), fallback, or path or URL of a .pt (TorchScript), "
    ".onnx or classifier.safetensors."
)
ExtractorHash = Annotated[str | None, typer.Option(help="SHA-256 of the extractor; required for a URL.")]
Resize = Annotated[int | None, typer.Option(help="Resize images to this many pixels for the extractor.", min=1)]
NeighborExtractor = Annotated[
    str | None, typer.Option("--extractor", help=f"Also nearest by the features of this network: {EXTRACTORS}")
]


def open_extractor(extractor: str | None, sha256: str | None, resize: int | None) -> "Extractor | None":
    """Return the extractor that an optional --extractor names. Raises UsageError for options of one without it."""
    if extractor is None:
        if not (sha256 is None and resize is None):
            raise UsageError("--extractor-sha256 and --resize are of an --extractor, and none is named")
        return None
    from pipeline.evaluation.metrics.extractors import load_extractor

    return load_extractor(extractor, sha256, resize=resize)


def names_of(label: str) -> list[str]:
    """Return the names in a comma-separated list."""
    return [name.strip() for name in label.split(",") if name.strip()]


def show(numbers: dict[str, Any], out: Path, name: str) -> None:
    """Print the numbers of a command, how they were measured, and the path that they were written to."""
    width = max(map(len, numbers), default=0)
    for key, value in numbers.items():
        typer.echo(f"{key:{width}}  {value:.4f}" if isinstance(value, float) else f"{key:{width}}  {value}")
    if protocol := how_measured(out / f"{name}.json"):  # animations measure nothing
        typer.echo(f"measured with: {protocol}")
    typer.echo(f"written: {out / name}.json and the pictures beside it")
