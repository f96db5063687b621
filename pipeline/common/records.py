"""JSON files of ours as typed, frozen records, and how JSON is read: checked, and refused in one line."""

import json
from collections import Counter
from typing import Annotated, Any, NoReturn, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from pipeline.common.errors import DataError, first_line
from pipeline.common.storage import is_plain_name

MAX_DEPTH = 32
"""Deepest nesting of a JSON file; ours have six levels."""
LARGEST = 1 << 48
"""Largest count or size that a file may state: far more than any disk holds, far less than an int64 does."""


def _plain(name: str) -> str:
    if not is_plain_name(name):
        raise ValueError("expected a plain name: letters, digits, '_', '-' and '.'")
    return name


PlainName = Annotated[str, AfterValidator(_plain)]
"""The name of a file in the record's own folder: it becomes a path."""


class Record(BaseModel):
    """A JSON object of ours. Unknown keys are refused: they come from a newer version or another tool."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


R = TypeVar("R", bound=Record)


def parse_json(content: bytes | str, where: str, *, hint: str = "", nan: bool = False) -> Any:
    """Return what the JSON `content` (UTF-8) of the file `where` holds. `hint` says what to do when it is damaged.

    Raises DataError when it is not JSON, names a key twice, is nested too deeply, or holds a number that is none;
    with `nan`, NaN and infinities pass, as some files of 0.1.0 have them.
    """
    try:
        text = content if isinstance(content, str) else content.decode("utf-8-sig")
        values = (_LENIENT if nan else _STRICT).decode(text)
        _check_depth(values)
        if "\\ud" in text.lower():  # half of a pair is no character, and cannot be written
            json.dumps(values, ensure_ascii=False).encode()
    except RecursionError:
        raise DataError(f"{where}: not JSON: nested too deeply{_advice(hint)}") from None
    except ValueError as error:
        raise DataError(f"{where}: not JSON: {first_line(error)}{_advice(hint)}") from None
    return values


def read_record(kind: type[R], content: bytes | str, where: str, *, version: int | None = None, hint: str = "") -> R:
    """Return the record that the JSON `content` of the file `where` holds.

    Raises DataError when it is not JSON, is of another `version`, or does not fit `kind`; `hint` says what to do.
    """
    values = parse_json(content, where, hint=hint)
    found = values.get("version") if isinstance(values, dict) else None
    if version is not None and found != version:
        raise DataError(f"{where}: version {found!r}; this program reads version {version}{_advice(hint)}")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise DataError(f"{where}: {first_problem(error)}{_advice(hint)}") from None


def first_problem(error: ValidationError) -> str:
    """Return the first problem in words: the key, and what is wrong with it."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place + ': ' if place else ''}{first['msg']}"


def _advice(hint: str) -> str:
    return f"; {hint}" if hint else ""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"it names {twice!r} twice")
    return values


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number")


def _finite(text: str) -> float:
    value = float(text)
    if value - value != 0:
        _refuse(text)
    return value


_STRICT = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite)
_LENIENT = json.JSONDecoder(object_pairs_hook=_unique)


def _check_depth(values: Any) -> None:
    """Raise ValueError beyond MAX_DEPTH: what is written or shown of the values takes a stack as deep as they are."""
    level = [values] if isinstance(values, dict | list) else []
    for _ in range(MAX_DEPTH):
        containers = (value.values() if isinstance(value, dict) else value for value in level)
        level = [inner for outer in containers for inner in outer if type(inner) in (dict, list)]
        if not level:
            return
    raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
