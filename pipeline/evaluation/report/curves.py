"""The report's line charts: what metrics.jsonl and timing.jsonl recorded, over the images seen."""

import re
from collections.abc import Sequence
from typing import Any

from pipeline.common.svg import Line, line_chart

Entries = Sequence[dict[str, Any]]
"""The lines of metrics.jsonl or timing.jsonl."""


def charts(metrics: Entries, timing: Entries) -> list[dict[str, str]]:
    """Return {"title", "text", "svg"} of every chart that has data."""

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
            line_chart([line("loss_d", "discriminator"), line("loss_g", "generator")], label="Losses", zero=True),
        ),
        (
            "Outputs of the discriminator",
            "Mean predicted probability of being real. At 0.5 it cannot tell samples from real images.",
            line_chart([line("d_real", "real images"), line("d_fake", "samples")], label="Outputs of D", zero=True),
        ),
        (
            "Distance from the data",
            "Sliced Wasserstein distance × 1000 by level of detail. Smaller is nearer.",
            line_chart(
                [line("swd", "mean"), *(line(k, f"{k[4:]} px", dashed=True) for k in levels)], label="SWD", zero=True
            ),
        ),
        (
            "Distance of features",
            "Fréchet distance by the run's own extractor. Compare within this run only.",
            line_chart([line("fid", "FID")], label="FID", zero=True),
        ),
        (
            "Similarity of samples",
            "MS-SSIM of random pairs. Above that of real images, the generator repeats itself.",
            line_chart(
                [line("ms_ssim", "samples"), line("ms_ssim_real", "real images", dashed=True)],
                label="MS-SSIM",
                zero=True,
            ),
        ),
        (
            "Spread of the pixels",
            "Deviation within a batch of samples, divided by that of a real batch. Near 0 means collapse.",
            line_chart([line("diversity", "samples / real")], label="Diversity", zero=True),
        ),
        (
            "Gradients",
            "Mean L2 norm before the update.",
            line_chart(
                [line("grad_norm_d", "discriminator"), line("grad_norm_g", "generator")], label="Gradients", zero=True
            ),
        ),
        (
            "Speed",
            "Images a second, of all processes together.",
            line_chart([line("images_per_second", "images a second", timing)], label="Speed", zero=True),
        ),
    ]
    return [{"title": title, "text": text, "svg": svg} for title, text, svg in made if svg]
