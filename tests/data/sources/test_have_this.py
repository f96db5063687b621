"""Every row of the table "Have this → type this" of docs/data.md: its command, as it stands, gives the right pixels.

They are compared with what Pillow, numpy, pydicom and the formats' own libraries hold, within one gray level.
"""

import json
import re
import shlex
import tarfile
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
import pytest
from damage import dicom
from numpy.typing import NDArray
from packed_files import example, record, write_litdata, write_mds
from picture_files import as_bytes, make_picture
from PIL import Image
from support import ROOT

from pipeline.data.dataset import open_dataset
from pipeline.data.shard_reader import iterate

COUNT = 10
PICTURES = [make_picture(index, 32, 32) for index in range(COUNT)]
Pixels = NDArray[np.uint8]
LABELS = {"n": "int"}


def png(picture: Pixels) -> bytes:
    return as_bytes(Image.fromarray(picture), "PNG")


def folder(name: str) -> Callable[[Path], list[Pixels]]:
    def make(root: Path) -> list[Pixels]:
        (root / name).mkdir(parents=True)
        for index, picture in enumerate(PICTURES):
            (root / name / f"{index}.png").write_bytes(png(picture))
        return PICTURES

    return make


def zipped(name: str, beside: dict[str, str] | None = None) -> Callable[[Path], list[Pixels]]:
    def make(root: Path) -> list[Pixels]:
        with zipfile.ZipFile(root / name, "w", zipfile.ZIP_DEFLATED) as archive:
            for index, picture in enumerate(PICTURES):
                archive.writestr(f"{index}.png", png(picture))
            for inside, text in (beside or {}).items():
                archive.writestr(inside, text)
        return PICTURES

    return make


def with_table(root: Path) -> list[Pixels]:
    (root / "labels.csv").write_text(CSV)
    return zipped("pics.zip")(root)


def phone(root: Path) -> list[Pixels]:
    """Write HEIC pictures into a zip, where the command before them looks."""
    shown = []
    with zipfile.ZipFile(root / "pics.zip", "w") as archive:
        for index, picture in enumerate(PICTURES):
            path = root / f"{index}.heic"
            pillow_heif.from_pillow(Image.fromarray(picture)).save(path, quality=90)
            shown.append(np.asarray(pillow_heif.open_heif(path)))
            archive.write(path, path.name)
    return shown


def tables(*names: str) -> Callable[[Path], list[Pixels]]:
    def make(root: Path) -> list[Pixels]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        for number, name in enumerate(names):
            some = range(COUNT)[number :: len(names)]
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            column = pa.array([{"bytes": png(PICTURES[index]), "path": None} for index in some], image)
            pq.write_table(pa.table({"image": column, "n": list(some)}), root / name)
        return PICTURES

    return make


def scans(frames: int) -> Callable[[Path], list[Pixels]]:
    """Write a DICOM file. Its values are 0 to 4095 in rows, and 1024 is taken off."""

    def make(root: Path) -> list[Pixels]:
        (root / "scans").mkdir()
        units = (np.arange(1024 * frames) % 4096).reshape(frames, 32, 32) - 1024.0
        if frames == 1:
            (root / "scans" / "a.dcm").write_bytes(dicom(1))
            gray = np.clip((units + 1000) / 1400, 0, 1) * 255
            return [np.round(one).astype(np.uint8)[..., None] for one in gray]
        pages = [Image.fromarray(picture) for picture in PICTURES]
        more: dict[str, Any] = {"save_all": True, "append_images": pages[1:]}
        (root / "scans" / "a.tif").write_bytes(as_bytes(pages[0], "TIFF", **more))
        return PICTURES

    return make


def arrays(root: Path) -> list[Pixels]:
    np.savez(root / "images.npz", images=np.stack(PICTURES), labels=np.arange(COUNT))
    return PICTURES


def records(root: Path) -> list[Pixels]:
    (root / "tfrecords").mkdir()
    for shard in (0, 1):
        data = [record(example(image__encoded=png(PICTURES[i]), n=i)) for i in range(shard * 5, shard * 5 + 5)]
        (root / "tfrecords" / f"train-{shard:05d}-of-00002").write_bytes(b"".join(data))
    return PICTURES


def mds(root: Path) -> list[Pixels]:
    write_mds(root / "mds", 0)
    return PICTURES


def litdata(root: Path) -> list[Pixels]:
    write_litdata(root / "optimized", COUNT)
    return PICTURES


def tars(root: Path) -> list[Pixels]:
    (root / "tars").mkdir()
    for number in range(4):
        with tarfile.open(root / "tars" / f"{number:04d}.tar", "w") as archive:
            for index in range(COUNT)[number::4]:
                (root / f"{index}.png").write_bytes(png(PICTURES[index]))
                archive.add(root / f"{index}.png", f"{index}.png")
    return PICTURES


def celeba(root: Path) -> list[Pixels]:
    (root / "CelebA").mkdir()
    shown = []
    with zipfile.ZipFile(root / "CelebA" / "img_align_celeba.zip", "w") as archive:
        for index in range(COUNT):
            data = as_bytes(Image.fromarray(make_picture(index, 178, 218)), "JPEG", quality=95)
            archive.writestr(f"img_align_celeba/{index + 1:06d}.jpg", data)
            (root / "a.jpg").write_bytes(data)
            middle = Image.open(root / "a.jpg").resize((32, 32), Image.Resampling.LANCZOS, (0, 20, 178, 198))
            shown.append(np.asarray(middle))
    lines = [str(COUNT), "Male", *(f"{index + 1:06d}.jpg {1 - 2 * (index % 2)}" for index in range(COUNT))]
    (root / "CelebA" / "list_attr_celeba.txt").write_text("\n".join(lines) + "\n")
    return shown


CSV = "file_name,n\n" + "".join(f"{index}.png,{index}\n" for index in range(COUNT))
STYLEGAN = json.dumps({"labels": [[f"{index}.png", index] for index in range(COUNT)]})
CASES: dict[str, tuple[Callable[[Path], list[Pixels]], dict[str, str]]] = {
    "any of these": (folder("SRC"), {}),
    "a folder of pictures": (folder("photos"), {}),
    "`pics.zip`": (zipped("pics.zip"), {}),
    "pictures with `metadata.csv`": (zipped("pics.zip", {"metadata.csv": CSV}), LABELS),
    "pictures and a table of labels": (with_table, LABELS),
    "`.heic` of a phone": (phone, {}),
    "a data set of the Hub": (tables("ylecun/mnist/data/train-00000-of-00001.parquet"), LABELS),
    "`train-00000-of-00006.parquet`": (tables("train-00000-of-00002.parquet", "train-00001-of-00002.parquet"), LABELS),
    "DICOM files": (scans(1), {}),
    "TIFFs with pages": (scans(2), {}),
    "StyleGAN's": (zipped("ffhq.zip", {"dataset.json": STYLEGAN}), {"label": "int"}),
    "`.npz`, `.npy`": (arrays, {"label": "int"}),
    "TFRecords": (records, LABELS),
    "a folder of MosaicML's streaming": (mds, {"number": "int", "text": "str"}),
    "WebDataset tars": (tars, {}),
    "`img_align_celeba.zip`": (celeba, {"male": "bool"}),
}
"""What the first column of a row begins with, what makes such files, and the labels that are found."""


def rows() -> dict[str, str]:
    """Return the table's second column by its first."""
    text = (ROOT / "docs" / "data.md").read_text().partition("## Have this → type this\n")[2]
    table = text.partition("\n\n")[0].splitlines()[2:]
    found = {}
    for line in table:
        have, command = line.strip("| ").split(" | ", 1)
        found[have] = command
    return found


def command(have: str) -> list[str]:
    """Return the words of a row's command; one that begins with … or is none goes on with the one before."""
    before = ""
    for first, text in rows().items():
        words = re.findall(r"`((?:dcgan-data|… --)[^`]*)`", text)
        now = words[0] if words else before
        now = f"{before}{now[1:]}" if now.startswith("…") else now
        if first == have:
            return shlex.split(now.replace("{0000..1023}", "{0000..0003}"))
        before = now if words and not words[0].startswith("…") else before
    raise AssertionError(have)


def check(found: list[Pixels], expected: list[Pixels]) -> None:
    """Check that these are the images, in whatever order."""
    assert len(found) == len(expected)
    left = list(found)
    for picture in expected:
        distances = [np.abs(image.astype(int) - picture).max() for image in left]
        nearest = int(np.argmin(distances))
        assert distances[nearest] <= 1
        left.pop(nearest)


def test_every_row_has_a_case() -> None:
    without = [have for have in rows() if not any(have.startswith(case) for case in CASES)]
    assert without == ["LSUN, CIFAR-10, MNIST, SVHN, ImageNet, FFHQ"]
    assert len(rows()) == len(CASES) + 1


@pytest.mark.parametrize("case", CASES)
def test_the_command_gives_the_right_pixels(
    dcgan_data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    make, labels = CASES[case]
    words = command(next(have for have in rows() if have.startswith(case)))
    if {"parquet", "huggingface"} & set(words) and not find_spec("pyarrow"):
        pytest.skip("pyarrow, of the extra parquet, is not installed: make test-interop")
    monkeypatch.chdir(tmp_path)
    expected = make(tmp_path)
    done = dcgan_data(*words[1:], "--size", 32, "--workers", 1)
    assert done.code == 0, (words, done.err)
    out = words[4 if len(words) > 4 and not words[4].startswith("-") else 3]
    found: list[Pixels] = [image for batch in iterate(open_dataset(out)) for image in batch]
    check(found, expected)
    assert open_dataset(out).labels == labels


def test_litdata_as_its_row_says(dcgan_data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "`… litdata optimized/ …`" in rows()["a folder of MosaicML's streaming (MDS), or of litdata"]
    monkeypatch.chdir(tmp_path)
    expected = litdata(tmp_path)
    done = dcgan_data("build", "litdata", "optimized/", "shards/mine", "--size", 32, "--workers", 1)
    assert done.code == 0, done.err
    check([image for batch in iterate(open_dataset("shards/mine")) for image in batch], expected)
