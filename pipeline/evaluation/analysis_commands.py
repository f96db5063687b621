"""The commands of dcgan-eval that analyze a generator and its discriminator, mostly as the paper does."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pipeline.common.errors import UsageError
from pipeline.evaluation.options import (
    NUMBERED_SAMPLES,
    Ckpt,
    ClassifierFile,
    Count,
    Data,
    ExtractorHash,
    Labels,
    Limit,
    NeighborExtractor,
    OfLabel,
    OptionalCkpt,
    OptionalData,
    Out,
    Resize,
    Samples,
    Seed,
    WantedLabel,
    names_of,
    open_extractor,
    show,
)
from pipeline.evaluation.results import output_folder

commands = typer.Typer()


@commands.command()
def classifier(
    data: Annotated[str, typer.Option(help="Labeled shards; a folder or URL.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder for the results.", show_default=False)],
    seed: Seed = 0,
    epochs: Annotated[int, typer.Option(help="Passes over the data.", min=1)] = 12,
) -> None:
    """Train the attribute classifier on labeled images, and report its accuracy on held-out ones."""
    folder = output_folder(out, None)
    from pipeline.evaluation.classifier_training import make_classifier
    from pipeline.evaluation.inputs import data_set

    heads = make_classifier(data_set(data), folder, seed=seed, epochs=epochs).heads
    scores = {name: head.score for name, head in heads.items()}
    show(scores, folder, "classifier")


@commands.command()
def probe(
    ckpt: Ckpt,
    data: Data,
    label: Annotated[str, typer.Option(help="The label to predict.", show_default=False)],
    test_data: Annotated[
        str | None, typer.Option(help="Shards to test on; by default the last fifth of --data.")
    ] = None,
    labels: Annotated[
        int | None,
        typer.Option(help="Class-balanced labels of a draw (SVHN: 1000); by default all labels, once.", min=2),
    ] = None,
    draws: Annotated[int, typer.Option(help="Number of draws.", min=1)] = 100,
    control: Annotated[
        int,
        typer.Option(
            help="Also train a supervised CNN so many times, each with other settings (the paper: 64).", min=0
        ),
    ] = 0,
    limit: Limit = None,
    out: Out = None,
    seed: Seed = 0,
) -> None:
    """Linear SVM on the discriminator's features, on raw pixels and on an untrained D (section 5).

    Protocol: all maps of D, max-pooled to 4x4, with BatchNorm statistics of real images. C is chosen on a fifth of
    the training images; the result is the mean over --draws.
    """
    folder = output_folder(out, ckpt)
    from pipeline.evaluation.paper.probing.probe import Protocol, run_probe

    protocol = Protocol(labels, draws, seed, control)
    numbers = run_probe(folder, ckpt=ckpt, data=data, label=label, test_data=test_data, limit=limit, protocol=protocol)
    show(dict(numbers), folder, "probe")


@commands.command()
def nearest_class(
    data: Data,
    ckpt: OptionalCkpt = None,
    samples: Samples = None,
    test_data: Annotated[
        str | None, typer.Option(help="Real images to classify; by default the last fifth of --data.")
    ] = None,
    label: WantedLabel = "",
    count: Annotated[int, typer.Option(help="Samples of all classes together (the paper: 50,000).", min=1)] = 50_000,
    limit: Limit = None,
    out: Out = None,
    seed: Seed = 0,
) -> None:
    """Classify real images by the class of their nearest sample (the supplement's Table 3), and by real ones.

    Protocol: Euclidean distance of pixels. The paper's numbers are of MNIST, by 50,000 and 10 million samples.
    """
    folder = output_folder(out, ckpt)
    from pipeline.evaluation.paper.nearest_class import run_nearest_class

    numbers = run_nearest_class(
        folder,
        ckpt=ckpt,
        samples=samples,
        data=data,
        test_data=test_data,
        label=names_of(label),
        count=count,
        limit=limit,
        seed=seed,
    )
    show(dict(numbers), folder, "nearest-class")


@commands.command()
def interpolate(
    ckpt: Ckpt,
    out: Out = None,
    rows: Annotated[int, typer.Option(help="Number of walks.", min=1)] = 10,
    steps: Annotated[int, typer.Option(help="Images in a walk.", min=2)] = 9,
    label: Labels = None,
    seed: Seed = 0,
) -> None:
    """Walk between random z, on straight lines and along the sphere (Figure 4), and between classes at one z."""
    folder = output_folder(out, ckpt)
    from pipeline.evaluation.paper.interpolate import run_interpolate

    numbers = run_interpolate(folder, ckpt=ckpt, rows=rows, steps=steps, seed=seed, label=label)
    show({f"unevenness, {name}": value for name, value in numbers.items()}, folder, "interpolate")


class Animated(StrEnum):
    """Formats of moving pictures."""

    webp = "webp"
    gif = "gif"
    mp4 = "mp4"


FramesPerSecond = Annotated[float, typer.Option("--fps", help="Frames a second.", min=0.1, max=60)]
Moving = Annotated[
    Animated, typer.Option(help="webp: small, in all colors; gif: shown everywhere; mp4: for video tools.")
]


@commands.command()
def walk(
    ckpt: Ckpt,
    out: Out = None,
    format: Moving = Animated.webp,
    rows: Annotated[int, typer.Option(help="Rows of walks in a frame.", min=1, max=32)] = 2,
    columns: Annotated[int, typer.Option(help="Walks in a row.", min=1, max=32)] = 4,
    stops: Annotated[int, typer.Option(help="Random z of a walk.", min=2)] = 4,
    steps: Annotated[int, typer.Option(help="Frames from one z to the next.", min=1)] = 12,
    fps: FramesPerSecond = 12,
    scale: Annotated[int, typer.Option(help="Enlarge the images so many times.", min=1, max=8)] = 2,
    label: Labels = None,
    seed: Seed = 0,
) -> None:
    """Write an animation: walks along the sphere through random z, without an end (as Figure 4, moving)."""
    folder = output_folder(out, ckpt)
    from pipeline.evaluation.animation import run_walk

    numbers = run_walk(
        folder,
        ckpt=ckpt,
        format=format.value,
        rows=rows,
        columns=columns,
        stops=stops,
        steps=steps,
        frames_per_second=fps,
        scale=scale,
        seed=seed,
        label=label,
    )
    show(dict(numbers), folder, "walk")


@commands.command()
def progress(
    run: Annotated[Path, typer.Argument(help="A run directory.", show_default=False)],
    out: Out = None,
    format: Moving = Animated.webp,
    fps: FramesPerSecond = 3,
) -> None:
    """Write an animation of the same 64 samples over the training of a run."""
    folder = output_folder(out, str(run))
    from pipeline.evaluation.animation import run_progress

    show(dict(run_progress(folder, run=run, format=format.value, frames_per_second=fps)), folder, "progress")


@commands.command()
def arithmetic(
    ckpt: Ckpt,
    expression: Annotated[
        str, typer.Option(help="Terms joined by + and -, each of attributes (a & !b) or of indices (#3,7,9).")
    ] = "male & eyeglasses - male & !eyeglasses + !male & !eyeglasses",
    classifier: ClassifierFile = None,
    data: OptionalData = None,
    trials: Annotated[int, typer.Option(help="Number of draws of exemplars.", min=1)] = 200,
    sheet: Annotated[
        int | None,
        typer.Option(help="Only write a contact sheet with this many numbered samples.", min=1, max=NUMBERED_SAMPLES),
    ] = None,
    label: OfLabel = None,
    out: Out = None,
    seed: Seed = 0,
) -> None:
    """Man with glasses - man + woman: add averaged exemplars, and measure how often it works (Figure 7)."""
    folder = output_folder(out, ckpt)
    from pipeline.evaluation.paper.arithmetic import run_arithmetic, write_contact_sheet

    if sheet is not None:
        written = write_contact_sheet(folder, ckpt=ckpt, count=sheet, seed=seed, label=label)
        typer.echo(f"written: {written.with_suffix('.png')}; give indices as --expression '#3,7,9 - #1,2,4 + #5,6,8'")
        return
    numbers = run_arithmetic(
        folder,
        ckpt=ckpt,
        expression=expression,
        classifier_file=classifier,
        data=data,
        trials=trials,
        seed=seed,
        label=label,
    )
    show(dict(numbers), folder, "arithmetic")


@commands.command()
def turn(
    ckpt: Ckpt,
    attribute: Annotated[str, typer.Option(help="An attribute that the classifier predicts.")] = "yaw",
    classifier: ClassifierFile = None,
    data: OptionalData = None,
    rows: Annotated[int, typer.Option(help="Samples to show.", min=1)] = 8,
    steps: Annotated[int, typer.Option(help="Steps from one extreme to the other.", min=2)] = 9,
    extreme: Annotated[int, typer.Option(help="Samples to average at each extreme.", min=1)] = 64,
    label: OfLabel = None,
    out: Out = None,
    seed: Seed = 0,
) -> None:
    """Turn samples along the vector between the extremes of an attribute (Figure 8)."""
    folder = output_folder(out, ckpt)
    from pipeline.evaluation.paper.turn import run_turn

    numbers = run_turn(
        folder,
        ckpt=ckpt,
        attribute=attribute,
        classifier_file=classifier,
        data=data,
        rows=rows,
        steps=steps,
        extreme=extreme,
        seed=seed,
        label=label,
    )
    show(dict(numbers), folder, "turn")


@commands.command()
def neighbors(
    ckpt: Ckpt,
    data: Data,
    count: Count = 36,
    limit: Limit = None,
    out: Out = None,
    seed: Seed = 0,
    extractor: NeighborExtractor = None,
    extractor_sha256: ExtractorHash = None,
    resize: Resize = None,
) -> None:
    """Show the nearest real images of samples, by pixels, by the discriminator's features and by an extractor's.

    Protocol: root mean square difference of pixels, in gray levels; of an extractor's features the cosine distance.
    Real images among themselves are the control, and copies that are planted say what each search sees.
    """
    folder = output_folder(out, ckpt)
    network = open_extractor(extractor, extractor_sha256, resize)
    from pipeline.evaluation.paper.neighbors import run_neighbors

    numbers = run_neighbors(folder, ckpt=ckpt, data=data, count=count, limit=limit, seed=seed, extractor=network)
    show(dict(numbers), folder, "neighbors")


@commands.command()
def memorization(
    ckpt: Ckpt,
    data: Data,
    held_out: Annotated[str | None, typer.Option(help="Shards that the run was not trained on.")] = None,
    most: Annotated[
        int, typer.Option(help="Number of samples; 1,000, 10,000 and 100,000 are measured on the way.", min=100)
    ] = 10_000,
    limit: Limit = None,
    out: Out = None,
    seed: Seed = 0,
    extractor: NeighborExtractor = None,
    extractor_sha256: ExtractorHash = None,
    resize: Resize = None,
) -> None:
    """Learned or memorized: distances to held-out images, hash collisions, smooth walks (sections 3, 6.1).

    Protocol: distances of up to 1,000 real images to --most samples, in gray levels; the 128-bit hashes of 4,096
    samples; 64 walks. With --extractor, what is nearest to 1,000 samples by its features (cosine distance).
    """
    folder = output_folder(out, ckpt)
    network = open_extractor(extractor, extractor_sha256, resize)
    from pipeline.evaluation.paper.memorization import run_memorization

    numbers = run_memorization(
        folder, ckpt=ckpt, data=data, held_out=held_out, most=most, limit=limit, seed=seed, extractor=network
    )
    show(numbers, folder, "memorization")


@commands.command()
def features(
    ckpt: Ckpt,
    data: Data,
    layer: Annotated[
        int | None, typer.Option(help="Layer of the discriminator, counted from 1; by default its last.", min=1)
    ] = None,
    units: Annotated[int, typer.Option(help="Units to show.", min=1)] = 6,
    images_each: Annotated[int, typer.Option(help="Images for each unit.", min=1)] = 8,
    out: Out = None,
    seed: Seed = 0,
) -> None:
    """Show what excites the discriminator's units, by guided backpropagation and gradient ascent (Figure 5)."""
    folder = output_folder(out, ckpt)
    from pipeline.evaluation.paper.features import run_features

    numbers = run_features(folder, ckpt=ckpt, data=data, layer=layer, units=units, images_each=images_each, seed=seed)
    show({f"selectivity, {name}": value for name, value in numbers.items()}, folder, "features")


@commands.command()
def forget(
    ckpt: Ckpt,
    boxes: Annotated[
        Path | None, typer.Option(help="CSV of the object in samples: index,left,top,right,bottom.")
    ] = None,
    attribute: Annotated[
        str | None, typer.Option(help="The object: an attribute that the classifier predicts.")
    ] = None,
    region: Annotated[
        str | None, typer.Option(help="Where the object is in every sample: left,top,right,bottom.")
    ] = None,
    classifier: ClassifierFile = None,
    data: OptionalData = None,
    samples: Annotated[int, typer.Option(help="Samples to search for --attribute.", min=8)] = 512,
    strength: Annotated[float, typer.Option(help="1 drops the maps, 0.5 halves them.", min=0, max=2)] = 1.0,
    layer: Annotated[
        int, typer.Option(help="Whose maps: 1 are those that make the image, 2 those before them, the paper's.", min=1)
    ] = 2,
    label: OfLabel = None,
    out: Out = None,
    seed: Seed = 0,
) -> None:
    """Drop the feature maps of G that draw an object, and measure what is left (Figure 6)."""
    folder = output_folder(out, ckpt)
    from pipeline.evaluation.paper.forget import run_forget

    numbers = run_forget(
        folder,
        ckpt=ckpt,
        boxes=boxes,
        attribute=attribute,
        region=_region(region),
        classifier_file=classifier,
        data=data,
        samples=samples,
        strength=strength,
        layer=layer,
        seed=seed,
        label=label,
    )
    show(dict(numbers), folder, "forget")


def _region(text: str | None) -> tuple[int, int, int, int] | None:
    if text is None:
        return None
    parts = text.split(",")
    if len(parts) != 4 or not all(part.strip().isdigit() for part in parts):
        raise UsageError(f"--region {text}: expected four whole numbers, left,top,right,bottom, such as 12,22,52,36")
    left, top, right, bottom = map(int, parts)
    if not (left < right and top < bottom):
        raise UsageError(f"--region {text}: left must be below right, and top below bottom")
    return left, top, right, bottom
