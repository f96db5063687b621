"""`dcgan-eval swd` and `ms-ssim`: the metrics that need no weights, measured and compared with published numbers."""

from dataclasses import asdict
from pathlib import Path

from matplotlib.figure import Figure

from pipeline.evaluation import charts, inputs, published
from pipeline.evaluation.device import background, device
from pipeline.evaluation.images import Images, Subset, WithProgress
from pipeline.evaluation.metrics.ms_ssim import DEVIATION, WINDOW, ms_ssim, num_scales
from pipeline.evaluation.metrics.swd import Projections, Sampling, distances, project
from pipeline.evaluation.results import Result


def measure_swd(
    out: Path, *, ckpt: str | None, samples: str | None, data: str, count: int, sampling: Sampling
) -> dict[str, float]:
    """Write swd.json and swd.png, and return the numbers."""
    fakes, subject = inputs.fakes(ckpt, samples, count, sampling.seed)
    reals, data_description = inputs.reals(data, count, fakes.shape)
    inputs.check_same_shape(fakes, reals)
    settings = {**asdict(sampling), "images": fakes.count, "images_real": reals.count, **background(fakes.shape)}
    result = Result("swd", out, subject, data_description, settings)
    size = (fakes.shape[0], fakes.shape[1])
    smaller = min(fakes.count, reals.count)
    obstacle = published.why_not_comparable(sampling.pyramid, sampling.patches, sampling.directions, size, smaller)
    result.protocol = {
        **inputs.preparations(subject, data_description),
        **{name: value for name, value in asdict(sampling).items() if name != "seed"},
        "images": fakes.count,
        "images_real": reals.count,
        "comparable": not obstacle,
        "why_not": obstacle or None,
    }
    beside = size == (64, 64) and sampling.pyramid == published.SWD_PYRAMID

    def side(images: Images, what: str, *, real: bool = False) -> Projections:
        return project(WithProgress(images, f"SWD, {what}"), sampling, real=real, device=device())

    numbers = distances(side(reals, "real images", real=True), side(fakes, "samples"))
    # A perfect generator scores what other real images score, and smaller sets score higher. So as many samples and
    # as many real images are compared with one half of the real images: these two numbers are comparable.
    number = min(reals.count // 2, fakes.count)
    half = side(Subset(reals, 0, 2, number), "real images, half 1", real=True)
    others = Subset(fakes, 0, 1, number), Subset(reals, 1, 2, number)
    like_samples, like_reals = (
        distances(half, side(other, what))
        for other, what in zip(others, ("as many samples", "real images, half 2"), strict=True)
    )
    result.chart(
        _swd_chart(numbers, like_samples, like_reals, number, beside=beside),
        f"{sampling.pyramid}: sliced Wasserstein distance by level of detail (smaller is nearer)",
    )
    result.write(
        {
            **numbers,
            "samples_against_half": like_samples,
            "real_against_real": like_reals,
            "real_against_real_images": number,
        },
        note=f"Not comparable with published numbers: {obstacle}. {published.SWD_NOTE}"
        if obstacle
        else f"Comparable with published numbers of the same data set and crop. {published.SWD_NOTE}",
        published=[asdict(entry) for entry in published.SWD] if beside else [],
    )
    return {
        **numbers,
        f"swd of {number:,} samples to {number:,} real images": like_samples["swd"],
        f"swd of {number:,} real images to as many others": like_reals["swd"],
    }


def measure_ms_ssim(
    out: Path, *, ckpt: str | None, samples: str | None, data: str | None, count: int, seed: int
) -> dict[str, float]:
    """Write ms_ssim.json and ms_ssim.png (the first pairs), and return the numbers."""
    fakes, subject = inputs.fakes(ckpt, samples, count, seed)
    settings = {"images": fakes.count, "pairs": fakes.count // 2, "seed": seed, **background(fakes.shape)}
    result = Result("ms_ssim", out, subject, settings=settings)
    numbers = {"ms_ssim": ms_ssim(WithProgress(fakes, "MS-SSIM, samples"), device=device())}
    if data is not None:
        reals, result.data = inputs.reals(data, count, fakes.shape)
        numbers["ms_ssim_real"] = ms_ssim(WithProgress(reals, "MS-SSIM, real images"), device=device())
    size = (fakes.shape[0], fakes.shape[1])
    obstacle = published.why_not_comparable_ms_ssim(size, fakes.count)
    result.protocol = {
        **inputs.preparations(subject, result.data),
        "images": fakes.count,
        "images_real": None if result.data is None else result.data["used"],
        "pairs": "each image with the next one",
        "scales": num_scales(*fakes.shape[:2]),
        "window": f"{WINDOW} pixels, deviation {DEVIATION}",
        "comparable": not obstacle,
        "why_not": obstacle or None,
    }
    _, first = next(iter(fakes.blocks()))
    result.picture(charts.sheet([("the first pairs of samples, side by side", first[:24])], 12), "The first pairs")
    result.write(
        dict(numbers),
        note=published.MS_SSIM_NOTE,
        published=[asdict(entry) for entry in published.MS_SSIM] if size == (64, 64) else [],
    )
    return numbers


def _swd_chart(
    numbers: dict[str, float],
    like_samples: dict[str, float],
    like_reals: dict[str, float],
    number: int,
    *,
    beside: bool,
) -> Figure:
    """Draw the distances by level, published ones `beside` them."""
    rows = {
        "these samples": numbers,
        f"{number:,} samples, {number:,} real": like_samples,
        f"{number:,} real, {number:,} other real": like_reals,
    }
    levels = [name for name in numbers if name != "swd"]
    if beside:
        rows |= {f"DCGAN on {entry.what} (published)": entry.values for entry in published.SWD}
    labels = [f"{level.removeprefix('swd_')} px" for level in levels] + ["mean"]
    values = {name: [row[level] for level in levels] + [row["swd"]] for name, row in rows.items()}
    return charts.bars(labels, values, "SWD × 1000")
