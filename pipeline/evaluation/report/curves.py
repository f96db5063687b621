"""The report's line charts: what metrics.jsonl and timing.jsonl recorded, over the images seen."""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from pipeline.common.svg import Line, line_chart
from pipeline.evaluation.metrics.collapse import REVERTED, Evaluation

Entries = Sequence[dict[str, Any]]
"""The lines of metrics.jsonl or timing.jsonl."""


def charts(metrics: Entries, timing: Entries, fallen: Sequence[Evaluation] = ()) -> list[dict[str, str]]:
    """Return {"title", "text", "svg"} of every chart that has data, with marks where the run has `fallen` apart."""
    marks = [(float(evaluation.images), "fell apart") for evaluation in fallen]
    marks += [(float(e["images"]), "went back to earlier weights") for e in metrics if REVERTED in e]
    chart = partial(line_chart, zero=True, marks=marks)

    def line(key: str, name: str, source: Entries = metrics, dashed: bool = False) -> Line:
        return Line(name, [(e["images"], float(e[key])) for e in source if e.get(key) is not None], dashed)

    levels = sorted(
        {k for e in metrics for k in e if re.fullmatch(r"swd_[0-9]{1,6}(x[0-9]{1,6})?", k)},
        key=lambda k: -int(k[4:].split("x")[0]),
    )
    made = [
        (
            "Losses",
            "Neither falls to zero while the two networks are balanced.",
            chart([line("loss_d", "discriminator"), line("loss_g", "generator")], label="Losses"),
        ),
        (
            "Outputs of the discriminator",
            "Mean predicted probability of being real. At 0.5 it cannot tell samples from real images.",
            chart([line("d_real", "real images"), line("d_fake", "samples")], label="Outputs of D"),
        ),
        (
            "Distance from the data",
            "Sliced Wasserstein distance × 1000 by level of detail. Smaller is nearer.",
            chart([line("swd", "mean"), *(line(k, f"{k[4:]} px", dashed=True) for k in levels)], label="SWD"),
        ),
        (
            "Distance of features",
            "Fréchet distance by the run's own extractor. Compare within this run only.",
            chart([line("fid", "FID")], label="FID"),
        ),
        (
            "Similarity of samples",
            "MS-SSIM of random pairs. Above that of real images, the generator repeats itself.",
            chart(
                [line("ms_ssim", "samples"), line("ms_ssim_real", "real images", dashed=True)],
                label="MS-SSIM",
            ),
        ),
        (
            "Spread of the pixels",
            "Deviation within a batch of samples, divided by that of a real batch. Near 0 means collapse.",
            chart([line("diversity", "samples / real")], label="Diversity"),
        ),
        (
            "Gradients",
            "Mean L2 norm before the update.",
            chart([line("grad_norm_d", "discriminator"), line("grad_norm_g", "generator")], label="Gradients"),
        ),
        (
            "Speed",
            "Images a second, of all processes together.",
            chart([line("images_per_second", "images a second", timing)], label="Speed"),
        ),
    ]
    return [{"title": title, "text": text, "svg": svg} for title, text, svg in made if svg]
