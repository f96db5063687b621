"""TFRecord, MDS and litdata files, written by their formats' descriptions, and not by what reads them."""

import gzip
import json
import struct
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from picture_files import make_picture

from pipeline.common.imaging import encode


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


def write_litdata(folder: Path, count: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Write samples in one chunk: a picture, an int64, a text and a truth. Return the index's config and chunks."""
    folder.mkdir(parents=True)
    samples = []
    for index in range(count):
        leaves = [png(index), struct.pack("<q", index), f"t{index}".encode(), b"\1"]
        samples.append(struct.pack("<4I", *map(len, leaves)) + b"".join(leaves))
    (folder / "chunk-0-0.bin").write_bytes(samples_file(samples))
    context = json.dumps(["image", "number", "text", "good"])
    leaf: dict[str, Any] = {"type": None, "context": None, "children_spec": []}
    spec = json.dumps([1, {"type": "builtins.dict", "context": context, "children_spec": [leaf] * 4}])
    config: dict[str, Any] = {
        "compression": None,
        "data_format": ["image:png", "int", "str", "bool"],
        "data_spec": spec,
    }
    chunks = [{"chunk_bytes": 1, "chunk_size": count, "dim": None, "filename": "chunk-0-0.bin"}]
    (folder / "index.json").write_text(json.dumps({"chunks": chunks, "config": config}))
    return config, chunks


def write_mds_cells(folder: Path, encoding: str, cells: list[bytes]) -> None:
    """Write one shard of MDS with the columns `image`, of any encoding, and `number`."""
    folder.mkdir(parents=True)
    fixed = encoding.count(":") == 2
    heads = [b"" if fixed else struct.pack("<I", len(cell)) for cell in cells]
    samples = [
        head + cell + struct.pack("<q", index) for index, (head, cell) in enumerate(zip(heads, cells, strict=True))
    ]
    data = samples_file(samples, b"{}")
    (folder / "shard.00000.mds").write_bytes(data)
    shard = {
        "column_encodings": [encoding, "int"],
        "column_names": ["image", "number"],
        "column_sizes": [len(cells[0]) if fixed else None, 8],
        "format": "mds",
        "raw_data": {"basename": "shard.00000.mds", "bytes": len(data), "hashes": {}},
        "samples": len(cells),
        "zip_data": None,
    }
    (folder / "index.json").write_text(json.dumps({"shards": [shard], "version": 2}))


def write_litdata_arrow(folder: Path, count: int, compression: str | None = None) -> None:
    """Write a chunk as newer versions of litdata do with pyarrow: an Arrow file in the place of the samples."""
    import pyarrow as pa

    config, chunks = write_litdata(folder, count)
    columns = {
        "image": pa.array([png(index) for index in range(count)], pa.binary()),
        "number": pa.array(range(count), pa.int64()),
        "text": [f"t{index}" for index in range(count)],
        "good": [True] * count,
    }
    content = pa.table(columns)
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_file(sink, content.schema, options=options) as writer:
        writer.write_table(content, max_chunksize=4)
    table = sink.getvalue().to_pybytes()
    data = samples_file([b""] * count) + table + struct.pack("<I", len(table)) + b"LDARW01\0"
    (folder / "chunk-0-0.bin").write_bytes(data)
    config["data_format"] = ["bytes", "int", "str", "bool"]
    (folder / "index.json").write_text(json.dumps({"chunks": chunks, "config": config}))
