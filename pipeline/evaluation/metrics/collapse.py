"""Whether a run has fallen apart, by what it recorded of itself: a pure function of the lines of its metrics.jsonl."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

AFTER_UPDATES = 500
"""Updates that a run may begin badly for: at first all samples are alike."""
IN_A_ROW = 2
"""Evaluations one after another that must say the same: one bad moment is none."""
LEAST_DIVERSITY = 0.2
"""Mean deviation of samples over that of real images, since the evaluation before, below which they are alike."""
MOST_SWD = 2.0
"""SWD over the best of the run, above which it is lost."""
REVERTED = "reverted_to"
"""In a line of metrics.jsonl: the images seen by the checkpoint whose weights the run went back to."""


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation and the windows before it say."""

    images: int
    reasons: tuple[str, ...]
    """What is bad, in words; () when nothing is."""
    advice: str
    """The setting to try, '' when nothing is bad."""


class CollapseDetector:
    """Reads the lines of a run in their order, each once."""

    def __init__(self, batch: int) -> None:
        """`batch` images are an update."""
        self.bad: list[Evaluation] = []
        """The bad evaluations in a row up to now; [] as soon as one is good, or the run goes back."""
        self._begin = AFTER_UPDATES * batch
        self._windows: list[tuple[float, float, float]] = []  # since the last evaluation
        self._best: tuple[float, int] | None = None

    @property
    def collapsed(self) -> bool:
        """Whether the last evaluations in a row, as many as it takes, were bad."""
        return len(self.bad) >= IN_A_ROW

    def add(self, line: Mapping[str, Any]) -> None:
        """Take in a line: of a window, of an evaluation, or of a return to an earlier checkpoint."""
        images = int(line["images"])
        if REVERTED in line:
            self.bad, self._windows = [], []
        elif "swd" in line:
            self._evaluate(images, float(line["swd"]))
        elif images > self._begin and {"diversity", "d_real", "d_fake"} <= line.keys():
            self._windows.append((float(line["diversity"]), float(line["d_real"]), float(line["d_fake"])))

    def _evaluate(self, images: int, swd: float) -> None:
        windows, self._windows = self._windows, []
        reasons, advice = [], ""
        if windows:
            diversity, real, fake = (sum(values) / len(windows) for values in zip(*windows, strict=True))
            if fake > real:
                reasons.append(f"D takes samples for real: D(fake) {fake:.2f}, D(real) {real:.2f}")
                advice = "a larger recipe.learning_rate_d, or a smaller recipe.learning_rate_g"
            if diversity < LEAST_DIVERSITY:
                reasons.append(f"samples vary {diversity:.0%} as much as real images")
                advice = advice or "a smaller recipe.learning_rate_g"
        if self._best is not None and images > self._begin and swd > MOST_SWD * self._best[0]:
            reasons.append(f"SWD is {swd:.1f}, and was {self._best[0]:.1f} after {self._best[1]:,} images")
            advice = advice or "smaller recipe.learning_rate_g and recipe.learning_rate_d"
        if self._best is None or swd < self._best[0]:
            self._best = swd, images
        self.bad = [*self.bad, Evaluation(images, tuple(reasons), advice)] if reasons else []


def collapses(lines: Iterable[Mapping[str, Any]], batch: int) -> list[Evaluation]:
    """Return the evaluations at which a run was seen to have fallen apart: of each time the first one that says so."""
    detector, found = CollapseDetector(batch), []
    for line in lines:
        before = detector.collapsed
        detector.add(line)
        if detector.collapsed and not before:
            found.append(detector.bad[-1])
    return found
