"""--samples and --data take anyone's tars, in every notation, at the size that the measurement has."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from picture_files import make_picture

from pipeline.common.errors import UsageError
from pipeline.common.imaging import Pixels, encode, load_image
from pipeline.common.shapes.frame import Frame
from pipeline.evaluation import inputs
from pipeline.evaluation.images import ShardImages


def write_tars(folder: Path, sides: list[tuple[int, int]]) -> list[bytes]:
    """Write a tar for each size (width, height), with two pictures in it; return the pictures' files in order."""
    files = []
    for number, (width, height) in enumerate(sides):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for index in range(2):
                files.append(encode(make_picture(2 * number + index, width, height), "png"))
                info = tarfile.TarInfo(f"{index}.png")
                info.size = len(files[-1])
                tar.addfile(info, io.BytesIO(files[-1]))
    return files


def pixels(images: ShardImages) -> Pixels:
    return np.concatenate([block for _, block in images.blocks()])


def test_samples_are_measured_at_their_own_size(tmp_path: Path) -> None:
    write_tars(tmp_path, [(16, 16), (16, 16)])
    spec = f"{tmp_path}/{{0..1}}.tar"
    images, description = inputs.fakes(None, spec, 3, 0)
    assert isinstance(images, ShardImages)
    assert images.shape == (16, 16, 3)
    assert description["source"] == "{0..1}.tar"
    expected = [make_picture(index, 16, 16) for index in range(4)]
    found = pixels(images)
    assert len(found) == 3
    assert all(any(np.array_equal(image, other) for other in expected) for image in found)


def test_real_images_become_what_they_are_compared_with(tmp_path: Path) -> None:
    files = write_tars(tmp_path, [(40, 24), (24, 30)])
    images, description = inputs.reals(f"{tmp_path}/*.tar", None, (16, 16, 1))
    assert np.array_equal(pixels(images), np.stack([load_image(file, Frame(16, 1)) for file in files]))
    assert description["location"] == "*.tar"
    with pytest.raises(UsageError, match=r"sides of 24 to 40 pixels, .*dcgan-data index .* --size N"):
        inputs.reals(f"{tmp_path}/*.tar", None)
