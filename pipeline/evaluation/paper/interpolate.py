"""`dcgan-eval interpolate`: walks between random z (section 6.1 of the paper, Figure 4)."""

from pathlib import Path

import numpy as np

from pipeline.evaluation import charts, inputs
from pipeline.evaluation.paper.walks import draw, spherical, straight, unevenness
from pipeline.evaluation.results import Result
from pipeline.model.sampling import images_of


def run_interpolate(out: Path, *, ckpt: str, rows: int, steps: int, seed: int) -> dict[str, float]:
    """Write interpolate.json and a picture of walks between random z, straight and along the sphere."""
    loaded, subject = inputs.generator(ckpt)
    result = Result("interpolate", out, subject, settings={"rows": rows, "steps": steps, "seed": seed})
    ends = draw(loaded.config, seed, 0, rows + 1)  # each walk goes on where the one before it ended
    pictures, evenness = [], {}
    for name, path in (("straight", straight), ("spherical", spherical)):
        walks = [images_of(loaded.generator, path(ends[i], ends[i + 1], steps)) for i in range(rows)]
        evenness[name] = float(np.mean([unevenness(walk) for walk in walks]))
        pictures.append((f"{name}: {rows} walks of {steps} images", np.concatenate(walks)))
    for caption, images in pictures:
        name = caption.partition(":")[0]
        result.picture(charts.sheet([("", images)], steps), f"Walks between random z, {name}", f"-{name}")
    result.write(
        {f"unevenness_{name}": value for name, value in evenness.items()},
        summary=(
            f"{rows} walks of {steps} images between random z. The largest step between neighbors is "
            f"{evenness['straight']:.2f} times the mean one on straight lines, {evenness['spherical']:.2f} times along "
            "the sphere: close to 1 means that no image jumps to the next."
        ),
    )
    return evenness
