"""--samples and --data take pictures as people keep them, and say what was done to them."""

import io
import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation_cases import Outcome
from picture_files import make_folder, make_picture

from pipeline.common.errors import DataError, UsageError
from pipeline.common.imaging import encode, load_image
from pipeline.common.shapes.frame import Frame
from pipeline.data.dataset import open_dataset
from pipeline.evaluation import inputs

NO_PYARROW = "pyarrow, of the extra parquet, is not installed: make test-interop"


def write(folder: Path, name: str, width: int, height: int, seed: int, channels: int = 3) -> bytes:
    folder.mkdir(parents=True, exist_ok=True)
    data = encode(make_picture(seed, width, height, channels), "png")
    (folder / name).write_bytes(data)
    return data


def images_of(location: Path, count: int | None, shape: tuple[int, int, int]) -> np.ndarray:
    return np.concatenate([block for _, block in inputs.reals(str(location), count, shape)[0].blocks()])


def test_samples_of_anyone_stand_beside_real_pictures(
    tmp_path: Path, evaluate: Callable[..., Outcome], labeled: Path
) -> None:
    theirs, reals = make_folder(tmp_path / "theirs", 20, size=32), tmp_path / "reals"
    for index in range(18):
        write(reals / "cat", f"{index}.png", 48, 40, index)
    done = evaluate("swd", "--samples", theirs, "--data", reals, "--count", 16, "--patches", 4, "--directions", 4,
                    "--out", tmp_path)  # fmt: skip
    assert done.code == 0, done.err
    written = json.loads((tmp_path / "swd.json").read_text())
    assert written["settings"] == {**written["settings"], "images": 16, "images_real": 16}
    assert written["protocol"]["samples"] == "16 pictures of 32x32 pixels, as they are"
    assert written["protocol"]["real_images"].startswith(
        "16 of 16 pictures (sides of 48x40 pixels) cropped to their central square and resized to 32x32 by Pillow's"
    )
    assert (written["data"]["location"], written["data"]["images"]) == ("reals", 18)


def test_a_folder_gives_the_images_of_a_build(tmp_path: Path) -> None:
    files = [write(tmp_path / "pictures", f"{index}.png", 30 + index, 24, index) for index in range(6)]
    expected = [load_image(file, Frame(16, 3)).tobytes() for file in files]
    some, every = (images_of(tmp_path / "pictures", count, (16, 16, 3)) for count in (4, None))
    assert sorted(image.tobytes() for image in every) == sorted(expected)
    assert np.array_equal(some, every[:4])


def test_what_is_no_set_of_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: no such file or folder; expected a data set, tars or pictures"):
        inputs.reals(str(tmp_path / "nowhere"), None, (16, 16, 3))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"no dataset.json, no tars and no pictures in it"):
        inputs.reals(str(tmp_path), None, (16, 16, 3))
    write(tmp_path / "mixed", "a.png", 16, 16, 0)
    write(tmp_path / "mixed", "b.png", 24, 24, 1)
    with pytest.raises(UsageError, match=r"sides of 16 to 24 pixels, .*dcgan-data build folder .* --size N"):
        inputs.fakes(None, str(tmp_path / "mixed"), 10, 0)


def test_gray_samples_stay_gray_and_classes_are_labels(tmp_path: Path) -> None:
    for index in range(4):
        write(tmp_path / "gray" / "ab"[index % 2], f"{index}.png", 16, 16, index, channels=1)
    images, description = inputs.fakes(None, str(tmp_path / "gray"), 10, 0)
    assert images.shape == (16, 16, 1)
    assert description["preparation"] == "4 pictures of 16x16 pixels, as they are"
    assert inputs.data_set(str(tmp_path / "gray")).labels == {"class": "str"}


def test_a_data_set_is_still_a_data_set(labeled: Path) -> None:
    assert inputs.data_set(str(labeled)) == open_dataset(labeled)
    assert inputs.reals(str(labeled), 9)[1]["preparation"] == "as the data set stores them"


def encoded() -> list[bytes]:
    return [encode(make_picture(index, 20, 16), "png") for index in range(5)]


def a_zip(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        for index, data in enumerate(encoded()):
            archive.writestr(f"all/{index}.png", data)
    return folder / "a.zip"


def a_compressed_tar(folder: Path) -> Path:
    with tarfile.open(folder / "a.tar.gz", "w:gz") as archive:
        for index, data in enumerate(encoded()):
            info = tarfile.TarInfo(f"{index}.png")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return folder / "a.tar.gz"


def arrays(folder: Path) -> Path:
    np.savez(folder / "a.npz", images=np.stack([make_picture(index, 20, 16) for index in range(5)]))
    return folder / "a.npz"


def write_table(path: Path, **columns: list[Any]) -> Path:
    pa = pytest.importorskip("pyarrow", reason=NO_PYARROW)
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path)
    return path


def a_table(folder: Path) -> Path:
    rows = [{"bytes": data, "path": None} for data in encoded()]
    return write_table(folder / "a.parquet", image=rows, label=[index % 2 for index in range(5)])


@pytest.mark.parametrize("make", [a_zip, a_compressed_tar, arrays, a_table])
def test_archives_tables_and_arrays_hold_pictures_too(make: Callable[[Path], Path], tmp_path: Path) -> None:
    pictures = [make_picture(index, 20, 16) for index in range(5)]
    file = make(tmp_path)
    images, description = inputs.fakes(None, str(file), 10, 0)
    assert images.shape == (16, 20, 3)
    (block,) = (pixels for _, pixels in images.blocks())
    assert sorted(image.tobytes() for image in block) == sorted(image.tobytes() for image in pictures)
    assert description["preparation"].startswith("5 pictures of 20x16 pixels, as they are; read as a")
    assert description["source"] == file.name
    if make is a_table:
        assert inputs.data_set(str(file)).labels == {"label": "int"}


def test_one_form_stands_beside_another(tmp_path: Path, evaluate: Callable[..., Outcome]) -> None:
    reals = make_folder(tmp_path / "reals", 18, size=40)
    shutil.make_archive(str(tmp_path / "reals"), "zip", reals)
    np.save(tmp_path / "theirs.npy", np.stack([make_picture(index, 32, 32) for index in range(20)]))
    done = evaluate("ms-ssim", "--samples", tmp_path / "theirs.npy", "--data", tmp_path / "reals.zip", "--count", 16,
                    "--out", tmp_path)  # fmt: skip
    assert done.code == 0, done.err
    written = json.loads((tmp_path / "ms_ssim.json").read_text())
    protocol = written["protocol"]
    assert protocol["samples"] == "16 pictures of 32x32 pixels, as they are; read as a file of arrays"
    assert protocol["real_images"] == (
        "16 of 16 pictures (sides of 40x40 pixels) cropped to their central square and resized to 32x32 by Pillow's "
        "Lanczos filter, antialiased; read as a zip of pictures"
    )
    assert (written["data"]["location"], written["data"]["images"]) == ("reals.zip", 18)


def test_files_that_hold_no_pictures_are_refused_in_one_line(tmp_path: Path, evaluate: Callable[..., Outcome]) -> None:
    with zipfile.ZipFile(tmp_path / "texts.zip", "w") as archive:
        archive.writestr("a.txt", "x")
    (tmp_path / "cut.zip").write_bytes(a_zip(tmp_path).read_bytes()[:200])
    np.savez(tmp_path / "numbers.npz", x=np.zeros(3))
    (tmp_path / "notes.txt").write_text("x")
    for name, message in (
        ("texts.zip", "no images here"),
        ("cut.zip", "zip"),
        ("numbers.npz", "numbers.npz"),
        ("notes.txt", "notes.txt: not recognized: neither a folder, an archive, a table nor arrays"),
        ("nosuch.zip", "nosuch.zip"),
        ("some/name", "no such file or folder; expected a data set, tars or pictures"),
    ):
        done = evaluate("ms-ssim", "--samples", tmp_path / name, "--out", tmp_path / "out")
        assert done.code in (2, 65), done.err
        assert message in done.err
        assert done.err.rstrip().count("\n") == 0, done.err


def test_a_table_without_pictures_or_with_two_columns_of_them_is_refused(
    tmp_path: Path, evaluate: Callable[..., Outcome]
) -> None:
    two = [{"bytes": data, "path": None} for data in encoded()]
    for path, message in (
        (write_table(tmp_path / "numbers.parquet", x=[1, 2]), "numbers.parquet"),
        (write_table(tmp_path / "two.parquet", before=two, after=two), f"build parquet {tmp_path}/two.parquet OUT"),
    ):
        done = evaluate("ms-ssim", "--samples", path, "--out", tmp_path / "out")
        assert done.code in (2, 65), done.err
        assert message in done.err
        assert done.err.rstrip().count("\n") == 0, done.err
