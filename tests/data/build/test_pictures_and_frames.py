"""Which part of a picture is taken, how it is resized, and how many images a file gives: by `dcgan-data build`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from picture_files import as_bytes, make_picture, tree
from PIL import Image

from pipeline.data.dataset import open_dataset
from pipeline.data.shard_reader import iterate

ONE = ("--workers", 1)


def built(out: Path) -> dict[str, NDArray[np.uint8]]:
    """Return pixels by key."""
    found: dict[str, NDArray[np.uint8]] = {}
    for images, columns in iterate(open_dataset(out), labels=True):
        found.update(zip(columns["key"], images, strict=True))
    return found


def source(out: Path) -> dict[str, Any]:
    described: dict[str, Any] = json.loads((out / "dataset.json").read_text())["source"]
    return described


@pytest.mark.parametrize(
    ("name", "box"),
    [
        ("celeba-108", (35, 55, 143, 163)),
        ("celeba-128", (25, 57, 153, 185)),
        ("celeba-148", (15, 35, 163, 183)),
        ("7,9,64,100", (7, 9, 71, 109)),
    ],
)
@pytest.mark.parametrize("resize", ["lanczos", "area"])
def test_a_crop_is_what_pillow_makes_of_it(
    dcgan_data: Any, tmp_path: Path, name: str, box: tuple[int, int, int, int], resize: str
) -> None:
    picture = Image.fromarray(make_picture(1, 178, 218))
    (tmp_path / "src").mkdir()
    picture.save(tmp_path / "src" / "a.jpg", quality=95)
    shown = Image.open(tmp_path / "src" / "a.jpg").crop(box)
    size = "32x50" if name[0] == "7" else "54"
    options = ("--size", size, "--crop", name, "--resize", resize)
    done = dcgan_data("build", "folder", tmp_path / "src", tmp_path / "out", *options, *ONE)
    assert done.code == 0, done.err
    width, height = (32, 50) if name[0] == "7" else (54, 54)
    how = Image.Resampling.BOX if resize == "area" else Image.Resampling.LANCZOS
    expected = np.asarray(shown.resize((width, height), how), np.int16)
    assert np.abs(built(tmp_path / "out")["a.jpg"] - expected).max() <= 1
    described = source(tmp_path / "out")
    assert described["crop"] == name
    assert described.get("resize", "lanczos") == resize
    assert "already built" in dcgan_data("build", "folder", tmp_path / "src", tmp_path / "out", *options, *ONE).out
    other = dcgan_data("build", "folder", tmp_path / "src", tmp_path / "out", "--size", size, *ONE)
    assert (other.code, f"crop='{name}' there" in other.err) == (78, True), other.err


def test_area_is_the_mean_of_the_pixels(dcgan_data: Any, tmp_path: Path) -> None:
    picture = make_picture(3, 64, 64)
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.png").write_bytes(as_bytes(Image.fromarray(picture), "PNG"))
    options = ("--size", 16, "--resize", "area", *ONE)
    assert dcgan_data("build", "folder", tmp_path / "src", tmp_path / "out", *options).code == 0
    mean = picture.reshape(16, 4, 16, 4, 3).mean((1, 3))
    assert np.abs(built(tmp_path / "out")["a.png"] - mean).max() <= 1


def test_a_crop_takes_pixels_of_arrays_and_keeps_its_proportion(dcgan_data: Any, tmp_path: Path) -> None:
    images = np.stack([make_picture(index, 40, 40) for index in range(3)])
    np.save(tmp_path / "a.npy", images)
    options = ("--size", 16, "--crop", "0,8,32,16", "--fit", "stretch", *ONE)
    done = dcgan_data("build", "arrays", tmp_path / "a.npy", tmp_path / "out", *options)
    assert done.code == 0, done.err
    for key, pixels in built(tmp_path / "out").items():
        part = Image.fromarray(images[int(key)][8:24, :32])
        assert np.abs(pixels - np.asarray(part.resize((16, 16), Image.Resampling.LANCZOS), np.int16)).max() <= 1
    assert open_dataset(tmp_path / "out").aspect == 2
    whole = ("--size", 40, "--crop", "0,0,20,20", "--encoding", "png", *ONE)  # of a picture that would be copied
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.png").write_bytes(as_bytes(Image.fromarray(images[0]), "PNG"))
    assert dcgan_data("build", "folder", tmp_path / "src", tmp_path / "png", *whole).code == 0
    part = Image.fromarray(images[0][:20, :20]).resize((40, 40), Image.Resampling.LANCZOS)
    assert (built(tmp_path / "png")["a.png"] == np.asarray(part)).all()


def test_what_a_crop_cannot_be_is_one_line(dcgan_data: Any, tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.png").write_bytes(as_bytes(Image.fromarray(make_picture(1, 40, 40)), "PNG"))
    refusals: list[tuple[tuple[str, ...], int, str]] = [
        (("--crop", "9,9,0,4"), 2, "a height of at least 1"),
        (("--crop", "eyes"), 2, "expected X,Y,W,H in pixels, or celeba-108"),
        (("--crop", "face", "--fit", "pad"), 2, "a face is cropped"),
        (("--crop", "none"), 2, "--fit pad"),
        (("--crop", "center", "--fit", "pad"), 2, "keeps the whole picture"),
        (("--crop", "30,0,11,11"), 65, "smaller than --crop 30,0,11,11"),
        (("--crop", "celeba-108"), 65, "not of 178x218 pixels"),
    ]
    for options, code, words in refusals:
        done = dcgan_data("build", "folder", tmp_path / "src", tmp_path / "out", *options, *ONE)
        assert (done.code, words in " ".join(done.err.replace("│", "").split())) == (code, True), (options, done.err)
        assert not (tmp_path / "out").exists()
    for option in ("--crop=9,9,4,4", "--all-frames"):
        refused = dcgan_data("build", "faces", tmp_path / "src", tmp_path / "out", option)
        assert (refused.code, option.partition("=")[0] in refused.err) == (2, True), refused.err
    for number, fit in enumerate(("pad", "stretch")):
        done = dcgan_data(
            "build", "folder", tmp_path / "src", tmp_path / f"{number}", "--crop", "none", "--fit", fit, *ONE
        )
        assert done.code == 0, done.err
    middle = dcgan_data("build", "folder", tmp_path / "src", tmp_path / "middle", "--crop", "center", *ONE)
    assert middle.code == 0
    assert "crop" not in source(tmp_path / "middle"), "what it is without the option"


SEVERAL: dict[str, tuple[str, dict[str, Any]]] = {
    "a.tiff": ("TIFF", {}),
    "a.gif": ("GIF", {"disposal": 2}),
    "a.webp": ("WEBP", {"lossless": True}),
    "a.png": ("PNG", {}),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_every_frame_is_an_image(dcgan_data: Any, tmp_path: Path, name: str) -> None:
    kind, options = SEVERAL[name]
    count = 7
    colors = [Image.fromarray(np.full((32, 32, 3), (30 * index, 0, 200), np.uint8)) for index in range(count)]
    images = [color.convert("P", palette=Image.Palette.ADAPTIVE) for color in colors] if kind == "GIF" else colors
    (tmp_path / "src").mkdir()
    more: dict[str, Any] = {"save_all": True, "append_images": images[1:], **options}
    (tmp_path / "src" / name).write_bytes(as_bytes(images[0], kind, **more))
    (tmp_path / "src" / "still.png").write_bytes(as_bytes(Image.fromarray(make_picture(1, 32, 32)), "PNG"))
    every = ("--size", 32, "--all-frames", *ONE)
    done = dcgan_data("build", "folder", tmp_path / "src", tmp_path / "out", *every)
    assert done.code == 0, done.err
    found = built(tmp_path / "out")
    assert sorted(found) == sorted([*(f"{name}#{index}" for index in range(count)), "still.png"])
    for index, color in enumerate(colors):
        assert np.abs(found[f"{name}#{index}"] - np.asarray(color, np.int16)).max() <= 1
    assert source(tmp_path / "out")["all_frames"] is True
    first = dcgan_data("build", "folder", tmp_path / "src", tmp_path / "first", "--size", 32, *ONE)
    assert first.code == 0
    assert sorted(built(tmp_path / "first")) == sorted([name, "still.png"])


def test_frames_are_the_same_in_parts(dcgan_data: Any, tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    for number in range(9):
        images = [Image.fromarray(make_picture(10 * number + index, 24, 24)) for index in range(1 + number % 4)]
        more: dict[str, Any] = {"save_all": True, "append_images": images[1:]}
        (tmp_path / "src" / f"{number}.tif").write_bytes(as_bytes(images[0], "TIFF", **more))
    options = ("--size", 24, "--all-frames", "--shard-images", 2, "--encoding", "png", "--shard-bytes", 65536)
    assert dcgan_data("build", "folder", tmp_path / "src", tmp_path / "one", *options, *ONE).code == 0
    for part in range(2):
        done = dcgan_data(
            "build", "folder", tmp_path / "src", tmp_path / f"p{part}", *options, *ONE, "--part", f"{part}/2"
        )
        assert done.code == 0, done.err
    assert dcgan_data("merge", tmp_path / "cut", tmp_path / "p0", tmp_path / "p1").code == 0
    assert tree(tmp_path / "one") == tree(tmp_path / "cut")
    found = built(tmp_path / "one")
    assert len(found) == sum(1 + number % 4 for number in range(9))
    for number in range(9):
        for index in range(1 + number % 4):
            key = f"{number}.tif#{index}" if number % 4 else f"{number}.tif"
            assert (found[key] == make_picture(10 * number + index, 24, 24)).all()


def test_a_file_with_a_broken_frame_is_left_out_whole(dcgan_data: Any, tmp_path: Path) -> None:
    images = [Image.fromarray(make_picture(index, 32, 32)) for index in range(4)]
    whole = as_bytes(images[0], "TIFF", save_all=True, append_images=images[1:], compression="tiff_lzw")
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.tif").write_bytes(whole[:-900])
    (tmp_path / "src" / "b.png").write_bytes(as_bytes(images[0], "PNG"))
    options = ("--size", 32, "--all-frames", "--max-bad", 1, *ONE)
    done = dcgan_data("build", "folder", tmp_path / "src", tmp_path / "out", *options)
    assert done.code == 0, done.err
    assert list(built(tmp_path / "out")) == ["b.png"]
    assert (tmp_path / "out" / "refused.txt").read_text().startswith("a.tif\t")
