"""The commands of dcgan-eval that measure the distance between samples and real images."""

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

from pipeline.evaluation.options import (
    EXTRACTORS,
    Count,
    Data,
    ExtractorHash,
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
def swd(
    data: Data,
    ckpt: OptionalCkpt = None,
    samples: Samples = None,
    out: Out = None,
    count: Count = 16_384,
    seed: Seed = 0,
    patches: Annotated[int, typer.Option(help="Patches of an image on every level (published: 128).", min=1)] = 128,
    directions: Annotated[int, typer.Option(help="Random projections (published: 512).", min=1)] = 512,
    pyramid: Annotated[
        Literal["pggan", "mmagic"],
        typer.Option(help="pggan, or mmagic: that of published numbers of DCGAN. Compare each with its own kind."),
    ] = "pggan",
) -> None:
    """Sliced Wasserstein distance between samples and real images, by level of detail (Karras et al. 2018).

    Protocol: as many samples as real images (--count), patches of 7x7 pixels. Comparable with published numbers of
    DCGAN: --pyramid mmagic, 64x64 pixels, 16,384 images, and the patches and directions of the defaults.
    """
    folder = output_folder(out, ckpt)
    from pipeline.evaluation.metrics.patch_metrics import measure_swd
    from pipeline.evaluation.metrics.swd import Sampling

    sampling = Sampling(seed, patches, directions, pyramid)
    numbers = measure_swd(folder, ckpt=ckpt, samples=samples, data=data, count=count, sampling=sampling)
    show(numbers, folder, "swd")


@commands.command()
def ms_ssim(
    ckpt: OptionalCkpt = None,
    samples: Samples = None,
    data: OptionalData = None,
    out: Out = None,
    count: Count = 16_384,
    seed: Seed = 0,
) -> None:
    """MS-SSIM of random pairs: how alike the samples are, and the real images when --data is given.

    Protocol: each image is compared with the next one, at five scales; fewer below 32 pixels. Comparable with
    published numbers: 64x64 pixels, 10,000 images or more.
    """
    folder = output_folder(out, ckpt)
    from pipeline.evaluation.metrics.patch_metrics import measure_ms_ssim

    show(measure_ms_ssim(folder, ckpt=ckpt, samples=samples, data=data, count=count, seed=seed), folder, "ms_ssim")


@commands.command()
def labels(
    data: Data,
    ckpt: OptionalCkpt = None,
    samples: Samples = None,
    label: WantedLabel = "",
    out: Out = None,
    count: Annotated[int, typer.Option(help="Samples of each class.", min=2)] = 500,
    epochs: Annotated[int, typer.Option(help="Passes of the classifier over the real images.", min=1)] = 12,
    seed: Seed = 0,
    extractor: Annotated[str | None, typer.Option(help=f"Also FID by class, by {EXTRACTORS}")] = None,
    extractor_sha256: ExtractorHash = None,
    resize: Resize = None,
) -> None:
    """Whether samples show the class that was wanted, by a classifier trained on real images; SWD and FID by class.

    Protocol: the classifier learns from part of the real images; the others are the control beside the samples. Its
    numbers are comparable with those of the same --data, --epochs and --seed.
    """
    folder = output_folder(out, ckpt)
    network = open_extractor(extractor, extractor_sha256, resize)
    from pipeline.evaluation.metrics.labels import measure_labels

    numbers = measure_labels(
        folder,
        ckpt=ckpt,
        samples=samples,
        data=data,
        label=names_of(label),
        count=count,
        seed=seed,
        epochs=epochs,
        extractor=network,
    )
    show(dict(numbers), folder, "labels")


class Metric(StrEnum):
    """The metrics that need a feature extractor."""

    fid = "fid"
    kid = "kid"
    inception_score = "is"
    precision_recall = "precision-recall"


def _feature_metric(metric: Metric) -> Callable[..., None]:
    """Return the command of one metric; the four share all options."""

    def command(
        data: OptionalData = None,
        ckpt: OptionalCkpt = None,
        samples: Samples = None,
        out: Out = None,
        count: Count = 10_000,
        seed: Seed = 0,
        extractor: Annotated[str, typer.Option(help=EXTRACTORS)] = "fallback",
        extractor_sha256: ExtractorHash = None,
        resize: Resize = None,
        cache: Annotated[
            Path | None, typer.Option(help="Keep the statistics of the real images in this folder.")
        ] = None,
    ) -> None:
        folder = output_folder(out, ckpt)
        from pipeline.evaluation.metrics.feature_metrics import Request, launched_ranks, measure

        request = Request(folder, ckpt, samples, data, count, seed, extractor, extractor_sha256, resize, cache)
        with launched_ranks() as ranks:
            numbers = measure(metric.value, request, ranks)
            if ranks.main:
                show(dict(numbers), folder, metric.value)

    return command


_COMPARABLE = (
    "Comparable with published numbers of the same real images: --extractor inception, no --resize, 50,000 samples "
    "(--count)."
)
for _metric, _help, _protocol in (
    (
        Metric.fid,
        "Fréchet distance between features of samples and real images (Heusel et al. 2017).",
        "images of their own size go to the extractor unless --resize is given; it falls as --count grows.",
    ),
    (
        Metric.kid,
        "Kernel distance (MMD) between features of samples and real images (Binkowski et al. 2018).",
        "the polynomial kernel of degree 3, the mean of 100 subsets of 1,000 images.",
    ),
    (
        Metric.inception_score,
        "Inception score: how clear and how many the classes are (Salimans et al. 2016).",
        "the mean of 10 splits that together hold all samples, and their population deviation.",
    ),
    (
        Metric.precision_recall,
        "Precision, recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020).",
        "spheres to the third neighbor, of density and coverage to the fifth, in the extractor's features.",
    ),
):
    commands.command(_metric.value, help=f"{_help}\n\nProtocol: {_protocol} {_COMPARABLE}")(_feature_metric(_metric))
