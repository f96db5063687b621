"""JSON files of ours as typed, frozen records, and how they are read: checked, and refused in one line."""

import json
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.common.errors import DataError


class Record(BaseModel):
    """A JSON object of ours. Unknown keys are refused: they come from a newer version or another tool."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


R = TypeVar("R", bound=Record)


def read_record(kind: type[R], content: bytes | str, where: str, *, version: int | None = None, hint: str = "") -> R:
    """Return the record that the JSON `content` of the file `where` holds.

    Raises DataError when it is not JSON, is of another `version`, or does not fit `kind`; `hint` says what to do.
    """
    advice = f"; {hint}" if hint else ""
    try:
        values = json.loads(content)
    except ValueError as error:
        raise DataError(f"{where}: not JSON: {error}{advice}") from None
    found = values.get("version") if isinstance(values, dict) else None
    if version is not None and found != version:
        raise DataError(f"{where}: version {found!r}; this program reads version {version}{advice}")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise DataError(f"{where}: {place + ': ' if place else ''}{first['msg']}{advice}") from None
