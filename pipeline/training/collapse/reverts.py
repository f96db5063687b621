"""What a run records of each time that it went back to the weights of an earlier checkpoint."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field, ValidationError

from pipeline.common.errors import DataError
from pipeline.common.records import LARGEST, Record, first_problem

REVERTS = "reverts"
"""The entry of state.json and config.json."""


class Revert(Record):
    """One return. The position of the run goes on; its learning rates are halved once for each."""

    images: int = Field(ge=0, le=LARGEST)
    """Where it happened, in images seen."""
    to: int = Field(ge=0, le=LARGEST)
    """The checkpoint whose weights and moments it took, in images seen."""
    reasons: list[str]


def recorded_reverts(state: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """Return the reverts that a state.json lists. Raises DataError when the entry is damaged."""
    entries = state.get(REVERTS, [])
    try:
        if not isinstance(entries, list):
            raise TypeError
        return [Revert.model_validate(entry).model_dump() for entry in entries]
    except (TypeError, ValidationError) as error:
        problem = f" ({first_problem(error)})" if isinstance(error, ValidationError) else ""
        raise DataError(
            f"{where}/state.json: its entry `{REVERTS}` is damaged{problem}; it says how often the learning rates were "
            "halved: restore it, or resume from an earlier checkpoint"
        ) from None
