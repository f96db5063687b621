"""The results of a command: one JSON that says what was measured on which images, and pictures."""

import io
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from pipeline.common.errors import DataError, UsageError
from pipeline.common.records import first_problem, parse_json
from pipeline.common.storage import Store, require_writable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pipeline.common.imaging import Pixels

FOLDER = "evaluation"
"""The folder of results in a run directory; the report reads them from there."""


WORDS = {"comparable": "comparable with published numbers:", "why_not": "because"}
"""How these entries of a protocol are named in words."""


class _Picture(BaseModel):
    file: str
    caption: str = ""


class _Published(BaseModel):
    what: str
    source: str
    values: dict[str, Any]


class _Stored(BaseModel):
    """What the report reads of a result; the rest of the file is for people."""

    command: str
    results: dict[str, Any]
    settings: dict[str, Any] = {}
    protocol: dict[str, Any] = {}
    summary: str = ""
    note: str = ""
    table: list[list[Any]] = []
    published: list[_Published] = []
    pictures: list[_Picture]


@dataclass
class Result:
    """The result of one command: OUT/NAME.json and its pictures, which `write` writes, and nothing before it."""

    name: str
    out: Path
    subject: dict[str, Any]
    """The model or the samples that were measured."""
    data: dict[str, Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)
    """How it was measured, as far as that decides what it may be compared with."""
    began: float = field(default_factory=time.monotonic)
    pictures: list[dict[str, str]] = field(default_factory=list)
    _files: dict[str, bytes] = field(default_factory=dict)

    def picture(self, image: "Pixels", caption: str, suffix: str = "") -> None:
        """Add a picture (height, width, channels)."""
        from pipeline.common.imaging import encode

        self._add(encode(image, "png"), caption, suffix)

    def chart(self, chart: "Figure", caption: str, suffix: str = "") -> None:
        """Add a matplotlib figure."""
        buffer = io.BytesIO()
        chart.savefig(buffer, format="png", dpi=110)
        self._add(buffer.getvalue(), caption, suffix)

    def animation(self, data: bytes, format: str, caption: str) -> None:
        """Add a moving picture, an encoded file of this format."""
        self._add(data, caption, "", format)

    def _add(self, data: bytes, caption: str, suffix: str, format: str = "png") -> None:
        name = f"{self.name}{suffix}.{format}"
        self.pictures.append({"file": name, "caption": caption})
        self._files[name] = data

    def write(
        self,
        results: dict[str, Any],
        *,
        summary: str = "",
        note: str = "",
        table: list[list[Any]] | None = None,
        published: list[dict[str, Any]] | None = None,
    ) -> Path:
        """Write all pictures and then the JSON, and return its path.

        `summary` is the outcome in a sentence; `table` (first row: headings) is what the report shows of it.
        """
        if summary and "label" in self.subject:
            summary += f" All samples are of the class {self.subject['label']}."
        content = {
            "command": self.name,
            "subject": self.subject,
            "data": self.data,
            "settings": self.settings,
            "protocol": self.protocol,
            "summary": summary,
            "results": results,
            "table": table or [],
            "published": published or [],
            "note": note,
            "pictures": self.pictures,
            "seconds": round(time.monotonic() - self.began, 1),
            "versions": {name: _version(name) for name in ("dcgan-pipeline", "torch", "numpy")},
        }
        path = self.out / f"{self.name}.json"
        Store(self.out).write_all({**self._files, path.name: (json.dumps(content, indent=1) + "\n").encode()})
        return path


def in_words(told: Mapping[str, Any]) -> str:
    """Return a protocol or settings as one line, such as `images 10,000; real images as the data set stores them`."""
    names = {name: WORDS.get(name, name.replace("_", " ")) for name in told}
    return "; ".join(f"{names[name]} {_word(value)}" for name, value in told.items() if value is not None)


def _word(value: Any) -> str:
    """Return a value as text: numbers with commas, a SHA-256 cut to its first 12 digits."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return ", ".join(map(_word, value))
    text = str(value)
    return f"{text[:12]}…" if re.fullmatch(r"[0-9a-f]{64}", text) else text


def how_measured(path: Path) -> str:
    """Return the protocol of a result that `Result.write` wrote, in words; of one without, its settings."""
    content = parse_json(path.read_bytes(), str(path), nan=True)
    return in_words(content["protocol"] or content["settings"])


def output_folder(out: Path | None, ckpt: str | None) -> Path:
    """Return `out`, or RUN/evaluation when `ckpt` names a run directory on this disk. Else raises UsageError.

    Raises OSError when the folder cannot be written.
    """
    run = Path((ckpt or "").partition("@")[0])
    if out is None and ckpt and (run / "config.json").is_file():
        out = run / FOLDER
    if out is None:
        raise UsageError("--out is missing: name a folder for the results (only a run directory has a default)")
    require_writable(out)
    return out


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the results in `folder` by command; other JSON files are ignored. Raises DataError for a damaged file."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        advice = "remove it or run the command again"
        content = parse_json(path.read_bytes(), str(path), hint=advice, nan=True)
        if isinstance(content, dict) and {"command", "results", "pictures"} <= content.keys():
            try:
                found[path.stem] = _Stored.model_validate(content).model_dump()
            except ValidationError as error:
                raise DataError(f"{path}: {first_problem(error)}; {advice}") from None
    return found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
