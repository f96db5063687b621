"""Files of every format that is read, as their own libraries write them, and ways to damage them."""

import gzip
import io
import json
import pickle
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import pillow_heif
from numpy.typing import NDArray
from packed_files import example, png, record, write_litdata, write_litdata_arrow, write_mds
from picture_files import as_bytes, make_picture
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, RLELossless, generate_uid
from scipy.io import savemat

COUNT = 6
"""Pictures of each container."""
ARRAY = np.stack([make_picture(index, 32, 32) for index in range(COUNT)])


def dicom(frames: int, compressed: bool = False) -> bytes:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=["a"])
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    file.Rows = file.Columns = 32
    file.NumberOfFrames = frames
    file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
    file.BitsAllocated, file.BitsStored, file.HighBit, file.PixelRepresentation = 16, 12, 11, 0
    file.WindowCenter, file.WindowWidth, file.RescaleSlope, file.RescaleIntercept = 40, 400, 1, -1024
    file.PixelData = (np.arange(1024 * frames) % 4096).astype(np.uint16).tobytes()
    if compressed:
        file.compress(RLELossless)
    buffer = io.BytesIO()
    file.save_as(buffer)
    return buffer.getvalue()


def heic() -> bytes:
    buffer = io.BytesIO()
    pillow_heif.from_pillow(Image.fromarray(make_picture(1, 64, 64))).save(buffer, quality=80)
    return buffer.getvalue()


def pictures() -> dict[str, bytes]:
    """Return one file of every format of pictures."""
    one, gray = Image.fromarray(make_picture(1)), Image.fromarray((make_picture(2)[..., 0].astype(np.uint16) << 8) + 7)
    several: dict[str, Any] = {"save_all": True, "append_images": [Image.fromarray(make_picture(i)) for i in (3, 4, 5)]}
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "jpeg": as_bytes(one, "JPEG", quality=90, exif=exif),
        "progressive": as_bytes(one, "JPEG", progressive=True),
        "cmyk": as_bytes(one.convert("CMYK"), "JPEG"),
        "png": as_bytes(one, "PNG"),
        "palette": as_bytes(one.convert("P"), "PNG", transparency=3),
        "16 bits": as_bytes(gray, "PNG"),
        "apng": as_bytes(one, "PNG", **several),
        "webp": as_bytes(one, "WEBP"),
        "webp of frames": as_bytes(one, "WEBP", lossless=True, **several),
        "gif": as_bytes(one, "GIF", **several),
        "bmp": as_bytes(one, "BMP"),
        "ppm": as_bytes(one, "PPM"),
        "tiff": as_bytes(one, "TIFF", **several),
        "lzw": as_bytes(gray, "TIFF", compression="tiff_lzw"),
        "float": as_bytes(
            Image.fromarray(make_picture(1)[..., 0] / np.float32(255)), "TIFF", compression="tiff_deflate"
        ),
        "avif": as_bytes(one, "AVIF"),
        "jpeg 2000": as_bytes(one, "JPEG2000"),
        "heic": heic(),
        "dicom": dicom(1),
        "dicom of frames": dicom(3),
        "rle": dicom(2, compressed=True),
    }


class Container(NamedTuple):
    """What holds COUNT pictures, and how it is built."""

    kind: str
    """The source."""
    make: Callable[[Path], str]
    """Writes it into a folder, and returns SRC below that."""
    counted: bool = True
    """Whether its form has a second word on how many pictures it holds, so that a changed number is noticed."""


def members() -> dict[str, bytes]:
    return {f"cat/{index}.png" if index % 2 else f"dog/{index}.png": png(index) for index in range(COUNT)}


def zipped(method: int) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        with zipfile.ZipFile(folder / "a.zip", "w", method) as archive:
            for name, data in members().items():
                archive.writestr(zipfile.ZipInfo(name), data, method)
        return "a.zip"

    return make


def nested(folder: Path) -> str:
    zipped(zipfile.ZIP_DEFLATED)(folder)
    inner = (folder / "a.zip").read_bytes()
    with zipfile.ZipFile(folder / "archive.zip", "w") as archive:
        archive.writestr(zipfile.ZipInfo("inner.zip"), inner)
    (folder / "a.zip").unlink()
    return "archive.zip"


def tarred(suffix: str, mode: str, samples: bool = False) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        content = members()
        if samples:
            content = {
                f"{i}.{end}": png(i) if end == "png" else b"%d" % i for i in range(COUNT) for end in ("png", "cls")
            }
        with tarfile.open(folder / f"a.{suffix}", mode) as archive:  # type: ignore[call-overload]
            for name, data in content.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
        return f"a.{suffix}"

    return make


def table(name: str) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        import pyarrow as pa
        import pyarrow.parquet as pq

        image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        column = pa.array([{"bytes": png(i), "path": f"{i}.png"} for i in range(COUNT)], image)
        content = pa.table({"image": column, "label": pa.array(range(COUNT)), "text": [f"t{i}" for i in range(COUNT)]})
        if name == "a.parquet":
            pq.write_table(content, folder / name, row_group_size=4)
        else:
            new = pa.ipc.new_file if name == "file.arrow" else pa.ipc.new_stream
            with (folder / name).open("wb") as file, new(file, content.schema) as writer:
                writer.write_table(content, max_chunksize=4)
        return name

    return make


def arrays(write: Callable[..., None], name: str) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        write(folder / name, images=ARRAY, labels=np.arange(COUNT))
        return name

    return make


def npy(folder: Path) -> str:
    np.save(folder / "a.npy", ARRAY)
    return "a.npy"


def hdf5(path: Path, **named: NDArray[Any]) -> None:
    with h5py.File(path, "w", libver="latest") as file:  # whose headers have checksums
        for name, values in named.items():
            file.create_dataset(name, data=values, chunks=(1, *values.shape[1:]), compression="gzip", fletcher32=True)


def tfrecord(folder: Path) -> str:
    data = b"".join(record(example(image__encoded=png(i), label=i, text=b"t")) for i in range(COUNT))
    (folder / "a.tfrecord").write_bytes(data)
    return "a.tfrecord"


def mds(folder: Path) -> str:
    write_mds(folder / "mds", 0)
    return "mds"


def litdata(folder: Path) -> str:
    write_litdata(folder / "lit", 10)
    return "lit"


def litdata_arrow(folder: Path) -> str:
    write_litdata_arrow(folder / "lit", 10)
    return "lit"


def idx(folder: Path, pack: Callable[[bytes], bytes] = bytes) -> str:
    suffix = ".gz" if pack is not bytes else ""
    images = struct.pack(">4B3I", 0, 0, 8, 3, COUNT, 32, 32) + ARRAY[..., 0].tobytes()
    (folder / f"train-images-idx3-ubyte{suffix}").write_bytes(pack(images))
    (folder / f"train-labels-idx1-ubyte{suffix}").write_bytes(
        pack(struct.pack(">4BI", 0, 0, 8, 1, COUNT) + bytes(COUNT))
    )
    return "."


def cifar(folder: Path) -> str:
    place = folder / "cifar-10-batches-py"
    place.mkdir()
    planes = ARRAY.transpose(0, 3, 1, 2).reshape(COUNT, -1)
    empty = {"data": planes[:0], "labels": []}
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        content = {"data": planes, "labels": list(range(COUNT))} if name == "data_batch_1" else empty
        (place / name).write_bytes(pickle.dumps(content))
    (place / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"n{i}" for i in range(10)]}))
    return "cifar-10-batches-py"


def svhn(folder: Path) -> str:
    savemat(folder / "train_32x32.mat", {"X": ARRAY.transpose(1, 2, 3, 0), "y": np.arange(1, COUNT + 1)[:, None]})
    return "."


def labeled(name: str) -> Callable[[Path], str]:
    """Return what writes pictures and a table of their labels, in the form of its name."""

    def make(folder: Path) -> str:
        rows = [{"file_name": f"{index}.png", "n": index, "t": f"t{index}"} for index in range(COUNT)]
        for index in range(COUNT):
            (folder / f"{index}.png").write_bytes(png(index))
        text = {
            "metadata.csv": "file_name,n,t\n" + "".join(",".join(map(str, row.values())) + "\n" for row in rows),
            "metadata.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
            "dataset.json": json.dumps({"labels": [[row["file_name"], row["n"]] for row in rows]}),
        }[name]
        (folder / name).write_text(text)
        return "."

    return make


CONTAINERS = {
    "zip, stored": Container("folder", zipped(zipfile.ZIP_STORED)),
    "zip, deflated": Container("folder", zipped(zipfile.ZIP_DEFLATED)),
    "zip in a zip": Container("folder", nested),
    "tar": Container("folder", tarred("tar", "w")),
    "tar.gz": Container("folder", tarred("tar.gz", "w:gz")),
    "tar.bz2": Container("folder", tarred("tar.bz2", "w:bz2")),
    "tar.xz": Container("folder", tarred("tar.xz", "w:xz")),
    "webdataset": Container("webdataset", tarred("tar", "w", samples=True)),
    "npz": Container("arrays", arrays(np.savez, "a.npz")),
    "npz, packed": Container("arrays", arrays(np.savez_compressed, "a.npz")),
    "npy": Container("arrays", npy),
    "hdf5": Container("arrays", arrays(hdf5, "a.h5")),
    "tfrecord": Container("tfrecord", tfrecord),
    "mds": Container("mds", mds),
    "litdata": Container("litdata", litdata),
    "idx": Container("mnist", idx),
    "idx, packed": Container("mnist", lambda folder: idx(folder, gzip.compress)),
    "cifar": Container("cifar10", cifar, counted=False),
    "svhn": Container("svhn", svhn),
    "csv": Container("folder", labeled("metadata.csv")),
    "jsonl": Container("folder", labeled("metadata.jsonl")),
    "stylegan": Container("folder", labeled("dataset.json")),
}
if find_spec("pyarrow"):
    CONTAINERS |= {
        "parquet": Container("parquet", table("a.parquet")),
        "arrow stream": Container("parquet", table("stream.arrow")),
        "arrow file": Container("parquet", table("file.arrow")),
        "litdata, arrow": Container("litdata", litdata_arrow),
    }


def damage(data: bytes, rng: random.Random) -> bytes:
    """Return a file's content with something wrong: a cut, flipped bits, other numbers, a piece lost, or twice."""
    if not data:
        return b"\0"
    at, size = rng.randrange(len(data)), 1 << rng.randrange(9)
    changed = bytearray(data)
    match rng.randrange(8):
        case 0:
            return data[:at]
        case 1 | 2:  # near the beginning, where headers are, as often as anywhere
            changed[rng.choice((at, at % 64, at % 256))] ^= 1 << rng.randrange(8)
        case 3:
            for _ in range(rng.randrange(2, 12)):
                changed[rng.randrange(len(data))] = rng.randrange(256)
        case 4:
            number = rng.choice((0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 64) - 1))
            width = rng.choice((2, 4, 8))
            part = (number % (1 << 8 * width)).to_bytes(width, rng.choice(("little", "big")))
            at = rng.choice((at, at % 64, at % 256))
            changed[at : at + width] = part[: len(data) - at]
        case 5:
            changed[at : at + size] = bytes([rng.choice((0, 255))]) * len(changed[at : at + size])
        case 6:
            del changed[at : at + size]
        case _:
            changed[at:at] = changed[at : at + size]
    return bytes(changed)
