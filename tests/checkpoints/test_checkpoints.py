"""A checkpoint counts only when it is whole; damage is named; the best and the only good one are never lost."""

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.checkpoints.mirror import Mirror
from pipeline.checkpoints.store import HISTORY, STATE, Checkpoint, CheckpointStore
from pipeline.common.errors import ConfigConflict, DataError
from pipeline.common.storage import Store


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(Store(tmp_path / "run"))


def save(store: CheckpointStore, images: int, swd: float | None = None, content: bytes = b"weights") -> Path:
    name = store.save(images, {"a.bin": content, "b.bin": b"more"}, {"metrics": {} if swd is None else {"swd": swd}})
    return Path(store.path(name))


def test_what_is_saved_comes_back(store: CheckpointStore) -> None:
    save(store, 64, content=b"first")
    save(store, 128, content=b"second")
    checkpoint = store.load_latest()
    assert checkpoint is not None
    assert (checkpoint.images_seen, checkpoint.files["a.bin"]) == (128, b"second")


def test_without_its_state_a_checkpoint_does_not_count(store: CheckpointStore) -> None:
    save(store, 64)
    (save(store, 128) / STATE).unlink()
    checkpoint = store.load_latest()
    assert checkpoint is not None
    assert checkpoint.images_seen == 64


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "state"])
def test_damage_falls_back_to_the_one_before_and_says_so(
    store: CheckpointStore, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(store, 64)
    folder = save(store, 128)
    file = folder / ("state.json" if damage == "state" else "a.bin")
    if damage == "remove":
        file.unlink()
    else:
        data = file.read_bytes()
        file.write_bytes(data[:-1] if damage == "truncate" else bytes([data[0] ^ 1]) + data[1:])
    with caplog.at_level(logging.WARNING):
        checkpoint = store.load_latest()
    assert checkpoint is not None
    assert checkpoint.images_seen == 64
    assert file.name in caplog.text


def test_a_run_never_starts_again_in_silence(store: CheckpointStore) -> None:
    assert store.load_latest() is None
    (save(store, 64) / "a.bin").write_bytes(b"")
    with pytest.raises(DataError, match="all 1 checkpoints are damaged"):
        store.load_latest()


def test_a_newer_format_is_refused_with_its_version_and_not_passed_over(store: CheckpointStore) -> None:
    save(store, 32)
    path = save(store, 64) / STATE
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99}))
    with pytest.raises(ConfigConflict, match="version 99"):
        store.load_latest()


def test_retention_keeps_the_newest_and_the_best(store: CheckpointStore) -> None:
    for images, swd in ((1, 9.0), (2, 3.0), (3, 5.0), (4, None), (5, 6.0)):
        save(store, images, swd)
        store.retain(2)
    assert [int(name) for name in store.names()] == [2, 4, 5]
    assert store.choose("best") == store.choose() == store.names()[0]
    assert store.choose("last") == store.names()[-1]
    assert store.choose("4") == store.names()[1]
    assert store.choose("3") is None


def test_where_none_was_evaluated_no_words_mean_the_last_and_best_means_none(store: CheckpointStore) -> None:
    assert store.choose() is store.choose("best") is store.choose("last") is None
    for images in (0, 1):
        save(store, images, None)
    assert store.choose() == store.choose("last") == store.names()[-1]
    assert store.choose("best") is None
    assert store.load_latest() is not None
    assert store.load(store.names()[0]).images_seen == 0, "a position like others"


def test_two_that_clear_at_once_do_not_trip_over_each_other(store: CheckpointStore) -> None:
    """Two trainers may share a mirror for a while, such as a pod and the one that takes its place."""
    with ThreadPoolExecutor(2) as pool:
        for images in range(0, 30, 3):
            for path in [save(store, images + position) for position in range(3)]:
                for number in range(40):
                    (path / f"{number}").touch()
            for done in [pool.submit(store.retain, 1) for _ in range(2)]:
                done.result()
            assert [int(name) for name in store.names()] == [images + 2]
    assert len(store.store.names("checkpoints")) == 1


def test_retention_removes_older_scraps_and_spares_what_is_being_written(store: CheckpointStore) -> None:
    for images in (64, 128, 192):
        save(store, images)
    for images in (64, 192):
        (Path(store.path(f"{images:012d}")) / STATE).unlink()
    store.retain(5)
    assert [int(name) for name in store.store.names("checkpoints")] == [128, 192]


def test_falling_back_takes_the_damaged_ones_out_of_the_count(store: CheckpointStore) -> None:
    """Otherwise retention would count them among the newest and delete the good one."""
    save(store, 64)
    (save(store, 128) / "a.bin").write_bytes(b"")
    checkpoint = store.load_latest()
    assert checkpoint is not None
    store.discard_after(checkpoint.images_seen)
    save(store, 96)
    store.retain(1)
    assert [int(name) for name in store.names()] == [96]


def test_an_interrupted_overwrite_never_counts(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    save(store, 64, content=b"old")
    write = store.store.write

    def fail_at_second(name: str, data: bytes) -> None:
        if name.endswith("b.bin"):
            raise OSError(28, "No space left on device", name)
        write(name, data)

    monkeypatch.setattr(store.store, "write", fail_at_second)
    with pytest.raises(OSError, match="No space"):
        save(store, 64, content=b"new")
    assert store.names() == []


def test_the_mirror_brings_a_run_back_on_an_empty_disk(store: CheckpointStore, tmp_path: Path) -> None:
    save(store, 64, 1.0)
    save(store, 128, 2.0)
    location = f"file://{tmp_path}/mirror"
    mirror = Mirror(location, store, 2)
    mirror.push()
    mirror.close()
    assert mirror.failures == 0
    assert mirror.lag_seconds == 0
    fresh = CheckpointStore(Store(tmp_path / "elsewhere"))
    assert Mirror(location, fresh, 2).restore()
    checkpoint = fresh.load_latest()
    assert checkpoint is not None
    assert checkpoint.images_seen == 128
    assert checkpoint.state["metrics"] == {"swd": 2.0}
    assert not Mirror(location, fresh, 2).restore(), "what is here already is not copied again"


def mirrored(store: CheckpointStore, tmp_path: Path, **options: bool) -> list[int]:
    """Start with the mirror as a run does, and copy; return what the mirror holds then."""
    mirror = Mirror(f"file://{tmp_path}/mirror", store, 2)
    if options.get("restore", True):
        mirror.restore()
    mirror.push()
    mirror.close()
    return [int(name) for name in mirror.checkpoints.names()]


def test_the_mirror_follows_a_run_that_went_back(store: CheckpointStore, tmp_path: Path) -> None:
    """Otherwise its later checkpoints, of a course that was given up, would be the ones to come back."""
    for images in (64, 128):
        save(store, images)
    assert mirrored(store, tmp_path) == [128]
    for where in (tmp_path / "mirror", tmp_path / "run"):  # the last one is damaged everywhere
        (where / f"checkpoints/{128:012d}/a.bin").write_bytes(b"")
    assert not Mirror(f"file://{tmp_path}/mirror", store, 2).restore()
    store.discard_after(64)
    save(store, 96)
    assert mirrored(store, tmp_path) == [96]


def test_a_run_that_moves_back_goes_on_from_the_newer_mirror(store: CheckpointStore, tmp_path: Path) -> None:
    """Not from what it left on this disk, which would then take the place of all that was done elsewhere."""
    elsewhere = CheckpointStore(Store(tmp_path / "elsewhere"))
    save(elsewhere, 4000, 1.0)
    save(elsewhere, 5000, 2.0)
    mirrored(elsewhere, tmp_path)
    save(store, 128)
    mirror = Mirror(f"file://{tmp_path}/mirror", store, 2)

    def refuse(checkpoint: Checkpoint) -> None:
        raise ConfigConflict(f"{checkpoint.images_seen} is of another run")

    with pytest.raises(ConfigConflict, match="5000 is of another run"):
        mirror.restore(refuse)
    assert mirror.restore()
    checkpoint = store.load_latest()
    assert checkpoint is not None
    assert checkpoint.images_seen == 5000


def test_a_mirror_that_was_away_at_the_start_loses_nothing(
    store: CheckpointStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    elsewhere = CheckpointStore(Store(tmp_path / "elsewhere"))
    save(elsewhere, 4000)
    mirrored(elsewhere, tmp_path)
    save(store, 128)
    assert mirrored(store, tmp_path, restore=False) == [4000]
    assert "holds checkpoint 4000, but did not answer" in caplog.text


def test_one_damaged_checkpoint_keeps_no_other_from_the_mirror(store: CheckpointStore, tmp_path: Path) -> None:
    (save(store, 64, 1.0) / "a.bin").write_bytes(b"")  # the best one
    save(store, 128, 2.0)
    assert mirrored(store, tmp_path) == [128]


def test_the_run_says_which_metric_is_the_best_ones(store: CheckpointStore) -> None:
    for images, swd, fid in ((64, 1.0, 9.0), (128, 2.0, 8.0), (192, 3.0, None)):
        metrics = {"swd": swd} | ({} if fid is None else {"fid": fid})
        store.save(images, {}, {"config": {"schedule": {"best_metric": "fid"}}, "metrics": metrics})
    assert store.best() == f"{128:012d}"
    store.retain(1)
    assert [int(name) for name in store.names()] == [128, 192]


def test_the_mirror_helps_where_all_local_checkpoints_are_damaged(store: CheckpointStore, tmp_path: Path) -> None:
    folder = save(store, 64)
    mirror = Mirror(f"file://{tmp_path}/mirror", store, 2)
    mirror.push()
    mirror.close()
    (folder / "a.bin").write_bytes(b"")
    assert Mirror(f"file://{tmp_path}/mirror", store, 2).restore()
    checkpoint = store.load_latest()
    assert checkpoint is not None
    assert checkpoint.files["a.bin"] == b"weights"


def test_a_mirror_that_is_away_costs_a_warning(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.common.storage.PAUSES_SECONDS", (0.02, 0.02))
    save(store, 64)
    mirror = Mirror("http://127.0.0.1:9/mirror", store, 2)
    with caplog.at_level(logging.WARNING):
        mirror.push()
        mirror.close()
    assert mirror.failures >= 1
    before = mirror.lag_seconds
    assert mirror.lag_seconds > before > 0
    assert "the last checkpoint is not mirrored" in caplog.text


def with_history(store: CheckpointStore, images: int, *parts: bytes) -> Checkpoint:
    name = store.save(images, {"metrics.jsonl": b"rest"}, {HISTORY: [store.write_part(part) for part in parts]})
    return store.load(name)


def test_the_mirror_gets_each_part_of_the_history_once_and_gives_all_back(
    store: CheckpointStore, tmp_path: Path
) -> None:
    with_history(store, 64, b"one\n", b"two\n")
    assert mirrored(store, tmp_path) == [64]
    parts = tmp_path / "mirror/checkpoints" / HISTORY
    before = {path: path.stat().st_mtime_ns for path in parts.iterdir()}
    with_history(store, 128, b"one\n", b"two\n", b"three\n")
    assert mirrored(store, tmp_path) == [64, 128]
    assert len(list(parts.iterdir())) == 3
    assert all(path.stat().st_mtime_ns == written for path, written in before.items())
    fresh = CheckpointStore(Store(tmp_path / "elsewhere"))
    assert Mirror(f"file://{tmp_path}/mirror", fresh, 2).restore()
    checkpoint = fresh.load_latest()
    assert checkpoint is not None
    assert list(fresh.read_parts(checkpoint.history)) == [b"one\n", b"two\n", b"three\n"]


@pytest.mark.parametrize("damage", ["alter", "remove"])
def test_a_damaged_part_of_the_history_costs_its_lines_and_no_weights(
    store: CheckpointStore, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = with_history(store, 64, b"one\n", b"two\n", b"three\n")
    path = Path(store.path(HISTORY)) / f"{checkpoint.history[1]}.jsonl"
    assert path.read_bytes() == b"two\n"
    path.write_bytes(b"tvo\n") if damage == "alter" else path.unlink()
    assert list(store.read_parts(checkpoint.history)) == [b"one\n", b"three\n"]
    assert path.name in caplog.text
    assert mirrored(store, tmp_path) == [64]
    assert sorted(path.read_bytes() for path in (tmp_path / "mirror/checkpoints" / HISTORY).iterdir()) == [
        b"one\n",
        b"three\n",
    ]


def test_a_part_that_is_there_is_not_written_again_and_scraps_are_removed(store: CheckpointStore) -> None:
    part = store.write_part(b"one\n")
    folder = Path(store.path(HISTORY))
    (folder / ".killed.jsonl.1.tmp").write_bytes(b"half")
    written = (folder / f"{part}.jsonl").stat().st_mtime_ns
    assert store.write_part(b"one\n") == part
    assert (folder / f"{part}.jsonl").stat().st_mtime_ns == written
    store.write_part(b"two\n")
    assert sorted(path.suffix for path in folder.iterdir()) == [".jsonl", ".jsonl"]


@pytest.mark.parametrize("history", ["one", [1], {"one": 1}, ["../one"], ["/one"], [""]])
def test_a_history_cannot_name_a_path(store: CheckpointStore, history: object) -> None:
    name = store.save(64, {}, {HISTORY: history})
    with pytest.raises(DataError, match=r"state\.json: (damaged|names the file)"):
        store.load(name)


@pytest.mark.parametrize("name", ["../../payload", "/tmp/payload", "a/b", "..", ".", "", "a\\b", "a\0b"])
def test_a_file_list_cannot_name_a_path(store: CheckpointStore, tmp_path: Path, name: str) -> None:
    saved = store.save(64, {"a.bin": b"a"}, {})
    path = Path(store.path(saved)) / STATE
    state = json.loads(path.read_text())
    state["files"] = {name: state["files"]["a.bin"]}
    path.write_text(json.dumps(state))
    other = CheckpointStore(Store(tmp_path / "other"))
    with pytest.raises(DataError, match="expected a plain name"):
        other.copy(store.load(saved), store)
    with pytest.raises(DataError, match="expected a plain name"):
        store.load(saved)
    assert not (tmp_path / "other").exists() or not list((tmp_path / "other").rglob("*"))


def test_the_best_from_before_a_position_passes_over_what_is_damaged(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture
) -> None:
    for images, swd in ((0, None), (64, 30.0), (128, 20.0), (192, 10.0)):
        save(store, images, swd)
    assert store.ranked() == [f"{images:012d}" for images in (192, 128, 64)]
    found = store.load_best(192)
    assert found is not None
    assert found.images_seen == 128
    assert store.load_best(64) is None, "that of image 0 was not evaluated"
    (Path(store.path(f"{128:012d}")) / "a.bin").write_bytes(b"other")
    found = store.load_best(192)
    assert found is not None
    assert found.images_seen == 64
    assert "trying the next best checkpoint" in caplog.text


def test_the_mirror_gives_back_the_best_that_a_disk_lacks(store: CheckpointStore, tmp_path: Path) -> None:
    """A run that moved to an empty disk has its newest checkpoint there, and may have to go back to its best."""
    for images, swd in ((64, 10.0), (128, 40.0)):
        save(store, images, swd)
    assert mirrored(store, tmp_path) == [64, 128]
    moved = CheckpointStore(Store(tmp_path / "elsewhere"))
    mirror = Mirror(f"file://{tmp_path}/mirror", moved, 2)
    assert mirror.restore()
    mirror.restore_best(128)
    assert moved.names() == [f"{images:012d}" for images in (64, 128)]
    assert moved.load("000000000064").files == store.load("000000000064").files
    Mirror("http://127.0.0.1:9/mirror", moved, 2).restore_best(128)  # one that does not answer costs a warning
