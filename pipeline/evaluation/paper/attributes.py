"""Expressions of attributes as a user writes them: `male & eyeglasses - male & !eyeglasses + !male`."""

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.common.errors import UsageError
from pipeline.evaluation.classifier import Classifier, Predictions
from pipeline.evaluation.options import NUMBERED_SAMPLES

CONFIDENT = 0.8
"""An exemplar must have each of its attributes with this probability."""


@dataclass(frozen=True)
class Concept:
    """One term of an expression: exemplars by their index, or by the attributes that they must show."""

    sign: int
    """+1 or -1."""
    text: str
    indices: tuple[int, ...] = ()
    wanted: tuple[tuple[str, bool], ...] = ()

    def matches(self, predictions: Predictions) -> NDArray[np.bool_]:
        """Return which images show this concept with confidence, bool (N,)."""
        shown = [predictions[n] > CONFIDENT if yes else predictions[n] < 1 - CONFIDENT for n, yes in self.wanted]
        return np.asarray(np.logical_and.reduce(shown))


def parse(expression: str) -> list[Concept]:
    """Parse terms joined by + and -, each `#3,17,42` (indices) or attributes joined by & (each may begin with !).

    Raises UsageError that says what is expected.
    """
    expected = "expected such as 'male & eyeglasses - male & !eyeglasses + !male' or '#3,7,9 - #1,2,4 + #5,6,8'"
    pieces = re.split(r"\s*(?:^|(?<=\s))([+-])\s+", f"+ {expression.strip()}")
    concepts = []
    for sign, text in zip(pieces[1::2], pieces[2::2], strict=True):
        text = text.strip()  # noqa: PLW2901
        if re.fullmatch(r"#\d{1,18}(\s*,\s*\d{1,18})*", text):
            indices = tuple(int(number) for number in text[1:].split(","))
            if max(indices) >= NUMBERED_SAMPLES:
                raise UsageError(
                    f"--expression: there is no sample #{max(indices)}; expected indices from a contact sheet "
                    f"(--sheet), 0 to {NUMBERED_SAMPLES - 1}"
                )
            concepts.append(Concept(1 if sign == "+" else -1, text, indices=indices))
        elif re.fullmatch(r"!?\w+(\s*&\s*!?\w+)*", text):
            names = [name.strip() for name in text.split("&")]
            wanted = tuple((name.lstrip("!"), not name.startswith("!")) for name in names)
            concepts.append(Concept(1 if sign == "+" else -1, text, wanted=wanted))
        else:
            raise UsageError(f"--expression: cannot read {text!r} in {expression!r}; {expected}")
    if not any(concept.sign > 0 for concept in concepts):
        raise UsageError(f"--expression {expression!r}: nothing is added; {expected}")
    return concepts


def outcome(concepts: list[Concept]) -> dict[str, bool]:
    """Return the attributes that the result should show: those whose signed sum is 0 or 1.

    The outcome of an attribute that some term does not name is unknown, so it is left out.
    """
    names = {name for concept in concepts for name, _ in concept.wanted}
    result = {}
    for name in sorted(names):
        values = [(concept.sign, dict(concept.wanted).get(name)) for concept in concepts]
        if all(value is not None for _, value in values):
            total = sum(sign * bool(value) for sign, value in values)
            if total in (0, 1):
                result[name] = bool(total)
    return result


def check_known(concepts: list[Concept], classifier: Classifier) -> None:
    """Raise UsageError unless the classifier predicts every attribute, as a bool."""
    for concept in concepts:
        for name, _ in concept.wanted:
            if classifier.head(name).kind != "bool":
                raise UsageError(f"--expression: {name!r} is a number, not a yes-or-no attribute; `turn` takes numbers")


def shows(predictions: Predictions, attributes: dict[str, bool]) -> NDArray[np.bool_]:
    """Return which images have all of the attributes (at least one), by the more probable answer: bool (N,)."""
    return np.asarray(np.logical_and.reduce([(predictions[name] > 0.5) == yes for name, yes in attributes.items()]))


def in_words(attributes: dict[str, bool]) -> str:
    """Write attributes as `not male, eyeglasses`."""
    return ", ".join(name if yes else f"not {name}" for name, yes in attributes.items())
