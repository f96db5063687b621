"""Every planted damage is found, with its shard, key and offset; stock webdataset reads what we write."""

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from picture_files import make_folder, make_picture
from support import write_dataset

from pipeline.common.errors import DataError
from pipeline.common.imaging import decode, encode
from pipeline.common.storage import Store
from pipeline.data import verify as verify_module
from pipeline.data.dataset import Dataset, open_dataset
from pipeline.data.shard_reader import iterate
from pipeline.data.shard_table import ShardTable

ENCODINGS = ["packed", "png", "webp", "jpg"]


@pytest.fixture(params=ENCODINGS)
def built(request: pytest.FixtureRequest, dcgan_data: Any, tmp_path: Path) -> tuple[Path, Dataset]:
    src = make_folder(tmp_path / "src", 20, classes=("cat", "dog"))
    options = ["--size", 16, "--encoding", request.param, "--shard-images", 10, "--workers", 1]
    assert dcgan_data("build", "folder", src, tmp_path / "out", *options).code == 0
    return tmp_path / "out", open_dataset(tmp_path / "out")


def place_of(dataset: Dataset, index: int) -> tuple[int, int]:
    """Return where the image `index` of the second shard lies: offset, bytes."""
    shard = dataset.shards[1]
    if dataset.encoding == "packed":
        return shard.offsets[0] + index * dataset.image_bytes, dataset.image_bytes
    return shard.offsets[index], shard.sizes[index]


def key_of(out: Path, index: int) -> str:
    keys = [key for _, columns in iterate(open_dataset(out), labels=True) for key in columns["key"]]
    return str(keys[10 + index])


def test_a_flipped_bit_is_found_by_shard_key_and_offset(built: tuple[Path, Dataset], dcgan_data: Any) -> None:
    out, dataset = built
    key = key_of(out, 4)
    offset, size = place_of(dataset, 4)
    path = out / dataset.shards[1].name
    data = bytearray(path.read_bytes())
    data[offset + size // 2] ^= 1
    path.write_bytes(data)
    done = dcgan_data("verify", out)
    assert done.code == 65
    assert done.out.startswith(f"{path.name}: key {key!r} offset {offset}: ")
    assert "1 damages in 1 of 2 shards" in done.err
    with pytest.raises(DataError, match="SHA-256"):
        list(iterate(open_dataset(out)))


def test_a_changed_label_is_found(built: tuple[Path, Dataset], dcgan_data: Any) -> None:
    out, dataset = built
    path = out / dataset.shards[1].name
    path.write_bytes(path.read_bytes().replace(b'"cat"', b'"bat"', 1))
    done = dcgan_data("verify", out)
    assert done.code == 65
    assert path.name in done.out
    assert "key 'cat/" in done.out


def test_a_shard_cut_in_half_is_found(built: tuple[Path, Dataset], dcgan_data: Any) -> None:
    out, dataset = built
    path = out / dataset.shards[1].name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    done = dcgan_data("verify", out)
    assert done.code == 65
    assert f"{path.name}: " in done.out
    assert "bytes, but dataset.json states" in done.out
    with pytest.raises(DataError, match="build or copy the shard again"):
        list(iterate(open_dataset(out)))


def test_a_missing_a_damaged_and_a_stray_shard(built: tuple[Path, Dataset], dcgan_data: Any) -> None:
    out, dataset = built
    first, second = (out / shard.name for shard in dataset.shards)
    first.rename(out / "stray.tar")
    data = bytearray(second.read_bytes())
    data[0] ^= 1  # the first header
    second.write_bytes(data)
    done = dcgan_data("verify", out)
    assert done.code == 65
    assert "stray.tar is not part" in done.out
    assert f"{first.name}: missing" in done.out
    assert f"{second.name}: offset 0: damaged tar header" in done.out


def test_swapped_shards_are_found(built: tuple[Path, Dataset], dcgan_data: Any) -> None:
    out, dataset = built
    first, second = (out / shard.name for shard in dataset.shards)
    content = first.read_bytes(), second.read_bytes()
    first.write_bytes(content[1])
    second.write_bytes(content[0])
    assert dcgan_data("verify", out).code == 65


def test_stock_webdataset_reads_every_encoding(built: tuple[Path, Dataset]) -> None:
    out, dataset = built
    urls = [str(out / shard.name) for shard in dataset.shards]
    expected = {
        key: (image, label)
        for images, columns in iterate(open_dataset(out), labels=True)
        for image, key, label in zip(images, columns["key"], columns["class"], strict=True)
    }
    seen: dict[str, tuple[Any, Any]] = {}
    for sample in webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"):
        names, classes = sample["json"]["key"], sample["json"]["labels"]["class"]
        if dataset.encoding == "packed":
            seen.update(zip(names, zip(sample["npy"], classes, strict=True), strict=True))
        else:
            seen[names] = (sample[dataset.encoding], classes)
    assert seen.keys() == expected.keys()
    for key, (image, label) in seen.items():
        assert label == expected[key][1]
        assert np.abs(image.astype(int) - expected[key][0]).max() <= (4 if dataset.encoding == "jpg" else 0)


def test_our_shards_become_other_shards_with_labels_and_order_kept(
    built: tuple[Path, Dataset], dcgan_data: Any, tmp_path: Path
) -> None:
    out, _ = built
    assert dcgan_data("build", "webdataset", out, tmp_path / "packed", "--size", 16).code == 0
    before = [(images, columns) for images, columns in iterate(open_dataset(out), labels=True)]
    after = [(images, columns) for images, columns in iterate(open_dataset(tmp_path / "packed"), labels=True)]
    assert [columns for _, columns in before] == [columns for _, columns in after]
    for (a, _), (b, _) in zip(before, after, strict=True):
        assert np.array_equal(a, b)


def test_anyones_tars_build(dcgan_data: Any, tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    for shard in range(2):
        with (tmp_path / "src" / f"{shard}.tar").open("wb") as file, webdataset.TarWriter(file) as writer:
            for index in range(6):
                picture = make_picture(10 * shard + index, 24, 24)
                sample = {"__key__": f"dir/{index:03d}", "png": encode(picture, "png"), "cls": index % 3}
                writer.write(
                    {**sample, "json": {"score": index / 2, "nested": {"no": 1}}, "pyd": b"\x80\x04never opened."}
                )
    done = dcgan_data("build", "webdataset", tmp_path / "src", tmp_path / "out", "--size", 24)
    assert done.code == 0, done.err
    assert "6 members of 0.tar that are neither" in done.err
    assert open_dataset(tmp_path / "out").labels == {"label": "int", "score": "float"}
    for images, columns in iterate(open_dataset(tmp_path / "out"), labels=True):
        for image, key, label, score in zip(images, *(columns[n] for n in ("key", "label", "score")), strict=True):
            shard, index = int(key[0]), int(key.partition("dir/")[2][:3])
            assert np.array_equal(image, make_picture(10 * shard + index, 24, 24))
            assert (label, score) == (index % 3, index / 2)
    assert decode(encode(make_picture(0), "png")).shape  # the helper itself

    cut = (tmp_path / "src" / "1.tar").read_bytes()
    (tmp_path / "src" / "1.tar").write_bytes(cut[: len(cut) // 2])
    broken = dcgan_data("build", "webdataset", tmp_path / "src", tmp_path / "other", "--size", 24)
    assert broken.code == 65
    assert "1.tar: damaged tar" in broken.err


def test_shards_of_a_store_are_read_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each read waits for all others: one after another, they would wait for ever."""
    folder = write_dataset(tmp_path, images=verify_module.TASK_SHARDS, shard=1)
    for path in folder.iterdir():
        Store("memory://verified").write(path.name, path.read_bytes())
    dataset = open_dataset("memory://verified")
    everyone, read = threading.Barrier(verify_module.TASK_SHARDS, timeout=200), Store.read

    def together(store: Store, name: str) -> bytes:
        everyone.wait()
        return read(store, name)

    monkeypatch.setattr(Store, "read", together)
    monkeypatch.setattr(verify_module, "available_cores", lambda: 1)  # in this process
    verify_module.verify(dataset)


def test_every_shard_is_looked_up_once_whatever_lies_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = open_dataset(write_dataset(tmp_path, images=30, shard=1))
    for number in range(50):
        (tmp_path / f"stray-{number:02d}.tar").touch()
    (tmp_path / dataset.shards[4].name).unlink()
    made: list[object] = []
    get = ShardTable.__getitem__

    def counted(table: ShardTable, index: Any) -> Any:
        made.append(index)
        return get(table, index)

    monkeypatch.setattr(ShardTable, "__getitem__", counted)
    monkeypatch.setattr(verify_module, "available_cores", lambda: 1)
    with pytest.raises(DataError, match="1 damages in 1 of 30 shards"):
        verify_module.verify(dataset)
    assert len(made) == 29
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 51
    assert printed[-1] == "shard-000004.tar: missing"


def test_pipes_and_unknown_urls_are_refused(dcgan_data: Any, tmp_path: Path) -> None:
    for url in ("pipe:echo hello", "ftp://example/x"):
        for command in (("build", "webdataset", url, tmp_path / "out"), ("verify", url), ("show", url)):
            done = dcgan_data(*command)
            assert done.code == 2
            assert "refused" in done.err


def test_json_members_hold_what_the_documentation_says(built: tuple[Path, Dataset]) -> None:
    out, dataset = built
    sample = next(iter(webdataset.WebDataset([str(out / dataset.shards[0].name)], shardshuffle=False)))
    content = json.loads(sample["json"])
    assert set(content) == {"key", "labels", "crc32"}
    assert isinstance(content["key"], list) is (dataset.encoding == "packed")
