"""The rules by which a run counts as fallen apart, line by line."""

from collections.abc import Iterable
from typing import Any

import pytest

from pipeline.evaluation.metrics.collapse import REVERTED, collapses

BATCH = 16
SOUND = {"diversity": 0.8, "d_real": 0.7, "d_fake": 0.3}
ALIKE = {**SOUND, "diversity": 0.1}
FOOLED = {**SOUND, "d_real": 0.4, "d_fake": 0.6}


def recorded(windows: Iterable[dict[str, float]], swd: Iterable[float]) -> list[dict[str, Any]]:
    """Return lines of a run that is evaluated every 8,000 images, with four equal windows before each evaluation."""
    lines: list[dict[str, Any]] = []
    for number, (window, distance) in enumerate(zip(windows, swd, strict=True)):
        start = 8_000 * number
        lines += [{"images": start + 2_000 * part, **window} for part in (1, 2, 3, 4)]
        lines.append({"images": start + 8_000, "swd": distance, "ms_ssim": 0.3})
    return lines


@pytest.mark.parametrize(
    ("windows", "swd", "seen", "words"),
    [
        ([SOUND] * 5, [90, 40, 30, 31, 29], [], ""),
        ([ALIKE, SOUND, SOUND], [200, 40, 30], [], ""),  # its first 500 updates
        ([SOUND, ALIKE, SOUND, ALIKE, SOUND], [40] * 5, [], ""),  # never twice in a row
        ([SOUND, ALIKE, ALIKE, ALIKE], [40] * 4, [24_000], "samples vary 10% as much as real images"),
        ([SOUND, FOOLED, FOOLED], [40] * 3, [24_000], "D takes samples for real: D(fake) 0.60, D(real) 0.40"),
        ([SOUND] * 4, [40, 81, 79, 81], [], ""),
        ([SOUND] * 4, [40, 30, 61, 70], [32_000], "SWD is 70.0, and was 30.0 after 16,000 images"),
        ([SOUND, FOOLED, SOUND, SOUND], [40, 40, 100, 100], [24_000], "SWD is 100.0"),  # two ways of the same fall
    ],
)
def test_what_counts(windows: list[dict[str, float]], swd: list[float], seen: list[int], words: str) -> None:
    found = collapses(recorded(windows, swd), BATCH)
    assert [evaluation.images for evaluation in found] == seen
    assert all(words in "; ".join(evaluation.reasons) for evaluation in found)
    assert all("recipe.learning_rate_" in evaluation.advice for evaluation in found)


def test_a_return_begins_a_new_count() -> None:
    lines = recorded([SOUND, ALIKE, ALIKE, ALIKE, ALIKE], [40] * 5)
    lines.insert(15, {"images": 24_000, REVERTED: 8_000})
    assert [evaluation.images for evaluation in collapses(lines, BATCH)] == [24_000, 40_000]


def test_a_run_is_worse_than_its_best_even_from_before_the_first_updates_counted() -> None:
    """As of one that began from the weights of another: its first evaluation is its best."""
    lines = [{"images": 0, "swd": 20.0}, *recorded([SOUND, SOUND, SOUND], [50, 45, 44])]
    (found,) = collapses(lines, BATCH)
    assert found.images == 24_000
    assert "was 20.0 after 0 images" in found.reasons[0]
