"""`dcgan-eval swd` and `ms-ssim`: the distances that need no weights, with what makes them readable."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.evaluation import charts, inputs, published
from pipeline.evaluation.images import BLOCK, Images, Pixels, Watched, first, rebatch
from pipeline.evaluation.metrics.ms_ssim import ms_ssim
from pipeline.evaluation.metrics.swd import Sampling, distances, project
from pipeline.evaluation.results import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Chart


def measure_swd(
    out: Path, *, ckpt: str | None, samples: str | None, data: str, count: int, sampling: Sampling
) -> dict[str, float]:
    """Write swd.json and swd.png, and return the numbers."""
    reals, data_description = inputs.reals(data, count)
    fakes, subject = inputs.fakes(ckpt, samples, count, sampling.seed)
    inputs.check_same_shape(fakes, reals, "the samples")
    settings = {**asdict(sampling), "images": fakes.count, "images_real": reals.count}
    result = Result("swd", out, subject, data_description, settings)
    real_side = project(Watched(reals, "SWD, real images"), sampling, real=True)
    numbers = distances(real_side, project(Watched(fakes, "SWD, samples"), sampling, real=False))
    # A perfect generator scores what other real images do. They are half as many, and fewer images score higher:
    # so half of the real images judge as many samples and the other half, and those two numbers are comparable.
    number = min(reals.count // 2, fakes.count)
    judge = project(Watched(Part(reals, 0, 2, number), "SWD, real images, half 1"), sampling, real=True)
    like_samples, like_reals = (
        distances(judge, project(Watched(part, f"SWD, {what}"), sampling, real=False))
        for part, what in ((Part(fakes, 0, 1, number), "as many samples"), (Part(reals, 1, 2, number), "half 2"))
    )
    result.chart(
        _swd_chart(numbers, like_samples, like_reals, number),
        "Sliced Wasserstein distance by level of detail (smaller is nearer)",
    )
    result.write(
        {
            **numbers,
            "samples_against_half": like_samples,
            "real_against_real": like_reals,
            "real_against_real_images": number,
        },
        note=published.SWD_NOTE,
        published=[asdict(figure) for figure in published.SWD] if fakes.shape[0] == 64 else [],
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
    result = Result("ms_ssim", out, subject, settings={"images": fakes.count, "pairs": fakes.count // 2, "seed": seed})
    numbers = {"ms_ssim": ms_ssim(Watched(fakes, "MS-SSIM, samples"))}
    if data is not None:
        reals, result.data = inputs.reals(data, count)
        numbers["ms_ssim_real"] = ms_ssim(Watched(reals, "MS-SSIM, real images"))
    _, first = next(iter(fakes.blocks()))
    result.picture(charts.sheet([("the first pairs of samples, side by side", first[:24])], 12), "The first pairs")
    result.write(
        dict(numbers),
        note=published.MS_SSIM_NOTE,
        published=[asdict(figure) for figure in published.MS_SSIM] if fakes.shape[0] == 64 else [],
    )
    return numbers


class Part:
    """The first `count` of a set's images from `offset` on, every `step`-th of them."""

    def __init__(self, images: Images, offset: int, step: int, count: int) -> None:
        assert BLOCK % step == 0  # so that every block begins at the same place
        assert offset + (count - 1) * step < images.count
        self.images = images
        self.offset = offset
        self.step = step
        self.count = count
        self.shape = images.shape

    def blocks(self, rank: int = 0, size: int = 1) -> Iterator[tuple[int, Pixels]]:
        chosen = rebatch(pixels[self.offset :: self.step] for _, pixels in self.images.blocks())
        return ((block, pixels) for block, pixels in enumerate(first(chosen, self.count)) if block % size == rank)


def _swd_chart(
    numbers: dict[str, float], like_samples: dict[str, float], like_reals: dict[str, float], number: int
) -> "Chart":
    rows = {
        "these samples": numbers,
        f"{number:,} samples, {number:,} real": like_samples,
        f"{number:,} real, {number:,} other real": like_reals,
    }
    levels = [name for name in numbers if name != "swd"]
    if "swd_64" in numbers and len(levels) == 3:
        rows |= {f"DCGAN on {figure.what} (published)": figure.values for figure in published.SWD}
    labels = [f"{level.removeprefix('swd_')} px" for level in levels] + ["mean"]
    values = {name: [row[level] for level in levels] + [row["swd"]] for name, row in rows.items()}
    return charts.bars(labels, values, "SWD × 1000")
