"""Faces are found in photographs, cut out square with a margin, and what was skipped is written down."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from picture_files import make_picture
from PIL import Image

from pipeline.common.imaging import Pixels, encode
from pipeline.data.dataset import open_dataset
from pipeline.data.shard_reader import iterate

PORTRAIT = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
FACE = (160, 110, 210)  # left, top and side of her face in the portrait, by eye


@pytest.fixture(scope="module")
def portrait() -> Image.Image:
    return Image.open(PORTRAIT).convert("RGB")


def overlap(row: dict[str, Any], left: int, top: int, side: int) -> float:
    """Return the intersection over union of a found box and a known one."""
    x = max(0, min(row["face_x"] + row["face_side"], left + side) - max(row["face_x"], left))
    y = max(0, min(row["face_y"] + row["face_side"], top + side) - max(row["face_y"], top))
    return float(x * y / (row["face_side"] ** 2 + side**2 - x * y))


def faces_of(out: Path) -> dict[str, tuple[Pixels, dict[str, Any]]]:
    images, columns = next(iterate(open_dataset(out), labels=True))
    return {key: (images[i], {name: columns[name][i] for name in columns}) for i, key in enumerate(columns["key"])}


def test_frontal_faces_are_found_wherever_they_are(dcgan_data: Any, tmp_path: Path, portrait: Image.Image) -> None:
    src = tmp_path / "src"
    src.mkdir()
    portrait.save(src / "one.jpg", quality=92)
    two = Image.new("RGB", (1300, 700), (90, 120, 90))
    two.paste(portrait, (30, 60))
    two.paste(portrait.transpose(Image.Transpose.FLIP_LEFT_RIGHT), (700, 20))
    two.save(src / "two.jpg", quality=92)
    portrait.resize((1536, 1800)).save(src / "large.jpg", quality=85)
    portrait.resize((128, 150)).save(src / "small.jpg", quality=92)
    (src / "none.png").write_bytes(encode(make_picture(1, 300, 300), "png"))
    (src / "broken.jpg").write_bytes(b"\xff\xd8broken")
    done = dcgan_data("build", "faces", src, tmp_path / "out", "--size", 64, "--max-bad", 0.2, "--workers", 1)
    assert done.code == 0, done.err
    faces = faces_of(tmp_path / "out")
    assert set(faces) == {"one.jpg#0", "two.jpg#0", "two.jpg#1", "large.jpg#0"}
    left, top, side = FACE
    assert overlap(faces["one.jpg#0"][1], left, top, side) > 0.6
    assert overlap(faces["two.jpg#0"][1], left + 30, top + 60, side) > 0.6
    assert overlap(faces["two.jpg#1"][1], 512 - left - side + 700, top + 20, side) > 0.6
    assert overlap(faces["large.jpg#0"][1], 3 * left, 3 * top, 3 * side) > 0.6
    for key in ("two.jpg#0", "large.jpg#0"):  # the same face, cut the same way
        assert np.abs(faces[key][0].astype(int) - faces["one.jpg#0"][0]).mean() < 40
    assert (
        dcgan_data(
            "build", "folder", src, tmp_path / "same", *["--crop", "face", "--size", "64", "--max-bad", "0.2"]
        ).code
        == 0
    )
    assert (tmp_path / "same" / "faces.png").is_file()
    for key, (pixels, row) in faces_of(tmp_path / "same").items():
        assert np.array_equal(pixels, faces[key][0])
        assert row == faces[key][1]
    skipped = dict(line.split("\t") for line in (tmp_path / "out" / "skipped.txt").read_text().splitlines())
    assert skipped["none.png"] == "no face"
    assert "small.jpg" in skipped
    assert (tmp_path / "out" / "refused.txt").read_text().startswith("broken.jpg\t")
    assert Image.open(tmp_path / "out" / "faces.png").size == (4 * 64, 64)
    assert open_dataset(tmp_path / "out").source["detector"] == "haar"
    options = ["--size", 64, "--max-bad", 0.2, "--workers", 1, "--shard-images", 2]
    parts = [tmp_path / f"part{index}" for index in range(2)]
    for index, part in enumerate(parts):
        assert dcgan_data("build", "faces", src, part, *options, "--part", f"{index}/2").code == 0
    assert dcgan_data("merge", tmp_path / "merged", *parts, "--max-bad", 0.2).code == 0
    assert Image.open(tmp_path / "merged" / "faces.png").size == (4 * 64, 64)


def test_margin_and_least_size(dcgan_data: Any, tmp_path: Path, portrait: Image.Image) -> None:
    src = tmp_path / "src"
    src.mkdir()
    wide = Image.new("RGB", (900, 900), (90, 120, 90))  # a margin that left the picture would move the crop
    wide.paste(portrait, (200, 150))
    wide.save(src / "one.jpg", quality=92)
    crops = {}
    for margin in (0, 0.5):
        out = tmp_path / f"m{margin}"
        done = dcgan_data("build", "faces", src, out, "--size", 32, "--margin", margin, "--encoding", "png")
        assert done.code == 0, done.err
        crops[margin] = next(iterate(open_dataset(out)))[0]
    # Twice the side: the face fills the middle half.
    inner = np.asarray(Image.fromarray(crops[0.5]).crop((8, 8, 24, 24)), np.float32)
    whole = np.asarray(Image.fromarray(crops[0]).resize((16, 16), Image.Resampling.LANCZOS), np.float32)
    assert np.corrcoef(inner.ravel(), whole.ravel())[0, 1] > 0.8
    none = dcgan_data("build", "faces", src, tmp_path / "large", "--min-face", 400)
    assert none.code == 65
    assert "one.jpg: face of" in none.err
    assert "below 400" in none.err


def test_options_of_the_detector(dcgan_data: Any, tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "one.jpg").write_bytes(PORTRAIT.read_bytes())
    missing = dcgan_data("build", "faces", tmp_path / "src", tmp_path / "a", "--model", tmp_path / "no.onnx")
    assert (missing.code, "no such file" in missing.err) == (2, True)
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    bad = dcgan_data("build", "faces", tmp_path / "src", tmp_path / "b", "--model", tmp_path / "bad.onnx")
    assert (bad.code, "not a YuNet model" in bad.err) == (65, True)
    other = dcgan_data("build", "folder", tmp_path / "src", tmp_path / "c", "--margin", 0.1)
    assert (other.code, "--margin: applies to faces only; add --crop face" in other.err) == (2, True)


def write_yunet(path: Path, outputs: tuple[str, ...] = ("cls", "obj", "bbox", "kps")) -> None:
    """Write a network with YuNet's inputs and outputs that takes a bright cell of 32 pixels for a face of 96.

    OpenCV decodes cell (row, column) of stride s: center ((column, row) + bbox[:2]) s, size exp(bbox[2:]) s.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes: list[Any] = []
    constants: dict[str, Any] = {}
    results: list[Any] = []
    for stride in (8, 16, 32):
        nodes += [
            helper.make_node(
                "AveragePool", ["input"], [f"mean{stride}"], kernel_shape=[stride] * 2, strides=[stride] * 2
            ),
            helper.make_node("ReduceMean", [f"mean{stride}"], [f"gray{stride}"], axes=[1]),
            helper.make_node("Reshape", [f"gray{stride}", "column"], [f"cells{stride}"]),
            helper.make_node("Sub", [f"cells{stride}", "threshold"], [f"above{stride}"]),
            helper.make_node("Sigmoid", [f"above{stride}"], [f"score{stride}"]),
        ]
        for name, width in (("cls", 1), ("obj", 1), ("bbox", 4), ("kps", 10)):
            # Scores 1 for bright cells of stride 32, 0 for all of the others.
            factor = np.full((1, 1, width), 1.0 if width == 1 and stride == 32 else 0.0, np.float32)
            offset = {"bbox": [0.5, 0.5, np.log(3), np.log(3)]}.get(name, [0.0] * width)
            constants |= {f"{name}{stride}f": factor, f"{name}{stride}o": np.array([[offset]], np.float32)}
            nodes.append(helper.make_node("Mul", [f"score{stride}", f"{name}{stride}f"], [f"{name}{stride}s"]))
            if name in outputs:
                result = f"{name}_{stride}"
                nodes.append(helper.make_node("Add", [f"{name}{stride}s", f"{name}{stride}o"], [result]))
                results.append(helper.make_tensor_value_info(result, TensorProto.FLOAT, [1, "cells", width]))
    constants |= {"column": np.array([1, -1, 1], np.int64), "threshold": np.array(180, np.float32)}
    graph = helper.make_graph(
        nodes,
        "yunet",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, "height", "width"])],
        results,
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)


def test_a_network_of_yunets_form_is_asked_at_every_size(dcgan_data: Any, tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    write_yunet(tmp_path / "yunet.onnx")
    places = {"a.png": (300, 200, 128, 96), "b.png": (500, 333, 352, 160)}
    for name, (width, height, left, top) in places.items():
        picture = np.full((height, width, 3), 60, np.uint8)
        picture[top : top + 32, left : left + 32] = (250, 240, 230)
        Image.fromarray(picture).save(tmp_path / "src" / name)
    options = ["--model", tmp_path / "yunet.onnx", "--size", 32, "--margin", 0, "--encoding", "png"]
    done = dcgan_data("build", "faces", tmp_path / "src", tmp_path / "out", *options)
    assert done.code == 0, done.err
    dataset = open_dataset(tmp_path / "out")
    assert (dataset.images, dataset.source["detector"]) == (2, "yunet")
    for crop in next(iterate(open_dataset(tmp_path / "out"))):
        bright = crop.astype(int).sum(2) > 450  # the face is three cells wide: the bright one fills its middle
        rows, columns = np.nonzero(bright)
        assert 9 <= rows.min() <= 12
        assert 20 <= rows.max() <= 22
        assert 9 <= columns.min() <= 12
        assert 20 <= columns.max() <= 22
        assert (crop[16, 16] == (250, 240, 230)).all()


def test_another_network_is_no_yunet(dcgan_data: Any, tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "one.jpg").write_bytes(PORTRAIT.read_bytes())
    write_yunet(tmp_path / "other.onnx", ("cls", "obj"))
    done = dcgan_data("build", "faces", tmp_path / "src", tmp_path / "out", "--model", tmp_path / "other.onnx")
    assert (done.code, "not a YuNet model" in done.err) == (65, True), done.err
