"""TFRecord, MDS and litdata folders give pictures and labels; what is damaged is one line."""

import gzip
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from packed_files import (
    example,
    png,
    record,
    samples_file,
    write_litdata,
    write_litdata_arrow,
    write_mds,
    write_mds_cells,
)
from picture_files import make_picture, tree
from storage_servers import python_server

from pipeline.data.dataset import open_dataset
from pipeline.data.shard_reader import iterate

SMALL = ("--size", 32, "--workers", 1)


def found(out: Path) -> dict[str, tuple[NDArray[np.uint8], dict[str, Any]]]:
    """Return pixels and labels by key."""
    result = {}
    for images, columns in iterate(open_dataset(out), labels=True):
        for index, key in enumerate(columns["key"]):
            result[key] = images[index], {name: values[index] for name, values in columns.items() if name != "key"}
    return result


def imagenet(index: int) -> bytes:
    """Return an example as TensorFlow's ImageNet has it."""
    return example(
        image__encoded=png(index),
        image__class__label=index % 3,
        image__class__text=f"name {index % 3}".encode(),
        image__object__bbox=[0.5, 0.25],
        score=index / 2,
        negative=-index - 1,
        mask=b"\xff\xfe\xfd",
    )


def check_imagenet(out: Path, count: int) -> None:
    images = found(out)
    numbers = set()
    for pixels, labels in images.values():
        index = -labels["negative"] - 1
        numbers.add(index)
        assert (pixels == make_picture(index, 32, 32)).all()
        assert labels["image/class/label"] == index % 3
        assert labels["image/class/text"] == f"name {index % 3}"
        assert labels["score"] == index / 2
    assert numbers == set(range(count))
    assert len(images) == count


@pytest.mark.parametrize("packed", [False, True])
def test_tfrecords_give_pictures_and_labels(dcgan_data: Any, tmp_path: Path, packed: bool) -> None:
    (tmp_path / "src").mkdir()
    for shard in range(2):
        data = b"".join(record(imagenet(index)) for index in range(shard * 10, shard * 10 + 10))
        (tmp_path / "src" / f"train-{shard:05d}-of-00002").write_bytes(gzip.compress(data) if packed else data)
    (tmp_path / "src" / "readme.txt").write_text("none")
    done = dcgan_data("build", "tfrecord", tmp_path / "src", tmp_path / "out", *SMALL)
    assert done.code == 0, done.err
    assert "the features image/object/bbox, mask were passed over" in done.err
    check_imagenet(tmp_path / "out", 20)
    options = ("--size", 32, "--shard-images", 6, "--workers", 1)
    for part in range(2):
        done = dcgan_data("build", "tfrecord", tmp_path / "src", tmp_path / f"p{part}", *options, "--part", f"{part}/2")
        assert done.code == 0, done.err
    assert dcgan_data("merge", tmp_path / "cut", tmp_path / "p0", tmp_path / "p1").code == 0
    assert dcgan_data("build", "tfrecord", tmp_path / "src", tmp_path / "one", *options).code == 0
    assert tree(tmp_path / "one") == tree(tmp_path / "cut")


def test_tfrecords_are_read_over_http(dcgan_data: Any, tmp_path: Path) -> None:
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "a.tfrecord").write_bytes(b"".join(record(imagenet(index)) for index in range(5)))
    with python_server(tmp_path / "www") as port:
        done = dcgan_data("build", "tfrecord", f"http://127.0.0.1:{port}/a.tfrecord", tmp_path / "out", *SMALL)
    assert done.code == 0, done.err
    check_imagenet(tmp_path / "out", 5)


def test_raw_pixels_in_tfrecords(dcgan_data: Any, tmp_path: Path) -> None:
    """ProGAN's, in several resolutions, and the usual tutorial's."""
    (tmp_path / "progan").mkdir()
    pictures = [make_picture(index, 32, 32) for index in range(4)]
    for level, side in ((4, 16), (5, 32)):
        planes = [np.ascontiguousarray(picture[:side, :side].transpose(2, 0, 1)) for picture in pictures]
        data = b"".join(record(example(shape=[3, side, side], data=plane.tobytes())) for plane in planes)
        (tmp_path / "progan" / f"faces-r{level:02d}.tfrecords").write_bytes(data)
    (tmp_path / "mnist.tfrecord").write_bytes(
        b"".join(
            record(example(height=32, width=32, depth=1, label=index, image_raw=picture[..., 0].tobytes()))
            for index, picture in enumerate(pictures)
        )
    )
    done = dcgan_data("build", "tfrecord", tmp_path / "progan", tmp_path / "out", *SMALL)
    assert done.code == 0, done.err
    assert "only the largest is read: r05" in done.err
    assert set(found(tmp_path / "out")) == {f"faces-r05.tfrecords/{index:07d}" for index in range(4)}
    for key, (pixels, _) in found(tmp_path / "out").items():
        assert (pixels == pictures[int(key[-7:])]).all()
    done = dcgan_data("build", "tfrecord", tmp_path / "mnist.tfrecord", tmp_path / "gray", *SMALL, "--channels", 1)
    assert done.code == 0, done.err
    for pixels, labels in found(tmp_path / "gray").values():
        assert (pixels[..., 0] == pictures[labels["label"]][..., 0]).all()


def test_damaged_tfrecords(dcgan_data: Any, tmp_path: Path) -> None:
    whole = b"".join(record(imagenet(index)) for index in range(8))
    size = len(record(imagenet(0)))
    flipped = bytearray(whole)
    flipped[size // 2] ^= 1
    length = bytearray(whole)
    length[size + len(record(imagenet(1))) + 1] ^= 1
    cases = {
        "cut": (whole[:-5], "cut off at offset", 7),
        "length": (bytes(length), "damaged at offset", None),
        "pixels": (bytes(flipped), "damaged record (checksum)", 7),
        "foreign": (whole + record(b"\xff\xff"), "no tf.train.Example", 8),
    }
    for name, (data, words, left) in cases.items():
        (tmp_path / f"{name}.tfrecord").write_bytes(data)
        done = dcgan_data("build", "tfrecord", tmp_path / f"{name}.tfrecord", tmp_path / name, *SMALL)
        assert (done.code, words in done.err) == (65, True), (name, done.err)
        assert "Traceback" not in done.err
        done = dcgan_data("build", "tfrecord", tmp_path / f"{name}.tfrecord", tmp_path / name, *SMALL, "--max-bad", 0.9)
        assert done.code == 0, (name, done.err)
        assert left is None or open_dataset(tmp_path / name).images == left
    (tmp_path / "text.tfrecord").write_text("hello, world" * 9)
    (tmp_path / "numbers.tfrecord").write_bytes(record(example(a=1)))
    for name, words in (("text", "no TFRecord: the checksum"), ("numbers", "hold no pictures")):
        done = dcgan_data("build", "tfrecord", tmp_path / f"{name}.tfrecord", tmp_path / "no", *SMALL)
        assert (done.code, words in done.err) == (65, True), done.err
        assert not (tmp_path / "no").exists()


def check_numbers(out: Path, numbers: range) -> None:
    images = found(out)
    assert sorted(labels["number"] for _, labels in images.values()) == list(numbers)
    for pixels, labels in images.values():
        assert (pixels == make_picture(labels["number"], 32, 32)).all()
        assert labels["text"] == f"t{labels['number']}"


@pytest.mark.parametrize("form", ["png", "pil", "packed"])
def test_mds_folders_give_pictures_and_labels(dcgan_data: Any, tmp_path: Path, form: str) -> None:
    write_mds(tmp_path / "src", 0, raw=form == "pil", packed=form == "packed")
    done = dcgan_data("build", "mds", tmp_path / "src", tmp_path / "out", *SMALL)
    assert done.code == 0, done.err
    assert "the columns rest were passed over" in done.err
    check_numbers(tmp_path / "out", range(10))


def test_splits_of_mds(dcgan_data: Any, tmp_path: Path) -> None:
    write_mds(tmp_path / "src" / "train", 0)
    write_mds(tmp_path / "src" / "val", 10)
    for number, (options, numbers) in enumerate(
        (((), range(10)), (("--split", "val"), range(10, 20)), (("--split", "all"), range(20)))
    ):
        out = tmp_path / f"out{number}"
        done = dcgan_data("build", "mds", tmp_path / "src", out, *SMALL, *options)
        assert done.code == 0, done.err
        check_numbers(out, numbers)


def test_litdata_folders_give_pictures_and_labels(dcgan_data: Any, tmp_path: Path) -> None:
    config, chunks = write_litdata(tmp_path / "src", 10)
    done = dcgan_data("build", "litdata", tmp_path / "src", tmp_path / "out", *SMALL)
    assert done.code == 0, done.err
    check_numbers(tmp_path / "out", range(10))
    assert all(labels["good"] is True for _, labels in found(tmp_path / "out").values())
    config["encryption"] = {"algorithm": "fernet"}
    (tmp_path / "src" / "index.json").write_text(json.dumps({"chunks": chunks, "config": config}))
    done = dcgan_data("build", "litdata", tmp_path / "src", tmp_path / "no", *SMALL)
    assert (done.code, "encrypted" in done.err) == (65, True), done.err


def test_damaged_folders_of_samples_are_one_line(dcgan_data: Any, tmp_path: Path) -> None:
    write_mds(tmp_path / "src", 0)
    index = tmp_path / "src" / "index.json"
    shard = tmp_path / "src" / "shard.00000.mds"
    sound, data = index.read_text(), shard.read_bytes()
    far = sound.replace("shard.00000.mds", "../../etc/passwd")
    for text, content, words in (
        ("{", data, "no index of MDS or litdata"),
        ("[]", data, "no index of MDS or litdata"),
        ('{"shards": [{}]}', data, "no index of MDS or litdata"),
        ('{"shards": []}', data, "lists no files"),
        (far, data, "names a file outside of it"),
        (sound, data[:-9], "damaged, or cut off"),
        (sound, struct.pack("<I", 1 << 31) + data[4:], "damaged, or cut off"),
        (sound, data[:4] + b"\xff" * 40 + data[44:], "damaged, or cut off"),
        (sound, b"", "ends before offset"),
        (sound.replace("shard.00000", "shard.00009"), data, "lists it"),
    ):
        index.write_text(text)
        shard.write_bytes(content)
        done = dcgan_data("build", "mds", tmp_path / "src", tmp_path / "out", *SMALL)
        assert (done.code, words in done.err) == (65, True), (words, done.err)
        assert (done.err.count("error: "), "Traceback" in done.err) == (1, False)
        assert not (tmp_path / "out").exists()
    done = dcgan_data("build", "mds", tmp_path, tmp_path / "out", *SMALL, "--split", "x")
    assert (done.code, "--split x" in done.err) == (2, True), done.err


def mds_array(values: NDArray[Any], stated: str) -> bytes:
    """Return an array as MDS writes it: what the column does not state comes before the values."""
    kind, _, shape = stated.partition(":")
    data = b"" if kind else bytes([{"uint8": 8, "uint16": 16, "float32": 34}[values.dtype.name]])
    if not shape:
        data += bytes([values.ndim << 2]) + bytes(values.shape)
    return data + values.tobytes()


def litdata_array(values: NDArray[Any], numbers: dict[str, int], order: str = "<") -> bytes:
    head = [numbers[values.dtype.name], values.ndim, *values.shape]
    return struct.pack(f"{order}{len(head)}I", *head) + values.tobytes()


@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("form", ["HWC", "CHW", "HW"])
def test_arrays_in_columns_give_pictures(dcgan_data: Any, tmp_path: Path, kind: str, form: str) -> None:
    pixels = [make_picture(index, 32, 32) for index in range(6)]
    scale: Any = {"uint8": np.uint8(1), "uint16": np.uint16(257), "float32": np.float32(1 / 255)}[kind]
    values = [(picture * scale).astype(kind) for picture in pixels]
    values = [{"HWC": one, "CHW": one.transpose(2, 0, 1), "HW": one[..., 0]}[form] for one in values]
    shape = ",".join(map(str, values[0].shape))
    mds: list[tuple[str, list[bytes]]] = [
        (f"ndarray{encoding and ':'}{encoding}", [mds_array(one, encoding) for one in values])
        for encoding in ("", kind, f"{kind}:{shape}")
    ]
    numpy, torch = {"uint8": 4, "uint16": 5, "float32": 9}, {"uint8": 11, "uint16": 20, "float32": 0}
    litdata = [("numpy", [litdata_array(one, numpy) for one in values])]
    for order in "<>":  # of old and of newer versions
        litdata.append(("tensor", [litdata_array(one, torch, order) for one in values]))
    for number, (encoding, cells) in enumerate([*mds, *litdata]):
        src = tmp_path / f"src{number}"
        if encoding.startswith("ndarray"):
            write_mds_cells(src, encoding, cells)
        else:
            config, chunks = write_litdata(src, len(cells))
            samples = [
                struct.pack("<4I", len(cell), 8, 1, 1) + cell + struct.pack("<q", i) + b"t\1"
                for i, cell in enumerate(cells)
            ]
            (src / "chunk-0-0.bin").write_bytes(samples_file(samples))
            config["data_format"] = [encoding, "int", "str", "bool"]
            (src / "index.json").write_text(json.dumps({"chunks": chunks, "config": config}))
        out = tmp_path / f"out{number}"
        source = "mds" if encoding.startswith("ndarray") else "litdata"
        done = dcgan_data("build", source, src, out, *SMALL, "--channels", 1 if form == "HW" else 3)
        assert done.code == 0, (encoding, done.err)
        images = found(out)
        assert sorted(labels["number"] for _, labels in images.values()) == list(range(6))
        for image, labels in images.values():
            expected = pixels[labels["number"]]
            assert np.abs(image.astype(int) - (expected[..., :1] if form == "HW" else expected)).max() <= 1, encoding


def test_arrays_that_are_no_pictures_are_named(dcgan_data: Any, tmp_path: Path) -> None:
    whole = mds_array(make_picture(1, 32, 32), "")
    cells = {
        "cut off": whole[:-1],
        "no known type": b"\7" + whole[1:],
        "no image (H, W, C)": bytes([8, 1 << 2, 16]) + bytes(16),
    }
    for number, (words, cell) in enumerate(cells.items()):
        write_mds_cells(tmp_path / f"src{number}", "ndarray", [cell] * 3)
        done = dcgan_data("build", "mds", tmp_path / f"src{number}", tmp_path / "out", *SMALL, "--max-bad", 1)
        assert (done.code, words in done.err) == (65, True), done.err
    two = tmp_path / "two"
    write_mds_cells(two, "ndarray", [whole] * 3)
    index = json.loads((two / "index.json").read_text())
    index["shards"][0]["column_encodings"] = ["ndarray", "ndarray:int64:1"]
    (two / "index.json").write_text(json.dumps(index))
    done = dcgan_data("build", "mds", two, tmp_path / "out", *SMALL)
    assert (done.code, "choose with --column" in done.err) == (2, True), done.err
    assert dcgan_data("build", "mds", two, tmp_path / "out", *SMALL, "--column", "image").code == 0


def test_litdata_of_arrow_tables(dcgan_data: Any, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow, of the extra parquet, is not installed: make test-interop")
    write_litdata_arrow(tmp_path / "src", 10)
    done = dcgan_data("build", "litdata", tmp_path / "src", tmp_path / "out", *SMALL)
    assert done.code == 0, done.err
    check_numbers(tmp_path / "out", range(10))
    write_litdata_arrow(tmp_path / "packed", 10, "zstd")
    done = dcgan_data("build", "litdata", tmp_path / "packed", tmp_path / "no", *SMALL)
    assert (done.code, "a compressed Arrow table" in done.err) == (65, True), done.err
    whole = (tmp_path / "src" / "chunk-0-0.bin").read_bytes()
    index = json.loads((tmp_path / "src" / "index.json").read_text())
    index["config"]["data_spec"] = index["config"]["data_spec"].replace("number", "digits")
    for number, (data, described) in enumerate(((whole[:60] + whole[400:], None), (whole, index))):
        (tmp_path / "src" / "chunk-0-0.bin").write_bytes(data)
        if described is not None:
            (tmp_path / "src" / "index.json").write_text(json.dumps(described))
        done = dcgan_data("build", "litdata", tmp_path / "src", tmp_path / f"no{number}", *SMALL)
        assert (done.code, "damaged, or cut off" in done.err) == (65, True), done.err
