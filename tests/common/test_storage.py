"""A file is there whole or not at all, and what a killed writer leaves goes without harm to those that write."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pipeline.common.storage import atomic_path, remove_abandoned, write_atomic

KILLED = """
import os, signal, sys
from pathlib import Path
from pipeline.common.storage import atomic_path
with atomic_path(Path(sys.argv[1])) as path:
    path.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_an_error_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "file"
    write_atomic(file, "old")

    def fail() -> None:
        with atomic_path(file) as path:
            path.write_bytes(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [(path.name, path.read_text()) for path in file.parent.iterdir()] == [("file", "old")]


def test_what_a_killed_process_was_writing_is_removed_and_what_a_live_one_writes_is_not(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", KILLED, tmp_path / "killed"], check=False)
    assert [path.read_bytes() for path in tmp_path.glob(".killed.*.tmp")] == [b"half"]
    (tmp_path / ".notes.txt").write_text("mine")
    with atomic_path(tmp_path / "file") as path:
        path.write_bytes(b"whole")
        remove_abandoned(tmp_path)
        assert {entry.name for entry in tmp_path.iterdir()} == {".notes.txt", path.name}
    assert (tmp_path / "file").read_bytes() == b"whole"


def test_writers_and_those_who_tidy_never_meet(tmp_path: Path) -> None:
    done = threading.Event()

    def tidy() -> None:
        while not done.is_set():
            remove_abandoned(tmp_path)

    tidying = [threading.Thread(target=tidy) for _ in range(2)]
    for thread in tidying:
        thread.start()
    try:
        for number in range(300):
            write_atomic(tmp_path / str(number), str(number))
    finally:
        done.set()
        for thread in tidying:
            thread.join()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {str(n): str(n) for n in range(300)}
