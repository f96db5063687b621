"""The interface of a source: a listing of its pictures with labels, and access to each picture."""

import pickle
from collections import Counter
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

from pipeline.common.errors import TryAgainError, describe_os_error
from pipeline.common.imaging import BadImage, Picture
from pipeline.data.dataset import LabelType, Refusals
from pipeline.data.spool import Spool

KEY = "key"
"""The column of the images' names in every shard. No label can have this name."""
EXAMPLES = 100
"""Refused images that dataset.json names. refused.txt names all of them."""


class Item(NamedTuple):
    """One picture of a source."""

    key: str
    """Its name, unique in the source. It decides the position in the order."""
    labels: tuple[Any, ...]
    """Values in the order of `Listing.labels`; None where there is none."""
    where: Any
    """How the source finds the picture. Small and picklable, because it is sent to the process that reads it."""


class Items(Spool[Item]):
    """Pictures, however many. They are stored as plain tuples, which take half the time."""

    def _pack(self, values: list[Item]) -> bytes:
        return pickle.dumps(list(map(tuple, values)), pickle.HIGHEST_PROTOCOL)

    def _unpack(self, data: bytes) -> list[Item]:
        return list(map(Item._make, pickle.loads(data)))


@dataclass
class RefusalLog:
    """Pictures that were left out, by name and reason; those without a name are counted by reason."""

    entries: list[tuple[str, str]] = field(default_factory=list)
    unnamed: Counter[str] = field(default_factory=Counter)

    def add(self, key: str, reason: str) -> None:
        """Note a picture."""
        self.entries.append((printable(key), reason))

    def extend(self, other: "RefusalLog") -> None:
        """Note all that another log holds."""
        self.entries += other.entries
        self.unnamed += other.unnamed

    @property
    def count(self) -> int:
        """Pictures left out."""
        return len(self.entries) + self.unnamed.total()

    def summary(self) -> Refusals:
        """Return what goes into dataset.json."""
        reasons = Counter(reason for _, reason in self.entries) + self.unnamed
        examples = [f"{key}: {reason}" for key, reason in self.entries[:EXAMPLES]]
        return Refusals(count=self.count, reasons=dict(sorted(reasons.items())), examples=examples)


@dataclass
class Listing:
    """All pictures of a source, before any is decoded."""

    labels: dict[str, LabelType]
    """Name and type of every label."""
    items: Items = field(default_factory=Items)
    refused: RefusalLog = field(default_factory=RefusalLog)
    """Pictures that the listing already knows to be unusable."""
    notes: list[str] = field(default_factory=list)
    """What was skipped because it is no picture, one line each."""
    damaged: bool = False
    """Whether the source itself is broken and pictures are lost. The build then needs --max-bad."""
    files: list[str] = field(default_factory=list)
    """Paths and URLs of the files that hold the pictures, if SRC only says where they are."""
    passed: Counter[str] = field(default_factory=Counter)
    """Files that are no pictures, by kind. `note_passed` makes a note of them."""
    unpacked: list[Any] = field(default_factory=list)
    """Temporary folders of what had to be unpacked; they are removed with the listing."""
    repeated: set[str] = field(default_factory=set)
    """Keys that two pictures have; the first in the listing keeps it."""

    def refuse_repeated(self, key: str) -> None:
        """Note that a picture is left out because another one has its key."""
        if key not in self.repeated:
            self.repeated.add(key)
            self.refused.add(key, "its name is in SRC twice")

    def note_passed(self) -> None:
        """Say what was passed over, the most frequent kinds first."""
        if self.passed:
            kinds = self.passed.most_common()
            words = ", ".join(f"{number:,} {kind}" for kind, number in kinds[:12])
            rest = sum(number for _, number in kinds[12:])
            self.notes.insert(0, f"passed over: {words}{f', {rest:,} of other kinds' if rest else ''}")


class Source(Protocol):
    """Where pictures come from. Small and picklable, because every process that reads gets a copy."""

    def listing(self) -> Listing:
        """Find all pictures and their labels. Raises UserError when there are none."""
        ...

    def read(self, item: Item) -> Picture:
        """Return a picture: its encoded bytes, or numbers (H, W, C). Raises BadImage or OSError."""
        ...


@runtime_checkable
class Gathering(Protocol):
    """A source whose pictures cannot be read one by one from where they are."""

    def gathered(self, items: Iterable[Item], workers: int) -> AbstractContextManager[Source]:
        """Give a source that reads `items` from copies, which are removed at the end of the context."""
        ...


def gathered(source: Source, items: Iterable[Item], workers: int = 1) -> AbstractContextManager[Source]:
    """Give the source to read `items` from: `source` itself, or its copies."""
    return source.gathered(items, workers) if isinstance(source, Gathering) else nullcontext(source)


def read_picture(source: Source, item: Item) -> Picture:
    """Return a picture of `source`. Raises BadImage when it cannot be read, TryAgainError when a retry may succeed."""
    try:
        return source.read(item)
    except OSError as error:
        error.filename = error.filename or printable(item.key)  # a failing read, unlike open, does not say of what
        if isinstance(known := describe_os_error(error), TryAgainError):
            raise known from None
        raise BadImage(f"unreadable ({error.strerror or type(error).__name__})") from None


def printable(key: str) -> str:
    """Return a name as valid UTF-8; undecodable bytes of file names become escapes."""
    return key.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def infer_type(values: Iterable[Any]) -> LabelType:
    """Return the narrowest type that holds all values; None fits every type."""
    return narrowest({type(value) for value in values})


def narrowest(kinds: set[type]) -> LabelType:
    """Return the narrowest type of label that holds values of all `kinds`."""
    kinds = kinds - {type(None)}
    if not kinds <= {bool, int, float}:
        return "str"
    return "float" if float in kinds else "int" if int in kinds else "bool" if kinds else "str"


def as_type(value: Any, kind: LabelType) -> Any:
    """Return `value` as its label's type."""
    return None if value is None else {"bool": bool, "int": int, "float": float, "str": str}[kind](value)
