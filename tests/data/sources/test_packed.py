"""TFRecord, MDS and litdata folders: written here by their formats' descriptions, not by what reads them."""

import gzip
import json
import struct
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from numpy.typing import NDArray
from picture_files import make_picture, tree
from storage_servers import python_server

from pipeline.common.imaging import encode
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


def png(index: int) -> bytes:
    return encode(make_picture(index, 32, 32), "png")


def example_class() -> Any:
    """Return tf.train.Example as protobuf makes it of TensorFlow's example.proto and feature.proto."""
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="t", syntax="proto3")
    kinds = descriptor_pb2.FieldDescriptorProto
    lists = (("BytesList", kinds.TYPE_BYTES), ("FloatList", kinds.TYPE_FLOAT), ("Int64List", kinds.TYPE_INT64))
    for name, kind in lists:
        message = file.message_type.add(name=name)
        message.field.add(name="value", number=1, type=kind, label=kinds.LABEL_REPEATED)
    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, (name, _) in enumerate(lists, 1):
        field = name.lower().replace("list", "_list")
        feature.field.add(
            name=field,
            number=number,
            type=kinds.TYPE_MESSAGE,
            type_name=f".t.{name}",
            label=kinds.LABEL_OPTIONAL,
            oneof_index=0,
        )
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=kinds.TYPE_STRING, label=kinds.LABEL_OPTIONAL)
    entry.field.add(name="value", number=2, type=kinds.TYPE_MESSAGE, type_name=".t.Feature", label=kinds.LABEL_OPTIONAL)
    features.field.add(
        name="feature",
        number=1,
        type=kinds.TYPE_MESSAGE,
        type_name=".t.Features.FeatureEntry",
        label=kinds.LABEL_REPEATED,
    )
    example = file.message_type.add(name="Example")
    example.field.add(
        name="features", number=1, type=kinds.TYPE_MESSAGE, type_name=".t.Features", label=kinds.LABEL_OPTIONAL
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))


EXAMPLE = example_class()


def example(**features: Any) -> bytes:
    """Return an Example; `a__b` is the feature a/b."""
    made = EXAMPLE()
    for name, given in features.items():
        feature = made.features.feature[name.replace("__", "/")]
        values = given if isinstance(given, list) else [given]
        kind = {bytes: feature.bytes_list, float: feature.float_list, int: feature.int64_list}[type(values[0])]
        kind.value.extend(values)
    return bytes(made.SerializeToString(deterministic=True))


def masked(data: bytes) -> bytes:
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32)


def record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + masked(length) + data + masked(data)


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


def pil(index: int) -> bytes:
    return struct.pack("<3I", 32, 32, 3) + b"RGB" + make_picture(index, 32, 32).tobytes()


def samples_file(samples: list[bytes], extra: bytes = b"") -> bytes:
    """Return a file of samples: their number, their offsets, and they."""
    offsets = np.cumsum([4 + 4 * (len(samples) + 1) + len(extra), *map(len, samples)]).astype("<u4")
    return struct.pack("<I", len(samples)) + offsets.tobytes() + extra + b"".join(samples)


def write_mds(folder: Path, first: int, *, raw: bool = False, packed: bool = False) -> None:
    """Write ten samples in two shards: a picture, an int64, a text and a pickle that must not be opened."""
    folder.mkdir(parents=True)
    names, encodings, sizes = ["image", "number", "text", "rest"], ["pil" if raw else "png", "int", "str", "pkl"], None
    sizes = [None, 8, None, None]
    shards = []
    for shard in range(2):
        samples = []
        for index in range(first + 5 * shard, first + 5 * shard + 5):
            picture, text = pil(index) if raw else png(index), f"t{index}".encode()
            head = struct.pack("<3I", len(picture), len(text), 4)
            samples.append(head + picture + struct.pack("<q", index) + text + b"evil")
        data = samples_file(samples, b'{"format": "mds"}')
        name = f"shard.{shard:05d}.mds"
        info = {"basename": name, "bytes": len(data), "hashes": {}}
        zipped = {**info, "basename": f"{name}.gz"} if packed else None
        (folder / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(data) if packed else data)
        shards.append(
            {
                "column_encodings": encodings,
                "column_names": names,
                "column_sizes": sizes,
                "compression": "gz" if packed else None,
                "format": "mds",
                "hashes": [],
                "raw_data": info,
                "samples": 5,
                "size_limit": 1 << 26,
                "version": 2,
                "zip_data": zipped,
            }
        )
    (folder / "index.json").write_text(json.dumps({"shards": shards, "version": 2}))


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
    (tmp_path / "src").mkdir()
    samples = []
    for index in range(10):
        leaves = [png(index), struct.pack("<q", index), f"t{index}".encode(), b"\1"]
        samples.append(struct.pack("<4I", *map(len, leaves)) + b"".join(leaves))
    (tmp_path / "src" / "chunk-0-0.bin").write_bytes(samples_file(samples))
    context = json.dumps(["image", "number", "text", "good"])
    leaf: dict[str, Any] = {"type": None, "context": None, "children_spec": []}
    spec = json.dumps([1, {"type": "builtins.dict", "context": context, "children_spec": [leaf] * 4}])
    config: dict[str, Any] = {
        "compression": None,
        "data_format": ["image:png", "int", "str", "bool"],
        "data_spec": spec,
    }
    chunks = [{"chunk_bytes": 1, "chunk_size": 10, "dim": None, "filename": "chunk-0-0.bin"}]
    (tmp_path / "src" / "index.json").write_text(json.dumps({"chunks": chunks, "config": config}))
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
