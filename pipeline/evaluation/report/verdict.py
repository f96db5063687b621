"""What the report says first: how good the samples are, how it knows, and when the discriminator wins."""

from collections.abc import Sequence
from statistics import median
from typing import Any

from pipeline.evaluation.metrics.collapse import REVERTED, Evaluation
from pipeline.evaluation.report.curves import Entries

WON = 0.8
"""D wins when its mean output for real images is this much above that for samples."""
FEWEST = 9
"""Lines of metrics.jsonl below which a run says nothing of the balance."""


def verdict(metrics: Entries, results: dict[str, dict[str, Any]]) -> str:
    """Return how good the samples are and how that is known, '' where nothing was measured."""
    told = []
    swd = results.get("swd", {}).get("results", {})
    samples, floor = (_number(swd.get(key, {}), "swd") for key in ("samples_against_half", "real_against_real"))
    evaluated = [entry for entry in metrics if "swd" in entry]
    if samples is not None and floor:
        count = swd.get("real_against_real_images")
        told.append(
            f"By SWD, samples are {samples / floor:.1f} times as far from {count:,} real images as other real images "
            f"are ({samples:.1f} against {floor:.1f}); a perfect generator would be 1.0 times as far."
        )
    elif evaluated:
        best = min(evaluated, key=lambda entry: float(entry["swd"]))
        told.append(
            f"SWD × 1000 was {best['swd']:.1f} at its best, after {best['images']:,} images, as measured while "
            "training; `dcgan-eval swd --ckpt RUN --data DATA` compares it with that of real images."
        )
    found = results.get("memorization", {}).get("results", {})
    sizes = sorted(int(key.rpartition("_")[2]) for key in found if key.startswith("distance_held-out_"))
    if sizes:
        near, far = (_number(found, f"distance_{name}_{sizes[-1]}") for name in ("training", "held-out"))
        if near and far:
            told.append(
                f"The nearest of {sizes[-1]:,} samples is {far / near - 1:+.1%} farther from held-out images than from "
                "training images: much more would mean that they are copied."
            )
    return " ".join(told)


def fell_apart(metrics: Entries, fallen: Sequence[Evaluation]) -> str:
    """Return a warning with what to try when the run fell apart, as `collapses` found it, else ''."""
    if not fallen:
        return ""
    returns = [(entry["images"], entry[REVERTED]) for entry in metrics if REVERTED in entry]
    back = "".join(f" At {images:,} images it went back to the weights of {to:,}." for images, to in returns)
    first = fallen[0]
    again = f" (and {len(fallen) - 1} times later)" if len(fallen) > 1 else ""
    return (
        f"the run fell apart: after {first.images:,} images{again}, {'; '.join(first.reasons)}.{back} "
        f"Its best checkpoint is what RUN names. Try {first.advice}, or schedule.on_collapse=revert."
    )


def discriminator_wins(metrics: Entries) -> str:
    """Return a warning with what to try when D told real from fake in the last third of the run, else ''."""
    balance = [(float(e["d_real"]), float(e["d_fake"])) for e in metrics if "d_real" in e and "d_fake" in e]
    if len(balance) < FEWEST:
        return ""
    real, fake = (median(values) for values in zip(*balance[-(len(balance) // 3) :], strict=True))
    if real - fake < WON:
        return ""
    return (
        f"the discriminator wins: in the last third of the run its output is {real:.2f} for real images and {fake:.2f} "
        "for samples, so the generator learns little from it. Try a larger recipe.learning_rate_g (the demo's is "
        "8e-4, twice D's), then recipe.r1=1 or, for small sets, recipe.augment=color,translation,cutout."
    )


def _number(values: Any, key: str) -> float | None:
    value = values.get(key) if isinstance(values, dict) else None
    return float(value) if isinstance(value, int | float) else None
