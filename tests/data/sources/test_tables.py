"""Parquet and arrow files, written by pyarrow: pixels, labels, splits, the Hub, and what is damaged or missing."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_server import hub_server
from picture_files import make_picture, tree
from storage_servers import nginx

from pipeline.common.imaging import encode
from pipeline.data.dataset import open_dataset
from pipeline.data.shard_reader import iterate

pa = pytest.importorskip("pyarrow", reason="pyarrow, of the extra parquet, is not installed: make test-interop")
pq = pytest.importorskip("pyarrow.parquet")

SMALL = ("--size", 32, "--workers", 1)
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
NAMES = ["cat", "dog", "eel"]


def png(index: int) -> bytes:
    return encode(make_picture(index, 32, 32), "png")


def rows(start: int, count: int) -> dict[str, Any]:
    """Return columns as the Hub has them: pictures by number, labels from it, and columns of lists and structs."""
    numbers = range(start, start + count)
    return {
        "image": pa.array([{"bytes": png(i), "path": f"{i}.png"} for i in numbers], IMAGE),
        "label": pa.array([i % 3 if i % 10 else -1 for i in numbers], pa.int64()),
        "boxes": pa.array([[1, 2]] * count),
        "info": pa.array([{"a": 1}] * count),
        "number": pa.array(list(numbers), pa.uint16()),
        "score": pa.array([float("nan") if i % 5 == 0 else i / 2 for i in numbers], pa.float32()),
        "good": pa.array([i % 2 == 0 for i in numbers]),
        "text": pa.array([f"picture {i}" for i in numbers], pa.large_string()),
    }


def hub_table(start: int, count: int) -> Any:
    """Return `rows` with what Hugging Face writes into the metadata."""
    features = {"image": {"_type": "Image"}, "label": {"names": NAMES, "_type": "ClassLabel"}}
    table = pa.table(rows(start, count))
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def write(path: Path, table: Any, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=7, **options)
    return path


def found(out: Path) -> dict[str, tuple[np.ndarray[Any, Any], dict[str, Any]]]:
    """Return pixels and labels by key."""
    result = {}
    for images, columns in iterate(open_dataset(out), labels=True):
        for index, key in enumerate(columns["key"]):
            result[key] = images[index], {name: values[index] for name, values in columns.items() if name != "key"}
    return result


def check(out: Path, numbers: set[int]) -> None:
    """Check that a data set of `hub_table` has these pictures with their labels, once each."""
    images = found(out)
    assert sorted(labels["number"] for _, labels in images.values()) == sorted(numbers)
    for pixels, labels in images.values():
        index = labels["number"]
        assert (pixels == make_picture(index, 32, 32)).all()
        assert labels["label"] == (NAMES[index % 3] if index % 10 else None)
        assert labels["score"] == (index / 2 if index % 5 else None)
        assert (labels["good"], labels["text"]) == (index % 2 == 0, f"picture {index}")


@pytest.mark.parametrize("compression", ["snappy", "zstd", "none"])
def test_a_parquet_of_the_hub_gives_its_pictures_and_labels(dcgan_data: Any, tmp_path: Path, compression: str) -> None:
    write(tmp_path / "t.parquet", hub_table(0, 20), compression=compression)
    done = dcgan_data("build", "parquet", tmp_path / "t.parquet", tmp_path / "out", *SMALL)
    assert done.code == 0, done.err
    check(tmp_path / "out", set(range(20)))
    assert "the columns boxes, info were passed over" in done.err
    kinds = {"label": "str", "number": "int", "score": "float", "good": "bool", "text": "str"}
    assert open_dataset(tmp_path / "out").labels == kinds


def test_parts_and_workers_give_the_same_bytes(dcgan_data: Any, tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / "src" / f"part-{number}.parquet", hub_table(number * 30, 30))
    options = ("--size", 32, "--shard-images", 11)
    one = dcgan_data("build", "parquet", tmp_path / "src", tmp_path / "one", *options, "--workers", 1)
    assert one.code == 0, one.err
    check(tmp_path / "one", set(range(90)))
    assert dcgan_data("build", "parquet", tmp_path / "src", tmp_path / "two", *options, "--workers", 2).code == 0
    for part in range(3):
        done = dcgan_data("build", "parquet", tmp_path / "src", tmp_path / f"p{part}", *options, "--part", f"{part}/3")
        assert done.code == 0, done.err
    assert dcgan_data("merge", tmp_path / "cut", *(tmp_path / f"p{part}" for part in range(3))).code == 0
    assert tree(tmp_path / "one") == tree(tmp_path / "two") == tree(tmp_path / "cut")
    again = dcgan_data("build", "parquet", tmp_path / "src", tmp_path / "one", *options)
    assert "already built" in again.out


def test_a_folder_a_glob_and_a_server_name_the_same_files(
    dcgan_data: Any, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    for name, start in (("a", 0), ("b/c", 10)):
        write(tmp_path / "www" / f"{name}.parquet", hub_table(start, 10))
    (tmp_path / "www" / "README.md").write_text("no table")
    with nginx(tmp_path / "www", tmp_path_factory.mktemp("nginx")) as port:
        places = {
            str(tmp_path / "www"): set(range(20)),
            str(tmp_path / "www" / "*.parquet"): set(range(10)),
            str(tmp_path / "www" / "**" / "*.parquet"): set(range(20)),
            f"http://127.0.0.1:{port}/b/c.parquet": set(range(10, 20)),
        }
        for number, (place, numbers) in enumerate(places.items()):
            done = dcgan_data("build", "parquet", place, tmp_path / f"out{number}", *SMALL)
            assert done.code == 0, done.err
            check(tmp_path / f"out{number}", numbers)


@pytest.mark.parametrize("kind", ["binary", "large_binary", "path", "struct of paths"])
def test_pictures_in_other_forms_of_columns(dcgan_data: Any, tmp_path: Path, kind: str) -> None:
    names = [f"sub/{index}.png" for index in range(6)]
    (tmp_path / "src" / "sub").mkdir(parents=True)
    for index, name in enumerate(names):
        (tmp_path / "src" / name).write_bytes(png(index))
    column = {
        "binary": pa.array([png(index) for index in range(6)], pa.binary()),
        "large_binary": pa.array([png(index) for index in range(6)], pa.large_binary()),
        "path": pa.array(names),
        "struct of paths": pa.array([{"bytes": None, "path": name} for name in names], IMAGE),
    }[kind]
    name = "file_name" if kind == "path" else "img"
    write(tmp_path / "src" / "t.parquet", pa.table({"number": list(range(6)), name: column}))
    done = dcgan_data("build", "parquet", tmp_path / "src", tmp_path / "out", *SMALL)
    assert done.code == 0, done.err
    for pixels, labels in found(tmp_path / "out").values():
        assert (pixels == make_picture(labels["number"], 32, 32)).all()


def test_paths_do_not_lead_out_of_the_folder(dcgan_data: Any, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png(1))
    (tmp_path / "src").mkdir()
    names = ["../secret.png", str(tmp_path / "secret.png"), "link.png", "none.png"]
    (tmp_path / "src" / "link.png").symlink_to(tmp_path / "secret.png")
    write(tmp_path / "src" / "t.parquet", pa.table({"file_name": names}))
    done = dcgan_data("build", "parquet", tmp_path / "src", tmp_path / "out", *SMALL, "--max-bad", 1)
    assert (done.code, "a path to no file beside its table" in done.err) == (65, True), done.err


def test_splits_and_configurations_follow_from_names(dcgan_data: Any, tmp_path: Path) -> None:
    src = tmp_path / "set"
    for name, start in (
        ("plain/train-00000-of-00002.parquet", 0),
        ("plain/train-00001-of-00002.parquet", 10),
        ("plain/test-00000-of-00001.parquet", 20),
        ("masks/unsupervised-00000-of-00001.parquet", 30),
        ("other/validation/0000.parquet", 40),
    ):
        write(src / name, hub_table(start, 10))
    (src / ".cache").mkdir()
    write(src / ".cache" / "train.parquet", hub_table(50, 10))
    many = dcgan_data("build", "huggingface", src, tmp_path / "out", *SMALL)
    assert (many.code, "choose with --config: masks, other, plain" in many.err) == (2, True), many.err
    cases: list[tuple[tuple[str, ...], set[int]]] = [
        (("--config", "plain"), set(range(20))),
        (("--config", "plain", "--split", "test"), set(range(20, 30))),
        (("--config", "plain", "--split", "all"), set(range(30))),
        (("--config", "masks"), set(range(30, 40))),
        (("--config", "other"), set(range(40, 50))),
    ]
    for number, (options, numbers) in enumerate(cases):
        out = tmp_path / f"out{number}"
        done = dcgan_data("build", "huggingface", src, out, *SMALL, *options)
        assert done.code == 0, done.err
        check(out, numbers)
    assert {labels["split"] for _, labels in found(tmp_path / "out2").values()} == {"train", "test"}
    for options, words in (
        (("--config", "x"), "--config x: "),
        (("--config", "plain", "--split", "dev"), "has test, train; all takes every one"),
    ):
        done = dcgan_data("build", "huggingface", src, tmp_path / "no", *SMALL, *options)
        assert (done.code, words in done.err) == (2, True), done.err


@pytest.mark.parametrize("form", ["stream", "file"])
def test_arrow_files_are_read_where_they_lie(dcgan_data: Any, tmp_path: Path, form: str) -> None:
    for split, start in (("train", 0), ("test", 20)):
        path = tmp_path / "saved" / split / "data-00000-of-00001.arrow"
        path.parent.mkdir(parents=True)
        table = hub_table(start, 20)
        new = pa.ipc.new_stream if form == "stream" else pa.ipc.new_file
        with path.open("wb") as file, new(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=6)
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    done = dcgan_data("build", "huggingface", tmp_path / "saved", tmp_path / "out", *SMALL)
    assert done.code == 0, done.err
    assert "reading tables" not in done.err
    check(tmp_path / "out", set(range(20)))


def test_a_name_is_a_data_set_of_the_hub(tmp_path: Path) -> None:
    """Over the Hub's protocol, with the token of the environment."""
    write(tmp_path / "hub/someone/faces/data/train-00000-of-00001.parquet", hub_table(0, 20))
    write(tmp_path / "hub/someone/faces/data/test-00000-of-00001.parquet", hub_table(20, 5))
    (tmp_path / "hub/someone/faces/README.md").write_text("---\n---\n")
    (tmp_path / "hub/someone/pictures").mkdir()
    (tmp_path / "hub/someone/pictures/a.png").write_bytes(png(0))
    with hub_server(tmp_path / "hub", token="hf_x") as (endpoint, asked):
        environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_x"}

        def build(name: str, out: str, **changes: str) -> subprocess.CompletedProcess[str]:
            code = "from pipeline.data.cli import main; main()"
            words = ["build", "huggingface", name, str(tmp_path / out), *map(str, SMALL)]
            command = [sys.executable, "-c", code, *words]
            return subprocess.run(
                command, env=environment | changes, capture_output=True, text=True, check=False, timeout=250
            )

        done = build("someone/faces", "out")
        assert done.returncode == 0, done.stderr
        check(tmp_path / "out", set(range(20)))
        assert any("resolve" in line for line in asked)
        assert build("hf://datasets/someone/faces", "out2").returncode == 0
        pictures = build("someone/pictures", "no")
        assert pictures.returncode == 65
        assert "dcgan-data build folder hf://datasets/someone/pictures" in pictures.stderr
        for name, changes in (("someone/nothing", {}), ("someone/faces", {"HF_TOKEN": "hf_y"})):
            refused = build(name, "no", **changes)
            assert refused.returncode == 65, refused.stderr
            assert len(refused.stderr.strip().splitlines()) == 2
            assert "Traceback" not in refused.stderr
    assert not (tmp_path / "no").exists()


def test_a_damaged_row_group_costs_its_pictures_by_name(dcgan_data: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", hub_table(0, 21), compression="snappy")
    data = bytearray(path.read_bytes())
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(0)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    for offset in range(start + 30, start + chunk.total_compressed_size - 1):
        data[offset] ^= 0x5A
    path.write_bytes(data)
    done = dcgan_data("build", "parquet", path, tmp_path / "out", *SMALL)
    assert (done.code, "7 of 21 pictures cannot be used" in done.err) == (65, True), done.err
    assert dcgan_data("build", "parquet", path, tmp_path / "out", *SMALL, "--max-bad", 0.5).code == 0
    check(tmp_path / "out", set(range(7)) | set(range(14, 21)))
    refused = (tmp_path / "out" / "refused.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in refused] == [f"t.parquet/{number:07d}" for number in range(7, 14)]


def test_what_cannot_be_read_is_one_line(dcgan_data: Any, tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.parquet", hub_table(0, 9)).read_bytes()
    two = {**rows(0, 5), "mask": rows(0, 5)["image"], "image": None, "photo2": rows(0, 5)["image"]}
    tables = {
        "two": pa.table({name: column for name, column in two.items() if column is not None}),
        "none": pa.table({"a": [1.5], "boxes": [[1]]}),
        "urls": pa.table({"URL": ["https://example.org/a.jpg"], "TEXT": ["x"]}),
        "empty": hub_table(0, 9).slice(0, 0),
    }
    for name, table in tables.items():
        write(tmp_path / f"{name}.parquet", table)
    for name, data in (("cut", whole[:-9]), ("short", b"PAR1"), ("text", b"no table at all")):
        (tmp_path / f"{name}.parquet").write_bytes(data)
        (tmp_path / f"{name}.arrow").write_bytes(data)
    other = tmp_path / "other"
    write(other / "a.parquet", hub_table(0, 3))
    write(other / "b.parquet", pa.table({"number": ["x"], "image": rows(0, 1)["image"]}))
    cases = {
        "two.parquet": (2, "several columns of pictures (mask, photo2); choose with --column"),
        "none.parquet": (65, "no column of pictures among its columns (a, boxes)"),
        "urls.parquet": (65, "for example with img2dataset"),
        "empty.parquet": (65, "hold no rows"),
        "cut.parquet": (65, "not a sound parquet"),
        "cut.arrow": (65, "not a sound parquet or arrow"),
        "short.parquet": (65, "4 bytes"),
        "text.parquet": (65, "not a sound parquet"),
        "text.arrow": (65, "not a sound parquet"),
        "nosuch.parquet": (2, "no such file"),
        "nosuch": (2, "no such folder"),
        "*.nothing": (65, "no .parquet"),
        "other": (65, "holds values of the type str"),
    }
    for name, (code, words) in cases.items():
        done = dcgan_data("build", "parquet", tmp_path / name, tmp_path / "out", *SMALL)
        assert (done.code, words in done.err) == (code, True), (name, done.err)
        assert done.err.count("error: ") == 1
        assert "Traceback" not in done.err
        assert not (tmp_path / "out").exists()
    done = dcgan_data("build", "parquet", tmp_path / "two.parquet", tmp_path / "out", *SMALL, "--column", "mask")
    assert done.code == 0, done.err
    assert "photo2" in done.err
    done = dcgan_data("build", "parquet", tmp_path / "two.parquet", tmp_path / "no", *SMALL, "--column", "number")
    assert (done.code, "has no such column of pictures" in done.err) == (2, True), done.err


def test_offsets_of_a_damaged_arrow_file_lead_nowhere(dcgan_data: Any, tmp_path: Path) -> None:
    table = hub_table(0, 20)
    with (tmp_path / "a.arrow").open("wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    data = (tmp_path / "a.arrow").read_bytes()
    texts = struct.pack("<3q", 0, 9, 18)  # of "picture 0" and "picture 1"
    assert data.count(texts) == 1
    (tmp_path / "a.arrow").write_bytes(data.replace(texts, struct.pack("<3q", 0, 1 << 40, 18)))
    done = dcgan_data("build", "parquet", tmp_path / "a.arrow", tmp_path / "out", *SMALL)
    assert (done.code, "not a sound parquet or arrow" in done.err) == (65, True), done.err
    assert not (tmp_path / "out").exists()
