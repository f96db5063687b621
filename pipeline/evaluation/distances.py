"""`dcgan-eval swd` and `ms-ssim`: the distances that need no weights, with what makes them readable."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.evaluation import charts, published, subjects
from pipeline.evaluation.images import Images, Pixels, Watched, rebatch
from pipeline.evaluation.ms_ssim import ms_ssim
from pipeline.evaluation.results import Result
from pipeline.evaluation.swd import Sampling, distances, project

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Chart


def measure_swd(
    out: Path, *, ckpt: str | None, samples: str | None, data: str, count: int, sampling: Sampling
) -> dict[str, float]:
    """Write swd.json and swd.png, and return the numbers."""
    reals, data_description = subjects.reals(data, count)
    fakes, subject = subjects.fakes(ckpt, samples, count, sampling.seed)
    subjects.check_same_shape(fakes, reals, "the samples")
    settings = {**asdict(sampling), "images": fakes.count, "images_real": reals.count}
    result = Result("swd", out, subject, data_description, settings)
    real_side = project(Watched(reals, "SWD, real images"), sampling, real=True)
    numbers = distances(real_side, project(Watched(fakes, "SWD, samples"), sampling, real=False))
    # A perfect generator draws from the data: what other real images score is the floor of the scale.
    halves = [Part(reals, half) for half in (0, 1)]
    sides = [
        project(Watched(half, f"SWD, real images, half {index + 1}"), sampling, real=index == 0)
        for index, half in enumerate(halves)
    ]
    floor = distances(*sides)
    result.chart(_swd_chart(numbers, floor), "Sliced Wasserstein distance by level of detail (smaller is nearer)")
    result.write(
        {**numbers, "real_against_real": floor, "real_against_real_images": halves[0].count},
        note=published.SWD_NOTE,
        published=[asdict(figure) for figure in published.SWD] if fakes.shape[0] == 64 else [],
    )
    return numbers


def measure_ms_ssim(
    out: Path, *, ckpt: str | None, samples: str | None, data: str | None, count: int, seed: int
) -> dict[str, float]:
    """Write ms_ssim.json and ms_ssim.png (the first pairs), and return the numbers."""
    fakes, subject = subjects.fakes(ckpt, samples, count, seed)
    result = Result("ms_ssim", out, subject, settings={"images": fakes.count, "pairs": fakes.count // 2, "seed": seed})
    numbers = {"ms_ssim": ms_ssim(Watched(fakes, "MS-SSIM, samples"))}
    if data is not None:
        reals, result.data = subjects.reals(data, count)
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
    """Every second image of a set, from `offset` on."""

    def __init__(self, images: Images, offset: int) -> None:
        self.images = images
        self.offset = offset
        self.count = (images.count - offset + 1) // 2
        self.shape = images.shape

    def blocks(self, rank: int = 0, size: int = 1) -> Iterator[tuple[int, Pixels]]:
        every_second = rebatch(pixels[self.offset :: 2] for _, pixels in self.images.blocks())
        return ((block, pixels) for block, pixels in enumerate(every_second) if block % size == rank)


def _swd_chart(numbers: dict[str, float], floor: dict[str, float]) -> "Chart":
    rows = {"these samples": numbers, "real against real": floor}
    levels = [name for name in numbers if name != "swd"]
    if "swd_64" in numbers and len(levels) == 3:
        rows |= {f"DCGAN on {figure.what} (published)": figure.values for figure in published.SWD}
    labels = [f"{level.removeprefix('swd_')} px" for level in levels] + ["mean"]
    values = {name: [row[level] for level in levels] + [row["swd"]] for name, row in rows.items()}
    return charts.bars(labels, values, "SWD × 1000")
