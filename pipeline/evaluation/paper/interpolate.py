"""`dcgan-eval interpolate`: walks between random z (section 6.1 of the paper, Figure 4)."""

from pathlib import Path

import numpy as np

from pipeline.evaluation import charts, inputs
from pipeline.evaluation.paper.walks import draw, spherical, straight, unevenness
from pipeline.evaluation.results import Result
from pipeline.model.sampling import images_of


def run_interpolate(out: Path, *, ckpt: str, rows: int, steps: int, seed: int) -> dict[str, float]:
    """Write interpolate.json and pictures of walks between random z; return the unevenness of both kinds."""
    loaded, subject = inputs.generator(ckpt)
    result = Result("interpolate", out, subject, settings={"rows": rows, "steps": steps, "seed": seed})
    ends = draw(loaded.config, seed, 0, rows + 1)  # each walk begins where the one before it ended
    pictures, unevenness_of = [], {}
    for name, path in (("straight", straight), ("spherical", spherical)):
        walks = [images_of(loaded.generator, path(ends[i], ends[i + 1], steps)) for i in range(rows)]
        unevenness_of[name] = float(np.mean([unevenness(walk) for walk in walks]))
        pictures.append((f"{name}: {rows} walks of {steps} images", np.concatenate(walks)))
    for caption, images in pictures:
        name = caption.partition(":")[0]
        result.picture(charts.sheet([("", images)], steps), f"Walks between random z, {name}", f"-{name}")
    result.write(
        {f"unevenness_{name}": value for name, value in unevenness_of.items()},
        summary=(
            f"{rows} walks of {steps} images between random z. The largest step between neighboring images is "
            f"{unevenness_of['straight']:.2f} times the mean step on straight lines, and "
            f"{unevenness_of['spherical']:.2f} times along the sphere. A value near 1 means that no walk jumps."
        ),
    )
    return unevenness_of
