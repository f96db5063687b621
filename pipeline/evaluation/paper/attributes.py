"""Attributes as a person writes them: `male & eyeglasses - male & !eyeglasses + !male`."""

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.common.errors import UsageError
from pipeline.evaluation.classifier import Classifier
from pipeline.evaluation.options import NUMBERED_SAMPLES

Read = dict[str, NDArray[np.float32]]
CONFIDENT = 0.8
"""An exemplar must have each of its attributes with this probability."""


@dataclass(frozen=True)
class Concept:
    """One term of an expression: exemplars by their index, or by what they must look like."""

    sign: int
    """+1 or -1."""
    text: str
    indices: tuple[int, ...] = ()
    wanted: tuple[tuple[str, bool], ...] = ()

    def matches(self, read: Read) -> NDArray[np.bool_]:
        """Return which images show this concept with confidence."""
        shown = [read[name] > CONFIDENT if yes else read[name] < 1 - CONFIDENT for name, yes in self.wanted]
        return np.asarray(np.logical_and.reduce(shown))


def parse(expression: str) -> list[Concept]:
    """Read terms joined by + and -: each `#3,17,42` (indices) or attributes joined by & (each may begin with !).

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
    """Return what an expression should give: the attributes whose signed sum comes out at 0 or 1.

    An attribute that a term does not name is unknown there, and with it the outcome.
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
    """Raise UsageError unless every attribute is a yes-or-no one that the classifier reads."""
    for concept in concepts:
        for name, _ in concept.wanted:
            if classifier.head(name).kind != "bool":
                raise UsageError(f"--expression: {name!r} is a number, not a yes-or-no attribute; use `turn` for those")


def shows(read: Read, attributes: dict[str, bool]) -> NDArray[np.bool_]:
    """Return which images have all of the attributes, by the classifier's better guess."""
    count = len(next(iter(read.values())))
    wanted = [(read[name] > 0.5) == yes for name, yes in attributes.items()]
    return np.asarray(np.logical_and.reduce(wanted)) if wanted else np.ones(count, bool)


def in_words(attributes: dict[str, bool]) -> str:
    """Write attributes as `not male, eyeglasses`."""
    return ", ".join(name if yes else f"not {name}" for name, yes in attributes.items())
