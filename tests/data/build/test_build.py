"""A build makes what was asked for, or says in one line why not; nothing is half-written, nothing is lost."""

import csv
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import numpy as np
import psutil
import pytest
from picture_files import as_bytes, make_folder, make_picture, tree
from PIL import Image

from pipeline.common.imaging import Pixels, decode, encode, load_image
from pipeline.common.shapes.frame import Frame
from pipeline.data.cli import EncodingName, main
from pipeline.data.dataset import Encoding, open_dataset
from pipeline.data.shard_reader import iterate
from pipeline.data.sources.registry import SOURCES


def contents(out: Path) -> dict[str, tuple[Pixels, dict[str, Any]]]:
    """Return {key: (image, labels)} of a data set."""
    found = {}
    for images, columns in iterate(open_dataset(out), labels=True):
        for index, image in enumerate(images):
            row = {name: values[index] for name, values in columns.items()}
            found[row.pop("key")] = (image, row)
    return found


@pytest.mark.parametrize("encoding", ["packed", "png", "webp", "jpg"])
def test_images_and_classes_arrive_once_each(dcgan_data: Any, tmp_path: Path, encoding: str) -> None:
    src = make_folder(tmp_path / "src", 30, classes=("cat", "dog", "emu"))
    done = dcgan_data("build", "folder", src, tmp_path / "out", "--size", 16, "--encoding", encoding, "--workers", 1)
    assert done.code == 0, done.err
    found = contents(tmp_path / "out")
    assert len(found) == 30
    for key, (image, labels) in found.items():
        assert labels == {"class": key.partition("/")[0]}
        expected = load_image((src / key).read_bytes(), Frame(16, 3))
        tolerance = 0 if encoding in ("packed", "png") else 12
        assert np.abs(image.astype(int) - expected).mean() <= tolerance
    assert dcgan_data("verify", tmp_path / "out").code == 0


def test_gray_data_sets(dcgan_data: Any, tmp_path: Path) -> None:
    src = make_folder(tmp_path / "src", 5)
    assert dcgan_data("build", "folder", src, tmp_path / "out", "--size", 16, "--channels", 1).code == 0
    assert next(iterate(open_dataset(tmp_path / "out"))).shape == (5, 16, 16, 1)


def test_finished_images_pass_through_byte_for_byte(dcgan_data: Any, tmp_path: Path) -> None:
    src = tmp_path / "src"
    src.mkdir()
    originals = {f"{i}.webp": encode(make_picture(i, 32, 32), "webp", 60) for i in range(10)}
    for name, data in originals.items():
        (src / name).write_bytes(data)
    assert dcgan_data("build", "folder", src, tmp_path / "out", "--size", 32, "--encoding", "webp").code == 0
    dataset = open_dataset(tmp_path / "out")
    data = (tmp_path / "out" / dataset.shards[0].name).read_bytes()
    stored = {data[o : o + s] for o, s in zip(dataset.shards[0].offsets, dataset.shards[0].sizes, strict=True)}
    assert stored == set(originals.values())


def test_labels_from_a_table_are_typed_and_matched_by_name_or_stem(dcgan_data: Any, tmp_path: Path) -> None:
    src = make_folder(tmp_path / "src", 4, classes=("a", "b"))
    rows: list[list[Any]] = [["file", "male", "age", "yaw", "name", "code"], ["0000.png", 1, 30, -1.5, "Zoë", "007"]]
    rows += [["0001.jpg", 0, 31, 2, "B", "010"], ["a/0002.png", 1, "", 0, "C", "1"], ["0003.png", 1, 5, 1, "", "2"]]
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    done = dcgan_data("build", "folder", src, tmp_path / "out", "--size", 8, "--labels", tmp_path / "labels.csv")
    assert done.code == 0, done.err
    types = {"male": "bool", "age": "int", "yaw": "float", "name": "str", "code": "str"}
    assert open_dataset(tmp_path / "out").labels == types
    labels = {key: row for key, (_, row) in contents(tmp_path / "out").items()}
    assert labels["a/0000.png"] == {"male": True, "age": 30, "yaw": -1.5, "name": "Zoë", "code": "007"}
    assert labels["b/0001.png"]["age"] == 31
    assert labels["a/0002.png"]["age"] is None
    assert labels["b/0003.png"]["name"] is None


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("file,age\n0000.png,1\n,2\n", "row 3 names no file ('')"),
        ("file,age\n0000.png,1\n/,2\n", "row 3 names no file ('/')"),
        ("file,age, age\n0000.png,1,2\n", "names the column 'age' more than once"),
        ("file,key\n0000.png,1\n0001.png,2\n0002.png,2\n", "a label is named 'key'"),
    ],
)
def test_a_table_that_cannot_be_right_is_refused(dcgan_data: Any, tmp_path: Path, table: str, words: str) -> None:
    (tmp_path / "labels.csv").write_text(table)
    src = make_folder(tmp_path / "src", 3)
    done = dcgan_data("build", "folder", src, tmp_path / "out", "--labels", tmp_path / "labels.csv")
    assert (done.code, words in done.err) == (65, True), done.err


def test_subsets_and_splits_follow_the_labels_and_are_recorded(dcgan_data: Any, tmp_path: Path) -> None:
    src = make_folder(tmp_path / "src", 60, classes=("cat", "dog"))
    options = ["--size", 8, "--where", "class=dog", "--limit", 20, "--val-fraction", 0.3]
    assert dcgan_data("build", "folder", src, tmp_path / "out", *options).code == 0
    train, val = contents(tmp_path / "out" / "train"), contents(tmp_path / "out" / "val")
    assert len(train) + len(val) == 20
    assert not set(train) & set(val)
    assert 1 <= len(val) <= 12
    assert {row["class"] for _, row in [*train.values(), *val.values()]} == {"dog"}
    source = open_dataset(tmp_path / "out" / "val").source
    assert (source["where"], source["limit"], source["val_fraction"], source["split"]) == (
        ["class=dog"],
        20,
        0.3,
        "val",
    )
    wrong = dcgan_data("build", "folder", src, tmp_path / "other", "--where", "color=red")
    assert wrong.code == 2
    assert "color" in wrong.err
    assert "class" in wrong.err


def test_shards_keep_their_limit_and_the_order_is_a_shuffle(dcgan_data: Any, tmp_path: Path) -> None:
    src = make_folder(tmp_path / "src", 100)
    for encoding in ("packed", "png"):
        out = tmp_path / encoding
        options = ["--size", 32, "--encoding", encoding, "--shard-bytes", 70_000, "--shard-images", 50]
        assert dcgan_data("build", "folder", src, out, *options).code == 0
        dataset = open_dataset(out)
        assert dataset.images == 100
        assert len(dataset.shards) > 2
        assert all((out / shard.name).stat().st_size == shard.bytes <= 70_000 for shard in dataset.shards)
    order = [key for _, columns in iterate(open_dataset(tmp_path / "png"), labels=True) for key in columns["key"]]
    assert order != sorted(order)
    packed = open_dataset(tmp_path / "packed")
    assert order == [key for _, columns in iterate(packed, labels=True) for key in columns["key"]]


def test_workers_do_not_change_the_bytes(dcgan_data: Any, tmp_path: Path) -> None:
    src = make_folder(tmp_path / "src", 40)
    for workers in (1, 2):
        done = dcgan_data("build", "folder", src, tmp_path / f"w{workers}", "--shard-images", 10, "--workers", workers)
        assert done.code == 0, done.err
    assert tree(tmp_path / "w1") == tree(tmp_path / "w2")


def test_a_finished_build_is_kept_and_another_refused(dcgan_data: Any, tmp_path: Path) -> None:
    src, out = make_folder(tmp_path / "src", 20), tmp_path / "out"
    assert dcgan_data("build", "folder", src, out, "--size", 16).code == 0
    before = tree(out)
    again = dcgan_data("build", "folder", src, out, "--size", 16)
    assert (again.code, "already built" in again.out) == (0, True)
    other = dcgan_data("build", "folder", src, out, "--size", 32)
    assert other.code == 78
    assert "size=16 there, 32 now" in other.err
    assert tree(out) == before
    (src / "new.png").write_bytes(encode(make_picture(99), "png"))
    more = dcgan_data("build", "folder", src, out, "--size", 16)
    assert more.code == 78
    assert "other pictures" in more.err
    assert dcgan_data("build", "folder", src, out, "--size", 16, "--overwrite").code == 0
    assert open_dataset(out).images == 21


def test_a_foreign_folder_is_never_built_into_nor_cleared(dcgan_data: Any, tmp_path: Path) -> None:
    src, out = make_folder(tmp_path / "src", 3), tmp_path / "home"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    for extra in ([], ["--overwrite"]):
        done = dcgan_data("build", "folder", src, out, *extra)
        if not extra:
            assert done.code == 2
            assert "not empty" in done.err
        assert (out / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("prepare", "code", "words"),
    [
        (lambda src: None, 2, "no such folder"),
        (lambda src: src.mkdir(), 65, "no images here"),
        (lambda src: (src.mkdir(), (src / "notes.txt").write_text("hello")), 65, "no images here"),
        (lambda src: (src.mkdir(), (src / "a.png").write_bytes(b"x")), 65, "1 of 1 pictures cannot be used"),
    ],
    ids=["missing", "empty", "only text", "only broken"],
)
def test_nothing_to_build_from(dcgan_data: Any, tmp_path: Path, prepare: Any, code: int, words: str) -> None:
    prepare(tmp_path / "src")
    done = dcgan_data("build", "folder", tmp_path / "src", tmp_path / "out")
    assert done.code == code
    assert words in done.err
    assert done.err.strip().splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_broken_pictures_are_counted_named_and_left_out(dcgan_data: Any, tmp_path: Path) -> None:
    src, out = make_folder(tmp_path / "src", 30), tmp_path / "out"
    (src / "notes.txt").write_text("hello")
    (src / "0007.png").write_bytes((src / "0007.png").read_bytes()[:100])
    refused = dcgan_data("build", "folder", src, out, "--size", 16)
    assert refused.code == 65
    assert "0007.png: truncated" in refused.err
    assert "--max-bad" in refused.err
    assert not (out / "dataset.json").exists()
    done = dcgan_data("build", "folder", src, out, "--size", 16, "--max-bad", 0.05)
    assert done.code == 0
    assert "note: passed over: 1 .txt" in done.err
    dataset = open_dataset(out)
    assert (dataset.images, dataset.refused.count) == (29, 1)
    assert dataset.refused.examples == ["0007.png: truncated"]
    assert (out / "refused.txt").read_text() == "0007.png\ttruncated\n"


def test_profiles_that_cannot_be_used_are_counted_and_the_time_is_told(dcgan_data: Any, tmp_path: Path) -> None:
    src, out = make_folder(tmp_path / "src", 6), tmp_path / "out"
    with Image.open(src / "0003.png") as picture:
        picture.save(src / "0003.png", icc_profile=b"no profile at all")
    done = dcgan_data("build", "folder", src, out, "--size", 16)
    assert "a color profile that cannot be used, taken as sRGB: 1\n" in done.out
    assert re.search(r"\(reading \d+ %, converting \d+ %, writing \d+ %\)", done.err)
    assert open_dataset(out).source["other_colors"] == 1
    assert "already built" in dcgan_data("build", "folder", src, out, "--size", 16).out


def test_the_awkward_zoo(dcgan_data: Any, tmp_path: Path) -> None:
    src, out = make_folder(tmp_path / "src", 5), tmp_path / "out"
    (src / "sub" / "deeper").mkdir(parents=True)
    (src / "sub" / "deeper" / "again").symlink_to(src / "sub")
    (src / "wrong-extension.jpg").write_bytes(encode(make_picture(1), "png"))
    (src / "sub" / "0001.png").write_bytes(encode(make_picture(2), "png"))  # the name of another one
    for name in ("写真.PNG", "لبن.png", "a b'\"c.png", "dots.in.name.png"):
        (src / "sub" / name).write_bytes(encode(make_picture(hash(name) % 1000), "png"))
    undecodable = os.fsencode(src) + b"/\xff\xfe.png"
    Path(os.fsdecode(undecodable)).write_bytes(encode(make_picture(3), "png"))
    (src / "._hidden.jpg").write_bytes(b"\0\5\26\7")
    (src / "nowhere.png").symlink_to("missing.png")
    (src / "empty.png").touch()
    (src / "tiny.png").write_bytes(as_bytes(Image.new("RGB", (1, 1)), "PNG"))
    options = ["--size", 16, "--max-bad", 0.2, "--labels", "none", "--encoding", "png"]
    done = dcgan_data("build", "folder", src, out, *options)
    assert done.code == 0, done.err
    assert "lead back" in done.err
    dataset = open_dataset(out)
    assert (dataset.images, dataset.refused.count) == (13, 2)
    assert {"sub/写真.PNG", "sub/0001.png", "0001.png", "sub/dots.in.name.png", "tiny.png"} <= set(contents(out))
    assert dcgan_data("verify", out).code == 0


def test_a_folder_without_read_permission_stops_the_build(dcgan_data: Any, tmp_path: Path) -> None:
    src = make_folder(tmp_path / "src", 4, classes=("open", "closed"))
    assert dcgan_data("build", "folder", src, tmp_path / "warm-up", "--workers", 1).code == 0
    out = tmp_path / "out"
    out.mkdir()
    out.chmod(0o777)
    for path in (tmp_path, *tmp_path.parents):
        if path.name.startswith("pytest-of-"):
            break
        path.chmod(0o755)
    path.chmod(0o755)
    (src / "closed").chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may read everything, so an ordinary user has to try
    try:
        done = dcgan_data("build", "folder", src, out, "--workers", 1)
    finally:
        os.seteuid(user)
        (src / "closed").chmod(0o755)
    assert done.code == 2, done.err
    assert "closed: Permission denied" in done.err


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system of 256 KB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_loses_nothing_and_the_build_goes_on(dcgan_data: Any, tmp_path: Path, small_disk: Path) -> None:
    src = make_folder(tmp_path / "src", 40, size=64)
    options = ["--size", 64, "--shard-images", 10, "--workers", 1]  # four shards of 125 KB
    full = dcgan_data("build", "folder", src, small_disk / "out", *options)
    assert full.code == 75
    assert "No space left" in full.err
    assert not (small_disk / "out" / "dataset.json").exists()
    assert not list((small_disk / "out").glob(".*.tmp"))
    done = [path.stem for path in (small_disk / "out" / ".build").glob("0*.json")]
    kept = {f"{name}.tar": (small_disk / "out" / f"{name}.tar").stat().st_mtime_ns for name in done}
    assert kept
    subprocess.run(["mount", "-o", "remount,size=2m", small_disk], check=True)
    assert dcgan_data("build", "folder", src, small_disk / "out", *options).code == 0
    assert {name: (small_disk / "out" / name).stat().st_mtime_ns for name in kept} == kept
    assert dcgan_data("build", "folder", src, tmp_path / "whole", *options).code == 0
    assert tree(small_disk / "out") == tree(tmp_path / "whole")


def test_a_read_only_disk_is_refused_at_once(dcgan_data: Any, tmp_path: Path, small_disk: Path) -> None:
    src = make_folder(tmp_path / "src", 2)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    done = dcgan_data("build", "folder", src, small_disk / "out")
    assert done.code == 2
    assert "Read-only file system" in done.err


def test_parts_merged_equal_the_whole(dcgan_data: Any, tmp_path: Path) -> None:
    src = make_folder(tmp_path / "src", 60, classes=("a", "b"))
    (src / "a" / "0010.png").write_bytes(b"broken")
    options = ["--size", 16, "--shard-images", 8, "--encoding", "png", "--max-bad", 0.1, "--workers", 1]
    assert dcgan_data("build", "folder", src, tmp_path / "whole", *options).code == 0
    parts = [tmp_path / f"part{i}" for i in range(3)]
    for index, part in enumerate(parts):
        assert dcgan_data("build", "folder", src, part, *options, "--part", f"{index}/3").code == 0
        assert not (part / "dataset.json").exists()
    early = dcgan_data("merge", tmp_path / "early", *parts[:2], "--max-bad", 0.1)
    assert early.code == 65
    assert "groups are missing" in early.err
    assert dcgan_data("merge", tmp_path / "merged", *parts, "--max-bad", 0.1).code == 0
    assert tree(tmp_path / "merged") == tree(tmp_path / "whole")
    shared = tmp_path / "shared"  # all parts may also write into one folder
    for index in (2, 0, 1):
        assert dcgan_data("build", "folder", src, shared, *options, "--part", f"{index}/3").code == 0
    assert dcgan_data("merge", shared, "--max-bad", 0.1).code == 0
    assert tree(shared) == tree(tmp_path / "whole")
    alien = dcgan_data("build", "folder", src, tmp_path / "alien", *options, "--seed", 5, "--part", "0/3")
    assert alien.code == 0
    mixed = dcgan_data("merge", tmp_path / "mixed", parts[0], tmp_path / "alien")
    assert mixed.code == 78
    assert "seed" in mixed.err


def run_build(arguments: list[str]) -> None:
    """Run a build in a child process."""
    os.setpgid(0, 0)
    sys.argv = ["dcgan-data", "build", *arguments]
    main()


def test_a_build_killed_at_20_random_moments_gives_the_same_bytes(tmp_path: Path) -> None:
    src = make_folder(tmp_path / "src", 160, size=64)
    whole, out = tmp_path / "whole", tmp_path / "out"
    options = ["--size", "48", "--shard-images", "8", "--encoding", "webp", "--workers", "1"]
    context = multiprocessing.get_context("fork")
    began = time.monotonic()
    child = context.Process(target=run_build, args=(["folder", str(src), str(whole), *options],))
    child.start()
    child.join()
    duration = time.monotonic() - began
    assert child.exitcode == 0
    killed, chance = 0, np.random.default_rng(0)
    while killed < 20:
        moment = chance.uniform(0, duration / 2)
        child = context.Process(target=run_build, args=(["folder", str(src), str(out), *options],))
        child.start()
        child.join(timeout=moment)
        child.kill()
        child.join()
        killed += child.exitcode == -signal.SIGKILL
        duration *= 1.0 if child.exitcode else 0.7  # it was too quick
        if (out / "dataset.json").exists():
            assert open_dataset(out) == open_dataset(whole)
            shutil.rmtree(out)
    child = context.Process(target=run_build, args=(["folder", str(src), str(out), *options],))
    child.start()
    child.join()
    assert tree(out) == tree(whole)


def test_a_stop_amid_a_picture_is_no_fault_of_the_picture(
    dcgan_data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src = make_folder(tmp_path / "src", 6)
    build = ("build", "folder", src, tmp_path / "out", "--size", 16, "--workers", 1, "--max-bad", 1)
    image_open = Image.open

    def stop_and_open(*arguments: Any, **options: Any) -> Image.Image:
        os.kill(os.getpid(), signal.SIGTERM)
        return image_open(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", stop_and_open)
        stopped = dcgan_data(*build)
    assert (stopped.code, stopped.err.splitlines()[-1][:8]) == (143, "stopped:"), stopped.err
    assert dcgan_data(*build).code == 0
    assert len(contents(tmp_path / "out")) == 6


def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    src = make_folder(tmp_path / "src", 200, size=64)
    code = "import sys; from pipeline.data.cli import main; main()"
    options = ["--shard-images", "4", "--workers", "2", "--encoding", "webp"]
    command = [sys.executable, "-c", code, "build", "folder", str(src), str(tmp_path / "out"), *options]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        parent = psutil.Process(process.pid)
        while not (children := parent.children(recursive=True)) and process.poll() is None:
            time.sleep(0.01)
        while not list((tmp_path / "out" / ".build").glob("0*.json")) and process.poll() is None:
            time.sleep(0.01)
        children = parent.children(recursive=True) or children
        assert len(children) >= 2
        process.kill()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive


def test_dataset_json_is_plain_and_its_lies_are_found(dcgan_data: Any, tmp_path: Path) -> None:
    src, out = make_folder(tmp_path / "src", 10), tmp_path / "out"
    assert dcgan_data("build", "folder", src, out, "--size", 16).code == 0
    content = json.loads((out / "dataset.json").read_text())
    for change, words in (({"images": 11}, "states 11 images"), ({"version": 9}, "version 9"), ({"x": 1}, "x: ")):
        (out / "dataset.json").write_text(json.dumps(content | change))
        done = dcgan_data("verify", out)
        assert done.code == 65
        assert words in done.err
    (out / "dataset.json").write_text("{")
    assert "not JSON" in dcgan_data("show", out).err


def test_show_prints_the_numbers_and_writes_a_sheet(dcgan_data: Any, tmp_path: Path) -> None:
    src = make_folder(tmp_path / "src", 12, classes=("cat", "dog"))
    assert dcgan_data("build", "folder", src, tmp_path / "out", "--size", 16).code == 0
    done = dcgan_data("show", tmp_path / "out", "--sheet", tmp_path / "sheet.png", "--images", 6)
    assert done.code == 0
    assert "12 of 16x16x3" in done.out
    assert "cat 6, dog 6" in done.out
    assert decode((tmp_path / "sheet.png").read_bytes()).shape == (32, 48, 3)


def test_every_source_of_the_table_is_there_and_every_encoding_is_offered() -> None:
    """The table names modules, because importing the sources would make --help slow."""
    for entry in SOURCES.values():
        source = getattr(import_module(f"pipeline.data.sources.{entry.module}"), entry.name)
        assert callable(source.listing)
        assert callable(source.read)
        assert entry.options <= {field.name for field in fields(source)}
    assert set(EncodingName) == set(get_args(Encoding))
