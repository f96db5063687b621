"""`dcgan-data convert`: a data set as other programs read it: a folder of pictures, a zip of one, or parquet files."""

import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.common.errors import DataError, UsageError
from pipeline.common.imaging import encode
from pipeline.common.progress import Progress
from pipeline.common.storage import UMASK, atomic_path, fsync_directory, is_url, made_directory, require_writable
from pipeline.data.dataset import Dataset, LabelType
from pipeline.data.shard_reader import iterate
from pipeline.data.sources.interface import read_picture
from pipeline.data.sources.tables.files import pyarrow
from pipeline.data.sources.tars import Tars, list_dataset

METADATA = "metadata.jsonl"
"""Labels beside pictures, as the imagefolder of Hugging Face reads them, and `dcgan-data build folder`."""
FILE_BYTES = 400_000_000
"""Bytes of pictures in a parquet file: as many as the Hub advises."""
GROUP_ROWS = 256
"""Pictures in a row group: readers that take one at a time unpack no more."""
ARROW: dict[LabelType, str] = {"bool": "bool_", "int": "int64", "float": "float64", "str": "string"}


class Picture(NamedTuple):
    """An image of a data set, encoded."""

    name: str
    """Its file name: its number in the data set. Names from pictures never become paths."""
    data: bytes
    labels: dict[str, Any]
    """The image's own name, under `key`, and its labels."""


def convert(dataset: Dataset, target: str, to: str) -> None:
    """Write a data set to `target`: a `folder` of pictures, a `zip` of them, or a folder of `parquet` files.

    Encoded images stay byte for byte; pixels become PNGs. What is written is there whole, or not at all. Raises
    UserError.
    """
    if is_url(target):
        raise UsageError(f"{target}: convert writes to a disk; choose a folder there, and copy it")
    path = Path(target.rstrip("/") or "/")
    if path.exists() and (to == "zip" or not path.is_dir() or any(path.iterdir())):
        raise UsageError(f"{target}: is there already; choose a new name")
    require_writable(path.parent)
    if to == "parquet":
        pyarrow(target)
    with Progress("writing", dataset.images, "images") as progress:
        pictures = _counted(_pictures(dataset), progress)
        if to == "zip":
            _write_zip(path, pictures)
        else:
            with _new_folder(path) as folder:
                (_write_folder if to == "folder" else _write_parquet)(folder, pictures, dataset)
    print(f"{target}: {dataset.images:,} images of {dataset.in_words} as {to}")


def _pictures(dataset: Dataset) -> Iterator[Picture]:
    """Yield all images in their order."""
    digits = max(6, len(str(dataset.images - 1)))
    if dataset.encoding in ("packed", "tar"):
        number = 0
        for images, columns in iterate(dataset, labels=True):
            for index, image in enumerate(images):
                labels = {name: values[index] for name, values in columns.items()}
                yield Picture(f"{number:0{digits}d}.png", encode(image, "png"), labels)
                number += 1
        return
    source = Tars(dataset.location)
    for number, item in enumerate(list_dataset(dataset).items):
        data = read_picture(source, item)
        assert isinstance(data, bytes)
        labels = {"key": item.key, **dict(zip(dataset.labels, item.labels, strict=True))}
        yield Picture(f"{number:0{digits}d}.{dataset.encoding}", data, labels)


def _counted(pictures: Iterator[Picture], progress: Progress) -> Iterator[Picture]:
    for picture in pictures:
        yield picture
        progress.advance(1)


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """Yield a folder that becomes `path` at the end, or is removed after an error."""
    with made_directory(path.parent):
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            yield folder
            folder.chmod(0o777 & ~UMASK)
            _fsync_all(folder)
            folder.replace(path)
            fsync_directory(path.parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _fsync_all(folder: Path) -> None:
    """Make the files in a folder durable: all at the end, when most of them are on the disk already."""
    names = os.listdir(folder)
    with Progress("saving", len(names), "files") as progress:
        for name in names:
            with (folder / name).open("rb") as file:
                os.fsync(file.fileno())
            progress.advance(1)
    fsync_directory(folder)


def _write_folder(folder: Path, pictures: Iterator[Picture], dataset: Dataset) -> None:
    with (folder / METADATA).open("w", encoding="utf-8") as metadata:
        for picture in pictures:
            (folder / picture.name).write_bytes(picture.data)
            metadata.write(_line(picture))


def _write_zip(path: Path, pictures: Iterator[Picture]) -> None:
    """Write a zip without compression, which pictures have already, and without times."""
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        lines = []
        for picture in pictures:
            archive.writestr(zipfile.ZipInfo(picture.name), picture.data)
            lines.append(_line(picture))
        archive.writestr(zipfile.ZipInfo(METADATA), "".join(lines))


def _line(picture: Picture) -> str:
    row = {"file_name": picture.name, **picture.labels}
    return json.dumps({name: None if _is_nan(value) else value for name, value in row.items()}) + "\n"


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and value - value != 0


def _write_parquet(folder: Path, pictures: Iterator[Picture], dataset: Dataset) -> None:
    """Write files with the names and the metadata by which the Hub and `datasets` know pictures and splits."""
    pa = pyarrow(str(folder))
    split = "validation" if dataset.source.get("split") == "val" else "train"
    files = -(-dataset.bytes // FILE_BYTES)
    kinds: dict[str, LabelType] = {"key": "str", **dataset.labels}
    if "image" in kinds:
        raise DataError("a label is named 'image', as the column of the pictures is; leave it out of the data set")
    fields = [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))]
    fields += [(name, getattr(pa, ARROW[kind])()) for name, kind in kinds.items()]
    types: dict[str, Any] = {name: {"dtype": ARROW[kind].rstrip("_"), "_type": "Value"} for name, kind in kinds.items()}
    features = {"info": {"features": {"image": {"_type": "Image"}, **types}}}
    schema = pa.schema(fields, metadata={"huggingface": json.dumps(features)})
    compression = {"image.bytes": "none", "image.path": "snappy", **dict.fromkeys(kinds, "snappy")}
    for number in range(files):
        count = dataset.images * (number + 1) // files - dataset.images * number // files
        name = folder / f"{split}-{number:05d}-of-{files:05d}.parquet"
        with pa.parquet.ParquetWriter(name, schema, compression=compression, use_dictionary=list(kinds)) as writer:
            while count > 0 and (some := list(islice(pictures, min(count, GROUP_ROWS)))):
                count -= len(some)
                columns = [[{"bytes": picture.data, "path": picture.name} for picture in some]]
                columns += [[picture.labels[name] for picture in some] for name in kinds]
                arrays = [pa.array(values, kind) for values, (_, kind) in zip(columns, fields, strict=True)]
                writer.write_table(pa.Table.from_arrays(arrays, schema=schema), row_group_size=GROUP_ROWS)
