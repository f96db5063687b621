"""--samples and --data take pictures as people keep them, and say what was done to them."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from evaluation_cases import Outcome
from picture_files import make_folder, make_picture

from pipeline.common.errors import DataError, UsageError
from pipeline.common.imaging import encode, load_image
from pipeline.common.shapes.frame import Frame
from pipeline.data.dataset import open_dataset
from pipeline.evaluation import inputs


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
    with pytest.raises(DataError, match=r"nowhere: no such folder; expected a data set, tars or pictures"):
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
