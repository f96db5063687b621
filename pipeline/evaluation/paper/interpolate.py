"""`dcgan-eval interpolate`: walks between random z, and between classes (section 6.1 of the paper, Figure 4)."""

from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path

import numpy as np

from pipeline.common.imaging import Pixels
from pipeline.evaluation import charts, inputs
from pipeline.evaluation.paper.walks import Z, draw, spherical, straight, unevenness
from pipeline.evaluation.results import Result
from pipeline.model.labels import named_label
from pipeline.model.sampling import images_of


def run_interpolate(
    out: Path, *, ckpt: str, rows: int, steps: int, seed: int, label: str | None = None
) -> dict[str, float]:
    """Write interpolate.json and pictures of walks between random z; return the unevenness of all kinds.

    A conditional generator keeps the class of a row, the next class in the next row, and then walks from class to class
    at the same z. Its classes are those of `label`, such as `3,5,8`, by default all. Raises UsageError for a class that
    it does not have, and for a `label` of another generator.
    """
    loaded, subject = inputs.any_generator(ckpt)
    names = inputs.class_names(ckpt, loaded.config, label)
    settings = {"rows": rows, "steps": steps, "seed": seed, **({"classes": names} if names else {})}
    result = Result("interpolate", out, subject, settings=settings)
    ends = draw(loaded.config, seed, 0, rows + 1)  # each walk begins where the one before it ended
    values = [named_label(loaded.config, name, "--label") for name in names]
    unevenness_of: dict[str, float] = {}

    def add(kind: str, caption: str, walks: Iterable[tuple[str, Pixels]]) -> None:
        drawn = list(walks)
        unevenness_of[kind] = float(np.mean([unevenness(images) for _, images in drawn]))
        titled = drawn if names else [("", np.concatenate([images for _, images in drawn]))]
        result.picture(charts.sheet(titled, steps), caption, f"-{kind}")

    def along(path: Callable[[Z, Z, int], Z]) -> Iterable[tuple[str, Pixels]]:
        for row in range(rows):
            label = [np.tile(values[row % len(values)], (steps, 1))] if values else []
            images = images_of(loaded.generator, path(ends[row], ends[row + 1], steps), *label)
            yield names[row % len(names)] if names else "", images

    def between_classes() -> Iterable[tuple[str, Pixels]]:
        legs = list(pairwise(zip(names, values, strict=True)))
        for row in range(rows):
            (a, first), (b, last) = legs[row % len(legs)]
            z = np.tile(ends[row], (steps, 1))
            yield f"{a} to {b}", images_of(loaded.generator, z, straight(first, last, steps))

    add("straight", "Walks between random z, straight", along(straight))
    add("spherical", "Walks between random z, spherical", along(spherical))
    told = ""
    if len(names) > 1:
        add("labels", "Walks between classes, each at one z", between_classes())
        told = f" Between classes, at one z, it is {unevenness_of['labels']:.2f} times the mean step."
    result.write(
        {f"unevenness_{name}": value for name, value in unevenness_of.items()},
        summary=(
            f"{rows} walks of {steps} images between random z. The largest step between neighboring images is "
            f"{unevenness_of['straight']:.2f} times the mean step on straight lines, and "
            f"{unevenness_of['spherical']:.2f} times along the sphere. A value near 1 means that no walk jumps.{told}"
        ),
    )
    return unevenness_of
