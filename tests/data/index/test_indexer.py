"""An index of tars is a data set: whole, resumed, in parts, with labels, and equal to what a build makes."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from picture_files import make_folder, tree
from support import write_dataset
from tar_making import PICTURES, Member, by_tarfile, make_tar, samples, write_tars

from pipeline.common.errors import ConfigConflict, UsageError
from pipeline.common.partition import Partition
from pipeline.data import verify
from pipeline.data.dataset import DATASET_FILE, Dataset, open_dataset
from pipeline.data.index import indexer
from pipeline.data.index import samples as index_samples
from pipeline.data.index.indexer import Indexer, make_index, merge
from pipeline.data.shard_reader import iterate


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (indexer, verify):
        monkeypatch.setattr(module, "available_cores", lambda: 1)


def index(tars: list[str], out: Path, **options: Any) -> Dataset:
    dataset = make_index(tars, out, **{"size": 16, "workers": 1, **options})
    assert dataset is not None
    return dataset


def pixels(dataset: Dataset) -> dict[str, bytes]:
    """Return every image by its name."""
    found = {}
    for images, columns in iterate(dataset, batch=7, labels=True):
        found.update({key: image.tobytes() for key, image in zip(columns["key"], images, strict=True)})
    assert len(found) == dataset.images
    return found


def labels(dataset: Dataset) -> dict[str, dict[str, Any]]:
    """Return every image's labels by its name."""
    found = {}
    for _, columns in iterate(dataset, labels=True):
        keys = columns.pop("key")
        rows = zip(*columns.values(), strict=True) if columns else [()] * len(keys)
        found.update({key: dict(zip(columns, row, strict=True)) for key, row in zip(keys, rows, strict=True)})
    return found


def test_an_index_reads_as_the_set_that_a_build_makes(tmp_path: Path, dcgan_data: Any) -> None:
    write_tars(tmp_path / "tars", 3, 5)
    options = ["--size", 12, "--workers", 1]
    indexed = dcgan_data("index", tmp_path / "tars", tmp_path / "index", *options)
    assert indexed.code == 0, indexed.err
    assert "15 images in 3 tars" in indexed.out
    assert dcgan_data("build", "webdataset", tmp_path / "tars", tmp_path / "built", *options).code == 0
    there, here = open_dataset(tmp_path / "built"), open_dataset(tmp_path / "index")
    assert there.labels == here.labels == {"label": "int"}
    assert pixels(here) == pixels(there)
    assert labels(here) == labels(there)
    assert sorted(tree(tmp_path / "index")) == [DATASET_FILE, "index.npz"]


@pytest.mark.parametrize("encoding", ["jpg", "png", "webp"])
def test_an_index_of_our_own_shards_equals_what_the_build_wrote(tmp_path: Path, dcgan_data: Any, encoding: str) -> None:
    src = make_folder(tmp_path / "src", 12, classes=("cat", "dog"))
    options = ["--size", 16, "--encoding", encoding, "--shard-images", 5, "--workers", 1]
    assert dcgan_data("build", "folder", src, tmp_path / "built", *options).code == 0
    built = open_dataset(tmp_path / "built")
    tars = [str(tmp_path / "built" / shard.name) for shard in built.shards]
    indexed = index(tars, tmp_path / "index")
    for number, shard in enumerate(built.shards):
        offsets, sizes = indexed.members(number)
        assert (offsets.tolist(), sizes.tolist()) == (shard.offsets, shard.sizes)
        assert indexed.place(indexed.shards[number])[0].path(shard.name) == tars[number]
    assert indexed.labels == built.labels == {"class": "str"}
    ours, theirs = (list(iterate(dataset, batch=5, labels=True)) for dataset in (built, indexed))
    for (images, columns), (others, other_columns) in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(images, others)
        assert columns["class"] == other_columns["class"]


def test_a_stopped_index_resumes_and_parts_merge_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dcgan_data: Any
) -> None:
    tars = write_tars(tmp_path / "tars", 5, 3)
    whole = index(tars, tmp_path / "whole")
    scan = Indexer.index
    scanned: list[int] = []

    def stop_at(limit: int) -> None:
        def index_group(self: Indexer, task: indexer.Task) -> indexer.Done:
            if len(scanned) == limit:
                raise KeyboardInterrupt
            scanned.append(task.index)
            return scan(self, task)

        monkeypatch.setattr(Indexer, "index", index_group)

    stop_at(2)
    with pytest.raises(KeyboardInterrupt):
        index(tars, tmp_path / "resumed")
    stop_at(99)
    with pytest.raises(ConfigConflict, match="index of other tars"):
        index(tars[1:], tmp_path / "resumed")
    assert index(tars, tmp_path / "resumed") == whole
    assert scanned == [0, 1, 2, 3, 4]
    assert tree(tmp_path / "resumed") == tree(tmp_path / "whole")

    for part in range(3):
        assert make_index(tars, tmp_path / f"part{part}", size=16, workers=1, part=Partition(part, 3)) is None
    parts = [tmp_path / f"part{part}" for part in range(3)]
    too_few = dcgan_data("merge", tmp_path / "few", *parts[:2])
    assert (too_few.code, "2 of 5 groups of tars are missing" in too_few.err) == (65, True)
    assert dcgan_data("merge", tmp_path / "merged", *parts).code == 0
    assert tree(tmp_path / "merged") == tree(tmp_path / "whole")
    assert merge(str(tmp_path / "merged"), [str(parts[0])]) == whole  # a merge that is run again


def test_a_finished_index_is_known_without_a_look_at_the_tars(tmp_path: Path) -> None:
    tars = write_tars(tmp_path / "tars", 2, 2)
    whole = index(tars, tmp_path / "out")
    shutil.rmtree(tmp_path / "tars")
    assert index(tars, tmp_path / "out") == whole
    with pytest.raises(ConfigConflict, match="is an index of other tars"):
        index(tars[:1], tmp_path / "out")
    with pytest.raises(ConfigConflict, match="size=16 there, 32 now"):
        index(tars, tmp_path / "out", size=32)


def test_an_index_replaces_only_indexes(tmp_path: Path, dcgan_data: Any) -> None:
    """A build that is overwritten loses its shards; the tars of an index are the user's."""
    tars = write_tars(tmp_path / "tars", 2, 2)
    for folder, words in ((tmp_path / "tars", "not empty"), (tmp_path / "built", "images of its own")):
        if folder.name == "built":
            assert dcgan_data("build", "webdataset", tmp_path / "tars", folder, "--size", 16, "--workers", 1).code == 0
        before = tree(folder)
        with pytest.raises(UsageError, match=words):
            index(tars, folder, overwrite=True)
        assert tree(folder) == before
    index(tars, tmp_path / "out")
    assert make_index(tars, tmp_path / "begun", size=16, workers=1, part=Partition(0, 2)) is None
    assert index(tars[1:], tmp_path / "begun", overwrite=True).images == 2
    again = dcgan_data("index", tars[0], tmp_path / "out", "--size", 16, "--overwrite", "--workers", 1)
    assert again.code == 0, again.err
    assert open_dataset(tmp_path / "out").images == 2
    (tmp_path / "out" / "000000.tar").write_bytes(b"the user's")
    build = ["build", "webdataset", tars[0], tmp_path / "out", "--size", 16, "--overwrite", "--workers", 1]
    refused = dcgan_data(*build)
    assert (refused.code, "tars that are not its own" in refused.err) == (2, True)
    assert (tmp_path / "out" / "000000.tar").read_bytes() == b"the user's"
    (tmp_path / "out" / "000000.tar").unlink()
    assert dcgan_data(*build).code == 0
    assert not (tmp_path / "out" / "index.npz").exists()


def odd_members() -> list[Member]:
    picture = PICTURES[0]
    return [
        *samples(20),
        ("a.jpg", picture),
        ("a.png", PICTURES[1]),
        ("b.cls", b"1"),
        ("c.jpg", b""),
        ("d.jpg", b"no picture"),
        ("e.jpg", picture),
        ("e.jpg", picture),
        ("f.txt", b"a caption"),
        ("f.jpg", picture),
        ("g.bin", b"1"),
        ("__meta__/a.json", b"{}"),
        (".hidden.jpg", picture),
    ]


REFUSED = {
    "a.png": "a second image under its key",
    "c.jpg": "empty file",
    "d.jpg": "not an image",
    "e.jpg": "its name is in its tar twice",
    "b": "a sample without an image",
}


def test_what_cannot_be_used_is_named_by_its_reason(tmp_path: Path, dcgan_data: Any) -> None:
    (tmp_path / "odd.tar").write_bytes(make_tar(odd_members()))
    command = ["index", tmp_path / "odd.tar", tmp_path / "out", "--size", 16, "--workers", 1]
    first = dcgan_data(*command)
    assert first.code == 65
    assert "5 of 28 samples cannot be used, more than 1.0%" in first.err
    second = dcgan_data(*command, "--max-bad", 0.18)
    assert second.code == 0, second.err
    for note in ("3 files that are neither images nor labels", "1 captions (.txt)"):
        assert f"note: passed over {note}" in second.err
    dataset = open_dataset(tmp_path / "out")
    assert (dataset.images, dataset.refused.count) == (23, 5)
    lines = (tmp_path / "out" / "refused.txt").read_text().splitlines()
    assert dict(line.split("\t") for line in lines) == {f"odd.tar/{key}": why for key, why in REFUSED.items()}
    smaller = dcgan_data(*command[:2], tmp_path / "small", "--min-side", 18, "--max-bad", 1, "--workers", 1)
    assert "none" in smaller.err or smaller.code == 65
    assert "smaller than 18 pixels" in smaller.err


def test_a_damaged_tar_is_used_only_when_the_user_says_so(tmp_path: Path, dcgan_data: Any) -> None:
    tars = write_tars(tmp_path / "tars", 3, 6)
    content = Path(tars[1]).read_bytes()
    _, offset, _ = (by_tarfile(content) or [])[6]
    Path(tars[1]).write_bytes(content[: offset + 100])
    command = ["index", tmp_path / "tars", tmp_path / "out", "--size", 16, "--workers", 1]
    first = dcgan_data(*command)
    assert first.code == 65
    assert f"{tars[1]}: ends inside" in first.err
    assert "1 of 3 tars cannot be read to their end" in first.err
    assert not (tmp_path / "out" / DATASET_FILE).exists()
    accepted = dcgan_data(*command, "--max-bad", 0.1)
    assert accepted.code == 0, accepted.err
    dataset = open_dataset(tmp_path / "out")
    assert dataset.images == 6 + 3 + 6
    assert dataset.refused.reasons == {indexer.CUT: 1}
    assert len(pixels(dataset)) == dataset.images


def test_a_compressed_tar_is_refused_by_name_with_what_to_do(tmp_path: Path, dcgan_data: Any) -> None:
    import gzip

    (tmp_path / "a.tar").write_bytes(gzip.compress(make_tar(samples(2))))
    done = dcgan_data("index", tmp_path / "a.tar", tmp_path / "out")
    assert done.code == 65
    assert f"{tmp_path}/a.tar: compressed with gzip: gunzip it first" in done.err


def test_packed_shards_and_names_that_json_cannot_hold_are_refused(tmp_path: Path, dcgan_data: Any) -> None:
    done = dcgan_data("index", write_dataset(tmp_path / "packed", images=4), tmp_path / "out")
    assert done.code == 65
    assert "1 blocks of pixels (.npy), which only a build reads: dcgan-data build webdataset" in done.err
    with pytest.raises(UsageError, match=r"\\xff\.tar: a name that is not UTF-8"):
        index([str(tmp_path / "\udcff.tar")], tmp_path / "out")


def test_labels_take_the_narrowest_type_over_all_tars(tmp_path: Path) -> None:
    contents: list[list[bytes]] = [
        [b'{"a": 1, "b": true, "c": "x", "d": 1, "key": "k"}', b'{"a": 2, "b": false, "c": "\\ud800", "d": 2}'],
        [b'{"a": 1.5, "d": "y", "e": [1, 2], "f": {"g": 1}, "h": [7]}', b"{"],
        [b"{}", b'{"b": 3, "i": 99999999999999999999}'],
    ]
    tars = []
    for number, pair in enumerate(contents):
        members = [
            (f"{row}.{end}", data)
            for row, values in enumerate(pair)
            for end, data in (("png", PICTURES[1]), ("json", values))
        ]
        (tmp_path / f"{number}.tar").write_bytes(make_tar(members))
        tars.append(str(tmp_path / f"{number}.tar"))
    dataset = index(tars, tmp_path / "out")
    assert dataset.labels == {"a": "float", "b": "int", "c": "str", "d": "str", "h": "int"}, (
        "what no array holds is no label"
    )
    nothing = dict.fromkeys(dataset.labels)
    assert list(labels(dataset).values()) == [
        nothing | {"a": 1.0, "b": 1, "c": "x", "d": "1"},
        nothing | {"a": 2.0, "b": 0, "d": "2"},
        nothing | {"a": 1.5, "d": "y", "h": 7},
        nothing,
        nothing,
        nothing | {"b": 3},
    ]


@pytest.mark.parametrize(("classes", "order", "warned"), [(4, "sorted", True), (4, "mixed", False), (40, "own", False)])
def test_a_set_that_is_sorted_by_class_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], classes: int, order: str, warned: bool
) -> None:
    members: list[Member] = []
    for row in range(40):
        label = {"sorted": row // 10, "mixed": row * 7919 % 40 % classes, "own": row}[order]
        members += [(f"{row:03d}.png", PICTURES[1]), (f"{row:03d}.cls", str(label).encode())]
    (tmp_path / "a.tar").write_bytes(make_tar(members))
    index([str(tmp_path / "a.tar")], tmp_path / "out")
    assert ("sorted by the label 'label'" in capsys.readouterr().err) is warned


def test_verify_and_show_take_an_index_and_tars_alone(tmp_path: Path, dcgan_data: Any) -> None:
    tars = write_tars(tmp_path / "tars", 2, 4)
    index(tars, tmp_path / "out")
    for data in (tmp_path / "out", tmp_path / "tars"):
        sheet = tmp_path / "sheet.png"
        shown = dcgan_data("show", data, "--out", sheet, "--images", 5)
        assert shown.code == 0, shown.err
        assert "8 of" in shown.out
        assert "label" in shown.out
        assert sheet.stat().st_size > 0
        verified = dcgan_data("verify", data)
        assert verified.code == 0, verified.err
        assert "8 images in 2" in verified.out


def test_verify_names_what_was_damaged_since(tmp_path: Path, dcgan_data: Any) -> None:
    tars = write_tars(tmp_path / "tars", 3, 4)
    dataset = index(tars, tmp_path / "out")
    offsets, sizes = dataset.members(0)
    content = bytearray(Path(tars[0]).read_bytes())
    content[offsets[2] + 30 : offsets[2] + sizes[2]] = bytes(int(sizes[2]) - 30)
    Path(tars[0]).write_bytes(content)
    Path(tars[1]).write_bytes(make_tar(samples(4, start=40)))
    Path(tars[2]).unlink()
    done = dcgan_data("verify", tmp_path / "out")
    assert done.code == 65
    assert f"00000.tar: key '00000.tar/000002.jpg' offset {offsets[2]}" in done.out
    assert "00001.tar: changed since it was indexed" in done.out
    assert "00002.tar: missing" in done.out


@pytest.mark.parametrize(
    "names",
    [
        [b"a.jpg", b"b.jpg"],  # all at once
        [b"x/a.jpg", b"x/b.jpg"],
        [b"a.b/c.jpg", b"d.jpg"],  # a dot in a folder's name
        [b"a.jpg.jpg", b"b"],  # as many dots and endings as names
        [b"a.jpg", b"b.JPG"],
        [b"a.txt", b"b.txt"],
        [b"a.tar", b"b.tar"],
        [b".jpg", b"b.jpg"],
        [b"__notes__/a.jpg", b"b.jpg"],
    ],
)
def test_names_alike_are_read_at_once_as_each_by_itself(names: list[bytes]) -> None:
    kinds, keys = index_samples._kinds_and_keys(names)
    bases = [name.rpartition(b"/")[2] for name in names]
    assert kinds == [index_samples._kind(name, base) for name, base in zip(names, bases, strict=True)]
    for kind, key, name, base in zip(kinds, keys, names, bases, strict=True):
        if kind is not None:
            assert key == name[: len(name) - len(base)] + base.partition(b".")[0]
