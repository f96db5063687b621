"""A data set of many shards keeps them in a file of columns: the same shards, the same identity, little memory."""

import io
import json
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import ROOT, write_dataset

from pipeline.common.errors import DataError
from pipeline.common.storage import Store, sha256_bytes
from pipeline.data import dataset as dataset_module
from pipeline.data.build import state
from pipeline.data.dataset import DATASET_FILE, Dataset, Encoding, open_dataset
from pipeline.data.index.sidecar import Texts, write_arrays
from pipeline.data.loading.loader import Loader
from pipeline.data.shard_reader import iterate
from pipeline.data.shard_table import TABLE_FILE, Shard, ShardTable
from pipeline.data.verify import verify

# Of a data set that 0.1.0 could have written, by the rule of 0.1.0: the SHA-256 of the shards' hashes, a line each.
OLD = {
    "version": 1,
    "image_size": 4,
    "channels": 1,
    "encoding": "packed",
    "labels": {},
    "source": {"kind": "test"},
    "images": 5,
    "bytes": 6000,
    "shards": [
        {"name": "a.tar", "images": 3, "bytes": 3000, "sha256": "0a" * 32, "offsets": [512, 1024], "sizes": [32, 16]},
        {"name": "b.tar", "images": 2, "bytes": 3000, "sha256": "ff" * 32, "offsets": [512], "sizes": [32]},
    ],
    "refused": {"count": 0, "reasons": {}, "examples": []},
}
OLD_FINGERPRINT = "434517aa80f47e9340d8282e1e1eb068fd6b6f76ae0f4711d205457c9c516428"


def test_a_data_set_of_the_former_form_opens_with_the_former_fingerprint(tmp_path: Path) -> None:
    (tmp_path / DATASET_FILE).write_text(json.dumps(OLD))
    dataset = open_dataset(tmp_path)
    assert dataset.fingerprint() == OLD_FINGERPRINT
    assert json.loads(dataset.model_dump_json()) == OLD
    assert [shard.offsets for shard in dataset.shards] == [[512, 1024], [512]]


@pytest.fixture(params=["packed", "jpg"])
def both(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Dataset, Dataset]:
    """Return a data set as small ones are written, and the same as large ones are."""
    encoding: Encoding = request.param
    listed = open_dataset(write_dataset(tmp_path, images=50, encoding=encoding, shard=20))
    monkeypatch.setattr(dataset_module, "LISTED_MEMBERS", 0)
    written = dataset_module.write_dataset(listed)
    opened = open_dataset(tmp_path)
    assert written == opened
    return listed, opened


def test_columns_hold_the_same_shards_and_the_same_identity(both: tuple[Dataset, Dataset]) -> None:
    listed, opened = both
    assert json.loads((Path(opened.location) / DATASET_FILE).read_text())["shards"] == []
    assert opened.table is not None
    assert list(opened.shards) == list(listed.shards)
    assert opened.shards[-1] == listed.shards[2]
    assert opened.fingerprint() == listed.fingerprint()
    assert opened.model_copy(update={"table": None}) == listed
    for number in range(3):
        for mine, theirs in zip(opened.members(number), listed.members(number), strict=True):
            np.testing.assert_array_equal(mine, theirs)
    verify(opened)
    np.testing.assert_array_equal(np.concatenate(list(iterate(opened))), np.concatenate(list(iterate(listed))))
    for limit in (0, 1 << 30):
        run: dict[str, Any] = {"seed": 0, "streams": 2, "batch": 10, "resident_limit": limit}
        with Loader(opened, **run) as new, Loader(listed, **run) as old:
            np.testing.assert_array_equal(new.next_batch(), old.next_batch())


def test_a_copy_with_other_shards_is_not_of_the_file(both: tuple[Dataset, Dataset]) -> None:
    listed, opened = both
    fewer = opened.model_copy(update={"shards": opened.shards[:2]})
    assert fewer.table is None
    assert len(json.loads(fewer.model_dump_json())["shards"]) == 2
    assert len(listed.shards) == len(opened.shards) == 3


def test_a_data_set_that_became_small_is_written_in_one_file(
    both: tuple[Dataset, Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    listed, opened = both
    monkeypatch.undo()
    assert dataset_module.write_dataset(opened) == listed == open_dataset(opened.location)


def test_clearing_removes_the_file_of_the_shards(both: tuple[Dataset, Dataset], tmp_path: Path) -> None:
    state.clear(str(tmp_path))
    assert not (tmp_path / TABLE_FILE).exists()


def rewritten(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Replace the file of the shards by one with other columns, and state its hash: as an attacker would."""
    with np.load(folder / TABLE_FILE) as archive:
        arrays = dict(archive)
    change(arrays)
    content = arrays["raw"] if "raw" in arrays else write_arrays(arrays)
    (folder / TABLE_FILE).write_bytes(content)
    values = json.loads((folder / DATASET_FILE).read_text())
    values["table"] |= {"bytes": len(content), "sha256": sha256_bytes(content)}
    (folder / DATASET_FILE).write_text(json.dumps(values))


def names(*texts: bytes) -> dict[str, Any]:
    column = Texts.of(list(texts))
    return {"name#text": column.text, "name#ends": column.ends}


def compressed() -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, ends=np.arange(3))
    return buffer.getvalue()


def with_objects() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, ends=np.array([None, {}, []], object), allow_pickle=True)
    return buffer.getvalue()


def cut() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(
            "ends.npy", b"\x93NUMPY\x01\x00\x46\x00{'descr': '<i8', 'fortran_order': False, 'shape': (9,), }"
        )
    return buffer.getvalue()


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no column": (lambda a: a.pop("ends"), "lacks a column"),
    "another column": (lambda a: a.update(extra=a["ends"]), "lacks a column, or has another"),
    "a name that leads out": (lambda a: a.update(names(b"../a.tar", b"b.tar", b"c.tar")), "'name'"),
    "a name of another kind": (lambda a: a.update(names(b"a.sh", b"b.tar", b"c.tar")), "'name'"),
    "names without end": (lambda a: a.update({"name#ends": a["name#ends"] + (1 << 40)}), "'name'"),
    "fewer names": (lambda a: a.update(names(b"a.tar", b"b.tar")), "'name'"),
    "members without end": (lambda a: a.update(ends=a["ends"] + 1), "'ends'"),
    "members that go back": (lambda a: a.update(ends=a["ends"][[1, 0, 2]]), "'ends'"),
    "fractions": (lambda a: a.update(size=a["size"].astype(np.float64)), "'size'"),
    "a square": (lambda a: a.update(size=a["size"][:, None]), "'offset'"),
    "no images": (lambda a: a.update(images=a["images"] * 0), "'images'"),
    "more bytes than there are": (lambda a: a.update(bytes=a["bytes"].astype(np.int64) << 40), "'bytes'"),
    "short hashes": (lambda a: a.update(sha256=a["sha256"][:, :16]), "'sha256'"),
    "no shards": (lambda a: a.update({name: column[:0] for name, column in a.items()}), "'sha256'"),
    "places outside": (lambda a: a.update(offset=a["offset"].astype(np.int64) + (1 << 62)), "overlap or lie outside"),
    "places before the file": (lambda a: a.update(offset=a["offset"].astype(np.int64) - 9_999), "overlap or lie outs"),
    "images that are not there": (
        lambda a: a.update(images=a["images"][[2, 1, 0]]),
        "states 10 images in shard-000000",
    ),
    "compressed": (lambda a: a.update(raw=compressed()), "damaged"),
    "objects": (lambda a: a.update(raw=with_objects()), "damaged"),
    "cut": (lambda a: a.update(raw=cut()), "damaged"),
    "no archive": (lambda a: a.update(raw=b"PK"), "damaged"),
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("both", ["packed"], indirect=True)
def test_a_hostile_file_of_shards_is_refused_by_name(both: tuple[Dataset, Dataset], tmp_path: Path, case: str) -> None:
    change, words = HOSTILE[case]
    rewritten(tmp_path, change)
    with pytest.raises(DataError, match=words) as caught:
        open_dataset(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("both", ["packed"], indirect=True)
def test_a_damaged_or_missing_file_of_shards_is_refused(both: tuple[Dataset, Dataset], tmp_path: Path) -> None:
    content = bytearray((tmp_path / TABLE_FILE).read_bytes())
    content[-100] ^= 1
    (tmp_path / TABLE_FILE).write_bytes(content)
    with pytest.raises(DataError, match=f"{TABLE_FILE}: is not the file that dataset.json states"):
        open_dataset(tmp_path)
    (tmp_path / TABLE_FILE).write_bytes(b"")
    with pytest.raises(DataError, match="is not the file that"):
        open_dataset(tmp_path)
    (tmp_path / TABLE_FILE).unlink()
    with pytest.raises(DataError, match=f"{TABLE_FILE}: no such file"):
        open_dataset(tmp_path)
    values = json.loads((tmp_path / DATASET_FILE).read_text())
    (tmp_path / DATASET_FILE).write_text(json.dumps(values | {"shards": OLD["shards"]}))
    with pytest.raises(DataError, match="lists shards, and names a file that does"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("members", [0, 1, 3])
def test_the_check_in_pieces_finds_what_the_check_of_one_shard_finds(
    members: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each shard is sound but one; the piece boundaries lie anywhere."""
    monkeypatch.setattr("pipeline.data.shard_table.CHECKED_MEMBERS", 5)

    def shard(row: int, shift: int = 0) -> Shard:
        places = range(512, 512 + 1000 * (row % 4 + 1), 1000)
        return Shard(
            name=f"{row}.tar",
            images=len(places),
            bytes=9000,
            sha256="00" * 32,
            offsets=[place + shift for place in places],
            sizes=[100] * len(places),
        )

    sound = [shard(row) for row in range(23)]
    assert ShardTable.of(sound).first_unsound(None) is None
    for row in range(23):
        wrong = shard(row).model_copy(update={"images": 9} if members == 0 else {"bytes": 600 + members - 3})
        assert ShardTable.of([*sound[:row], wrong, *sound[row + 1 :]]).first_unsound(None) == row


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data set of 20,000 shards of eleven blocks, without its tars."""
    folder = tmp_path_factory.mktemp("many")
    each = 64 * 64
    sizes = [256 * each] * 10 + [40 * each]
    offsets = [4096 + row * (256 * each + 4096) for row in range(11)]
    first = Shard(name="0.tar", images=2600, bytes=20_000_000, sha256="ab" * 32, offsets=offsets, sizes=sizes)
    shards = ShardTable.of(first.model_copy(update={"name": f"{row}.tar"}) for row in range(20_000))
    dataset = Dataset(
        image_size=64,
        channels=1,
        encoding="packed",
        source={"kind": "test"},
        images=20_000 * 2600,
        bytes=20_000 * 20_000_000,
        shards=shards,
    )
    dataset_module.write_dataset(dataset.at(Store(folder)))
    return folder


def test_many_shards_open_in_little_memory(many: Path) -> None:
    open_dataset(many)  # what is imported at the first use does not count
    tracemalloc.start()
    try:
        dataset = open_dataset(many)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(dataset.shards) == 20_000
    assert held < 50 * 20_000, "a mapped file is not in memory; the former form held 2.6 kB a shard"
    assert peak < 1000 * 20_000
    assert dataset.shards[19_999].name == "19999.tar"


@pytest.mark.slow
def test_400_000_shards_open_in_a_second_and_200_megabytes(tmp_path: Path) -> None:
    script = str(ROOT / "benchmarks" / "listing.py")
    code = "import sys; from listing import write_many; write_many(sys.argv[1], 400_000)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=ROOT / "benchmarks", timeout=300)
    runs = [
        json.loads(
            subprocess.run(
                [sys.executable, script, "--only", "open_many", str(tmp_path)],
                check=True,
                capture_output=True,
                timeout=300,
            ).stdout
        )
        for _ in range(3)
    ]
    assert runs[0]["shards"] == 400_000
    assert max(run["peak_bytes"] for run in runs) < 200e6, runs
    assert min(run["processor_seconds"] for run in runs) < 1, runs
