"""Saving may stop at any of its operations: the last finished checkpoint is always whole, and a run resumes from it."""

import errno
import json
import os
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from crashing_disk import LOSSES, CrashingDisk, Loss, PowerCut

from pipeline.checkpoints.saver import Saver
from pipeline.checkpoints.store import HISTORY, CheckpointStore
from pipeline.common.errors import ConfigConflict
from pipeline.common.storage import Store

POSITIONS = (64, 128, 192, 256)
KEEP = 2
SWD = {64: 3.0, 128: 1.0, 192: 2.0, 256: 4.0}  # 128 is the best: kept though it is old


def files_of(images: int) -> dict[str, bytes]:
    return {name: f"{name} at {images} ".encode() * 50 for name in ("a.safetensors", "optimizers.pt", "metrics.jsonl")}


def parts_of(images: int) -> list[bytes]:
    """Return the history that a checkpoint shares with those before it."""
    return [f"lines up to {end}\n".encode() * 50 for end in POSITIONS if end <= images]


def go_on(out: Path, finished: list[int] | None = None) -> None:
    """What the trainer does with its checkpoints: find the newest, then save and retain to the end of the run.

    In the saver's thread, while the training goes on to the next one. The machine stops in both at once.
    """
    store, saver = CheckpointStore(Store(out)), Saver()
    newest = store.load_latest()
    start = newest.images_seen if newest is not None else 0
    store.discard_after(start)

    def write(images: int) -> None:
        parts = [store.write_part(part) for part in parts_of(images)]
        store.save(images, files_of(images), {"metrics": {"swd": SWD[images]}, HISTORY: parts})
        if finished is not None:
            finished.append(images)
        store.retain(KEEP)

    for images in POSITIONS:
        if images > start:
            saver.start(partial(write, images))
    saver.wait()


def tree(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], list[str]]:
    """Return the files at the end of a run that nothing disturbed, and the operations it took."""
    out = tmp_path_factory.mktemp("undisturbed")
    disk = CrashingDisk(out)
    with disk.watching():
        go_on(out)
    return tree(out), disk.operations


def test_the_operations_are_those_of_a_careful_writer(undisturbed: tuple[dict[str, bytes], list[str]]) -> None:
    files, operations = undisturbed
    kinds = {operation.split()[0] for operation in operations}
    assert kinds >= {"write", "fsync", "replace", "mkdir", "unlink", "rmdir"}
    assert len(operations) > 60
    assert {name.split("/")[1] for name in files} == {"000000000128", "000000000192", "000000000256", HISTORY}


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_a_power_cut_at_every_operation(
    undisturbed: tuple[dict[str, bytes], list[str]], tmp_path: Path, loss: Loss
) -> None:
    whole, operations = undisturbed
    for number, operation in enumerate(operations):
        out = tmp_path / f"{number}"
        out.mkdir()
        disk, finished = CrashingDisk(out, crash_at=number), []  # type: ignore[var-annotated]
        with pytest.raises(PowerCut), disk.watching():
            go_on(out, finished)
        found = disk.after_reboot(tmp_path / f"{number} rebooted", loss)
        told = f"cut at {operation}, {loss} lost"
        newest = CheckpointStore(Store(found)).load_latest()
        seen = newest.images_seen if newest is not None else 0
        assert seen >= max(finished, default=0), f"{told}: a finished checkpoint is gone"
        if newest is not None:
            assert newest.files == files_of(seen), told
            assert list(CheckpointStore(Store(found)).read_parts(newest.history)) == parts_of(seen), told
        go_on(found)
        checkpoints = CheckpointStore(Store(found))
        assert checkpoints.load(checkpoints.names()[-1]).files == files_of(256), told
        best = "000000000128/"
        committed = {name: data for name, data in whole.items() if best in name}
        assert committed.items() <= tree(found).items(), f"{told}: the best checkpoint is gone"


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone"])
def test_every_file_of_the_latest_damaged_falls_back_to_the_one_before(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    for name in (*files_of(256), "state.json"):
        out = tmp_path / name
        go_on(out)
        path = out / "checkpoints" / "000000000256" / name
        content = path.read_bytes()
        if damage == "gone":
            path.unlink()
        else:
            flipped = bytes([content[0] ^ 1]) + content[1:]
            path.write_bytes({"flip": flipped, "cut": content[:-7], "empty": b""}[damage])
        caplog.clear()
        latest = CheckpointStore(Store(out)).load_latest()
        assert latest is not None
        assert latest.images_seen == 192
        assert latest.files == files_of(192)
        if (name, damage) != ("state.json", "gone"):  # without state.json it never was a checkpoint
            assert name in caplog.text, "it is said which file made it fall back"
        go_on(out)
        assert CheckpointStore(Store(out)).load("000000000256").files == files_of(256)


def test_a_checkpoint_of_a_newer_version_is_named_and_not_deleted(tmp_path: Path) -> None:
    go_on(tmp_path)
    for path in tmp_path.glob("checkpoints/*/state.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99}))
    before = tree(tmp_path)
    with pytest.raises(ConfigConflict, match="version 99"):
        CheckpointStore(Store(tmp_path)).load_latest()
    assert tree(tmp_path) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root and CAP_SYS_ADMIN")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_keeps_what_was_there_and_leaves_no_scraps(small_disk: Path) -> None:
    store = CheckpointStore(Store(small_disk))
    files = {"weights": os.urandom(9_000), "optimizers.pt": os.urandom(9_000)}
    saved: list[int] = []

    def fill() -> None:
        for images in range(64, 1024, 64):
            store.save(images, files, {})
            saved.append(images)

    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        fill()
    assert saved
    assert not list(small_disk.rglob("*.tmp"))
    latest = store.load_latest()
    assert latest is not None
    assert latest.images_seen == saved[-1]
    for path in small_disk.glob("checkpoints/000000000064/*"):  # somebody makes room
        path.unlink()
    store.save(saved[-1] + 64, files, {})
    assert store.names()[-1] == f"{saved[-1] + 64:012d}"
