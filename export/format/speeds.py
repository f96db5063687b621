"""The speed table of a model, `model.speed.json` beside `model.onnx`: how fast each backend runs it, by processor."""

import json
from contextlib import suppress
from importlib.resources import files
from typing import Annotated, Literal

from pydantic import Field

from export.format.card import Batch, Card, Precision, read_card
from pipeline.common.errors import DataError
from pipeline.common.machine import Instructions
from pipeline.common.records import Record, read_record
from pipeline.common.storage import Store, locate
from pipeline.config import NetworkConfig

VERSION = 1


class ProcessorSpeeds(Record):
    """What was measured on one processor with one number of threads."""

    processor: str
    """As `machine.processor_kind` describes it."""
    instructions: Instructions
    threads: int = Field(ge=1)
    date: str
    versions: dict[str, str]
    """Versions of the backends."""
    images_per_second: dict[Batch, dict[str, Annotated[float, Field(gt=0)]]] = Field(min_length=1)
    """Images in a block -> backend -> images/s, in float32."""


class SpeedTable(Record):
    """The content of model.speed.json."""

    version: Literal[1] = 1
    network: NetworkConfig
    precision: Precision
    """Of the graph."""
    processors: list[ProcessorSpeeds]

    def fits(self, card: Card) -> bool:
        """Whether it was measured with a graph like that of `card`. Weights do not count: they have no speed."""
        return (self.network, self.precision) == (card.network, card.precision)

    def with_row(self, row: ProcessorSpeeds) -> "SpeedTable":
        """Return the table with `row` in place of what it says of the same processor and threads."""
        others = [one for one in self.processors if (one.processor, one.threads) != (row.processor, row.threads)]
        return self.model_copy(update={"processors": [*others, row]})


def speeds_name(model: str) -> str:
    """Return the path or URL of the speed table that belongs to `model`."""
    return model.rpartition(".")[0] + ".speed.json"


def read_speeds(model: str) -> SpeedTable | None:
    """Return the speed table beside `model`, a path or URL; None without one. Raises DataError when it is damaged."""
    store, name = locate(speeds_name(model))
    found = False
    with suppress(DataError):  # of a file that is not there, some stores say that it may not be read
        found = store.exists(name)
    if not found:
        return None
    hint = f"delete it, or measure again: dcgan-export bench --calibrate --model {model} --out FOLDER"
    return read_record(SpeedTable, store.read(name), store.path(name), version=VERSION, hint=hint)


def our_speeds() -> SpeedTable:
    """Return the table in this package: the processors that benchmarks/sampling.py ran on."""
    return SpeedTable.model_validate(json.loads((files("export.format") / "measured.json").read_text()))


def add_speeds(model: str, row: ProcessorSpeeds) -> str:
    """Write `row` into the speed table beside `model`; return the table's path or URL.

    A table that is damaged, or was measured with another network, begins anew.
    """
    card, table = read_card(model), None
    with suppress(DataError):
        table = read_speeds(model)
    if table is None or not table.fits(card):
        table = SpeedTable(network=card.network, precision=card.precision, processors=[])
    store, name = locate(speeds_name(model))
    store.write(name, (table.with_row(row).model_dump_json(indent=1) + "\n").encode())
    return store.path(name)


def copy_speeds(model: str, folder: str) -> None:
    """Copy the speed table of `model`, if it has one, into `folder`, a path or URL."""
    if (table := read_speeds(model)) is not None:
        Store(folder).write(locate(speeds_name(model))[1], (table.model_dump_json(indent=1) + "\n").encode())
