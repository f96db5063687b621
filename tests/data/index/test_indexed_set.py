"""An indexed data set is a data set: checked when it is opened, sent to processes, read in part."""

import io
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from support import write_dataset
from tar_making import write_tars

from pipeline.common.errors import DataError, UsageError
from pipeline.common.storage import sha256_bytes
from pipeline.data.dataset import DATASET_FILE, Dataset, dump_dataset, open_dataset
from pipeline.data.dedup.dedup import _kept_codes, dedup
from pipeline.data.index.indexer import make_index
from pipeline.data.index.sidecar import LabelColumn, Texts, read_arrays
from pipeline.data.labeled import load_labeled
from pipeline.data.shard_reader import iterate
from pipeline.data.sources.tars import _block
from pipeline.evaluation.images import ShardImages


@pytest.fixture
def indexed(tmp_path: Path) -> Dataset:
    """Three tars of ten images."""
    dataset = make_index(write_tars(tmp_path / "tars", 3, 10), tmp_path / "out", size=16, workers=1)
    assert dataset is not None
    return dataset


def test_the_place_of_tars_is_opened_once(indexed: Dataset) -> None:
    stores = [indexed.place(shard)[0] for shard in indexed.shards]
    assert stores[0] is stores[1] is stores[2]


def test_the_json_and_the_fingerprint_of_other_sets_know_nothing_of_indexes(tmp_path: Path) -> None:
    dataset = open_dataset(write_dataset(tmp_path, images=8, shard=5))
    content = json.loads(dump_dataset(dataset))
    assert "index" not in content
    assert all(list(shard) == ["name", "images", "bytes", "sha256", "offsets", "sizes"] for shard in content["shards"])
    assert dataset.fingerprint() == sha256_bytes("\n".join(shard.sha256 for shard in dataset.shards).encode())
    offsets, sizes = dataset.members(1)
    assert (offsets.tolist(), sizes.tolist()) == (dataset.shards[1].offsets, dataset.shards[1].sizes)
    assert dataset.place(dataset.shards[1]) == (dataset.store, dataset.shards[1].name)


def test_it_opens_as_it_was_made_and_travels_without_its_sidecar(indexed: Dataset) -> None:
    opened = open_dataset(indexed.store)
    assert opened == indexed
    assert opened.columns.key.slice(9, 11) == ["00000.tar/000009.png", "00001.tar/000010.jpg"]
    assert [rows.start for rows in map(opened.rows, range(3))] == [0, 10, 20]
    small = pickle.dumps(opened)
    assert len(small) < len(pickle.dumps(opened.columns))
    np.testing.assert_array_equal(pickle.loads(small).columns.offset, opened.columns.offset)


def test_the_fingerprint_depends_on_what_decides_the_pixels(indexed: Dataset, tmp_path: Path) -> None:
    tars = [str(shard.location) for shard in indexed.shards]
    again = make_index(tars, tmp_path / "again", size=16, workers=1)
    larger = make_index(tars, tmp_path / "larger", size=32, workers=1)
    fewer = make_index(tars, tmp_path / "fewer", size=16, min_side=17, workers=1)
    assert again is not None
    assert again.fingerprint() == indexed.fingerprint()
    assert len({set_.fingerprint() for set_ in (indexed, larger, fewer) if set_ is not None}) == 2  # all are 17 high


def archive(**arrays: object) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **{name: np.asarray(array) for name, array in arrays.items()})  # type: ignore[arg-type]
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file"),
        (b"PK", "damaged"),
        (archive(offset=[1]), "lacks the column 'label/0'"),
        (archive(offset=np.array([{}, []], object)), "damaged"),  # a pickle
        ({"offset": -1}, "places images outside their tars"),
        ({"size": 1 << 20}, "places images outside their tars"),
        ({"key#ends": 1 << 20}, "is damaged: 'key'"),
        ({"offset": 0.5}, "is damaged: 'offset'"),
    ],
)
def test_a_sidecar_that_is_not_the_stated_one_is_refused(
    indexed: Dataset, content: bytes | dict[str, float] | None, words: str
) -> None:
    path = Path(indexed.location) / "index.npz"
    stated = path.read_bytes()
    path.write_bytes(stated[:-1] + b"x")
    with pytest.raises(DataError, match=r"index\.npz: is not the file that dataset\.json states"):
        next(iterate(open_dataset(indexed.store)))
    path.unlink()
    if isinstance(content, dict):
        arrays = read_arrays(stated, "here")
        content = archive(**arrays | {name: np.array([value] * 30) for name, value in content.items()})
    if content is not None:
        path.write_bytes(content)
        values = json.loads((Path(indexed.location) / DATASET_FILE).read_text())
        values["index"] |= {"bytes": len(content), "sha256": sha256_bytes(content)}
        (Path(indexed.location) / DATASET_FILE).write_text(json.dumps(values))
    with pytest.raises(DataError, match=rf"index\.npz: {words}"):
        next(iterate(open_dataset(indexed.store)))


def test_an_index_without_a_sidecar_contradicts_itself(indexed: Dataset) -> None:
    path = Path(indexed.location) / DATASET_FILE
    values = json.loads(path.read_text())
    del values["index"]
    path.write_text(json.dumps(values))
    with pytest.raises(DataError, match="an index needs encoding 'tar' and a sidecar"):
        open_dataset(indexed.store)


def test_a_part_of_it_is_taken_at_equal_distances(indexed: Dataset) -> None:
    whole = np.concatenate(list(iterate(indexed)))
    images, columns = next(iterate(indexed, limit=6, labels=True))
    np.testing.assert_array_equal(images, whole[::5])
    assert [key.rpartition("/")[2][:6] for key in columns["key"]] == [f"{row:06d}" for row in range(0, 30, 5)]
    ((_, block),) = ShardImages(indexed, 6).blocks()
    np.testing.assert_array_equal(block, images)
    labeled = load_labeled(indexed)
    assert sorted(labeled.columns["label"].tolist()) == sorted(row % 3 for row in range(30))
    assert labeled.columns["label"].tolist() != [row % 3 for row in range(30)]  # the tars may be sorted by class
    for image, label in zip(labeled.images, labeled.columns["label"].tolist(), strict=True):
        assert any((image == whole[row]).all() for row in range(label, 30, 3))


def test_deduplication_needs_images_of_ones_own(indexed: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is an index of tars; copy the images first: dcgan-data build webdataset"):
        dedup(indexed, str(tmp_path / "unique"), radius=8, seed=0, workers=1, overwrite=False)


def test_columns_of_texts() -> None:
    texts = Texts.of([b"a", b"", b"\xc3\xa4\xff", b"long"], b"x/")
    assert texts.slice(0, 9) == ["x/a", "x/", "x/ä\\xff", "x/long"]
    assert texts.slice(1, 3) == ["x/", "x/ä\\xff"]
    joined = Texts.join([texts, Texts.of([]), texts])
    assert joined.take(np.array([7, 0])) == ["x/long", "x/a"]
    some = LabelColumn(np.array([1, 0, 3]), np.array([False, True, False]))
    assert some.take(np.arange(3)) == [1, None, 3]
    assert read_arrays(archive(a=[1]), "here")["a"].tolist() == [1]


@pytest.mark.parametrize("header", [b"[[[[", b"{'a':\0", b"  x\n y", b'"""', b"(" * 3000])
def test_a_damaged_header_of_an_array_is_damage_whatever_numpy_makes_of_it(tmp_path: Path, header: bytes) -> None:
    array = np.lib.format.magic(2, 0) + len(header).to_bytes(4, "little") + header
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a.npy", array)
    with pytest.raises(DataError, match="here: damaged"):
        read_arrays(buffer.getvalue(), "here")
    (tmp_path / "codes.npy").write_bytes(array)
    (tmp_path / "hash-of.txt").write_text("identity")
    marker, weights, codes = (tmp_path / name for name in ("hash-of.txt", "hash.safetensors", "codes.npy"))
    assert _kept_codes(marker, weights, codes, "identity", 4) is None
    assert _block(io.BytesIO(array), "a.tar", 0, 4096) is None
