"""The card of an exported file: its input and output, its source, and its measured parity.

See docs/architecture.md, contract 5.
"""

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from pipeline.common.errors import DataError, UsageError
from pipeline.common.records import LARGEST, Record, read_record
from pipeline.common.storage import Store, locate, sha256_bytes, sha256_file
from pipeline.config import NetworkConfig

VERSION = 1
MAX_BATCH = 4096
"""Largest batch that a file can be exported for."""
SHA256 = r"^[0-9a-f]{64}$"
Batch = Annotated[int, Field(ge=1, le=MAX_BATCH)]
SUFFIXES = (".onnx", ".plan")

Precision = Literal["fp32", "tf32", "fp16"]
ComputePrecision = Literal["fp32", "fp16"]
Output = Literal["uint8", "float"]
RuntimeName = Literal["tensorrt", "tensorrt-rtx"]


class Port(Record):
    """An input or output of the graph."""

    name: str
    dtype: Literal["float32", "uint8", "int64"]
    shape: list[int | str]
    """Sizes; a name stands for a size that may vary between calls."""
    values: str
    """Range or distribution of the values, for people."""


class Source(Record):
    """The weights that were exported."""

    reference: str
    """The file they were read from, for people: its place in the run, or a URL. No program opens it."""
    sha256: str = Field(pattern=SHA256)
    """Hash of that file."""
    kind: Literal["ema", "raw", "netG", "discriminator"]
    images_seen: int | None = Field(None, ge=0, le=LARGEST)
    """Real images seen in training; null if the file does not say."""
    init_from: list[Annotated[str, Field(pattern=SHA256)]] | None = Field(None, exclude_if=lambda value: value is None)
    """Hashes of the weights files that training began from; absent if it began from noise."""


class Parity(Record):
    """Measured differences between the file and its reference on the same z."""

    reference: str = "PyTorch"
    """PyTorch: the generator in float32. Else, if the weights were gone, the name of the ONNX file."""
    backend: str
    """What ran the file, for example onnxruntime/CPUExecutionProvider."""
    batches: list[int]
    images: int
    max_float_error: float | None = Field(allow_inf_nan=True)
    """Largest difference of a value in [-1, 1], before conversion to uint8; null if the file does not output it.

    Infinite of a file that no card will describe.
    """
    max_uint8_error: int
    """Largest difference of a uint8 value."""
    share_of_pixels_off: float
    """Share of the uint8 values that differ."""
    float_bar: float
    uint8_bar: int = 1
    share_bar: float | None = None
    """Largest `share_of_pixels_off` that passes; null in cards of an earlier version."""


class Engine(Record):
    """The target of an engine, the only place where it runs, and how it was built."""

    runtime: RuntimeName
    version: str
    """Version of the runtime that built it."""
    gpu: str | None
    """Name of the GPU that it was built on; null for TensorRT-RTX, which builds for several."""
    compute_capability: str | None
    driver: str | None = Field(pattern=r"^[0-9]{1,9}(\.[0-9]{1,9})*$")
    """CUDA version that the driver supports."""
    system: str
    """Operating system and processor, for example Linux-x86_64."""
    profiles: list[Annotated[list[Batch], Field(min_length=3, max_length=3)]] = Field(min_length=1)
    """Smallest, best and largest batch of each optimization profile."""
    optimization_level: int = Field(ge=0, le=5)
    onnx: str = Field(pattern=r"^[^/\\\x00-\x1f\x7f]{1,250}\.onnx$")
    """Name of the ONNX file beside it that it was built from. People choose it, so it may be any name."""
    onnx_sha256: str = Field(pattern=SHA256)


class Card(Record):
    """The content of model.json, beside model.onnx or model.plan."""

    version: int = VERSION
    file: str
    """Name of the model beside the card."""
    sha256: str = Field(pattern=SHA256)
    bytes: int = Field(ge=1, le=LARGEST)
    precision: Precision
    max_batch: int = Field(ge=1, le=MAX_BATCH)
    input: Port
    label: Port | None = Field(None, exclude_if=lambda port: port is None)
    """The second input, of a conditional model alone."""
    output: Port
    network: NetworkConfig
    source: Source
    versions: dict[str, str]
    """Versions of the packages that took part in the export: those that the process had imported."""
    processor: str = ""
    """Name of the CPU that parity was measured on; '' in cards of an earlier version."""
    parity: list[Parity] = Field(default_factory=list)
    engine: Engine | None = None

    @property
    def inputs(self) -> list[Port]:
        """z and, of a conditional model, the label."""
        return [self.input] if self.label is None else [self.input, self.label]

    @property
    def output_kind(self) -> Output:
        """uint8: NHWC, made in the graph. float: the network's own NCHW in [-1, 1]."""
        return "uint8" if self.output.dtype == "uint8" else "float"


def ports(network: NetworkConfig, output: Output) -> tuple[Port, Port]:
    """Return input and output of a graph made from `network`."""
    height, width, channels = network.image_shape
    values = "U(-1, 1)" if network.latent_distribution == "uniform" else "N(0, 1)"
    z = Port(name="z", dtype="float32", shape=["batch", network.latent_dim], values=values)
    if output == "uint8":
        return z, Port(name="image", dtype="uint8", shape=["batch", height, width, channels], values="0 to 255, NHWC")
    return z, Port(name="image", dtype="float32", shape=["batch", channels, height, width], values="-1 to 1, NCHW")


def label_port(network: NetworkConfig) -> Port | None:
    """Return the second input of a graph made from `network`; None without a label."""
    if not network.label:
        return None
    if len(network.label) > 1:
        values = f"0 or 1 for each of {', '.join(network.label)}"
        return Port(name="label", dtype="float32", shape=["batch", len(network.label)], values=values)
    titles = ", ".join(f"{number} {title}" for number, title in enumerate(network.class_titles))
    return Port(name="label", dtype="int64", shape=["batch"], values=f"class of {network.label[0]}: {titles}")


def card_name(model: str) -> str:
    """Return the file name of the card that belongs to the file `model`."""
    return model.rpartition(".")[0] + ".json"


def beside(model: str, name: str) -> str:
    """Return the path or URL of the file `name` in the folder of `model`."""
    folder, slash, _ = model.rpartition("/")
    return f"{folder}{slash}{name}"


def card_json(card: Card) -> bytes:
    """Return the content of a card's file."""
    return (card.model_dump_json(indent=2) + "\n").encode()


def write_card(folder: str, card: Card) -> None:
    """Write `card` into the folder of its model, which is there."""
    Store(folder).write(card_name(card.file), card_json(card))


def write_model(folder: str, card: Card, data: bytes) -> None:
    """Write the model `data` into `folder`, a path or URL, and then its card: without one, an export is unfinished."""
    Store(folder).write_all({card.file: data, card_name(card.file): card_json(card)})


def read_card(model: str) -> Card:
    """Read the card of `model`, a path or URL. Raises DataError when there is none or it is invalid."""
    store, name = locate(model)
    where = store.path(card_name(name))
    if not store.exists(name):
        raise DataError(f"{model}: no such file")
    try:
        content = store.read(card_name(name))
    except DataError as error:
        if store.exists(card_name(name)):
            raise
        raise DataError(f"{where}: {model} has no card beside it ({error}); export it with dcgan-export") from None
    card = read_record(Card, content, where, version=VERSION, hint="export the model again")
    if card.file != name:
        raise DataError(f"{where}: is the card of {card.file}, not of {name}; export the model again")
    if (card.engine is not None) != name.endswith(".plan"):
        found = "an engine" if card.engine else "no engine"
        raise DataError(f"{where}: names {found}, expected one of a .plan and none of a .onnx; export the model again")
    return card


def read_model(model: str) -> tuple[Card, bytes]:
    """Return the card and the bytes of `model`, checked against each other before anything loads them.

    Raises DataError when the file was cut short, edited, or belongs to another export.
    """
    card = read_card(model)
    store, name = locate(model)
    data = store.read(name)
    if len(data) != card.bytes:
        raise DataError(
            f"{model}: {len(data)} bytes, its card says {card.bytes}: cut short or replaced; copy or export it again"
        )
    if (found := sha256_bytes(data)) != card.sha256:
        raise DataError(
            f"{model}: its SHA-256 is {found[:12]}..., its card says {card.sha256[:12]}...: edited or damaged; "
            "export it again"
        )
    return card, data


def require_replaceable(model: Path, sha256: str | None, *, replacing: str) -> None:
    """Raise UsageError if another engine in the folder was built from the file `model`, which is to be replaced.

    That engine could no longer be rebuilt or verified. `sha256` is the hash of the new file, if it is known. The
    engine `replacing` does not count, because it is about to be replaced too.
    """
    if not model.exists() or (old := sha256_file(model)) == sha256:
        return
    for other in sorted(model.parent.glob("*.plan")):
        with suppress(DataError):
            engine = read_card(str(other)).engine
            if engine and (engine.onnx, engine.onnx_sha256) == (model.name, old) and other.name != replacing:
                raise UsageError(
                    f"{model}: {other.name} was built from it, and could not be rebuilt from another file; choose "
                    f"another --out, or remove {other.name}"
                )


def copy_model(model: str, folder: str) -> Card:
    """Copy `model` and then its card, checked against each other, into `folder`, a path or URL. Return the card."""
    card, data = read_model(model)
    write_model(folder, card, data)
    return card
