"""A file is there whole or not at all, and what a killed writer leaves goes without harm to those that write."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.common.errors import DataError, first_line
from pipeline.common.storage import Store, atomic_path, public_name, remove_abandoned, write_atomic

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


@pytest.mark.parametrize("name", ["../outside", "a/../../outside", "/outside", "a\0b", ".."])
def test_no_name_leads_out_of_a_store(tmp_path: Path, name: str) -> None:
    (tmp_path / "outside").write_text("not yours")
    store = Store(tmp_path / "store")
    store.write("a/b", b"mine")
    uses: list[Callable[[], object]] = [
        lambda: store.read(name),
        lambda: store.read_range(name, 0, 1),
        lambda: store.write(name, b"x"),
        lambda: store.exists(name),
        lambda: store.names(name),
        lambda: store.delete(name),
        lambda: store.inside(name),
        lambda: store.remove_abandoned(name),
    ]
    for use in uses:
        with pytest.raises(DataError, match="outside of it"):
            use()
    assert (tmp_path / "outside").read_text() == "not yours"


def test_nothing_is_written_or_deleted_through_a_link_that_leads_out(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("not yours")
    (outside / ".half.tmp").write_text("not yours")
    store = Store(tmp_path / "store")
    store.write("real/file", b"mine")
    (tmp_path / "store" / "link").symlink_to(outside)
    (tmp_path / "store" / "file").symlink_to(outside / "file")
    (tmp_path / "store" / "near").symlink_to("real")
    uses: list[Callable[[], object]] = [
        lambda: store.write("link/new", b"x"),
        lambda: store.delete("link/file"),
        lambda: store.remove_abandoned("link"),
        lambda: store.inside("link/file"),
        lambda: store.inside("file"),
    ]
    for use in uses:
        with pytest.raises(DataError, match=rf"a link that leads out of .*store, to {outside}"):
            use()
    store.write("near/file", b"changed")
    assert store.read(store.inside("near/file")) == store.read("real/file") == b"changed"
    assert store.read("file") == b"not yours", "people link their files"
    store.write("file", b"mine")  # takes the link's place
    store.delete("link")
    assert sorted(path.name for path in outside.iterdir()) == [".half.tmp", "file"]
    assert (outside / "file").read_text() == "not yours"


def test_tidying_neither_follows_links_nor_waits_for_pipes(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".pipe.tmp")
    (tmp_path / "kept").write_text("mine")
    (tmp_path / ".link.tmp").symlink_to(tmp_path / "kept")
    remove_abandoned(tmp_path)
    assert (tmp_path / "kept").read_text() == "mine"


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "nothing", "pipe/below"):
        with pytest.raises(DataError, match=f"{name}: no such file"):
            Store(tmp_path).read(name)


def test_a_message_is_one_printable_line() -> None:
    forged = str(DataError("a.tar\x1b[2J: no such file\nerror: \u202eall is well\udcff"))
    assert forged == r"a.tar\x1b[2J: no such file error: \u202eall is well\udcff"
    assert len(str(DataError("x" * 10**6 + " do this"))) < 2_010
    assert str(DataError("x" * 10**6 + " do this")).endswith("do this")
    assert first_line(ValueError("\x1b[1mfile\x1b[0m in `weights_only`\nsecond")) == "file in `weights_only`"


@pytest.mark.parametrize(
    ("location", "published"),
    [
        ("/home/jane/pictures/faces/", "faces"),
        ("faces", "faces"),
        ("file:///home/jane/faces", "faces"),
        ("https://jane:secret@host:8080/faces?token=1#x", "https://host:8080/faces"),
        ("s3://bucket/faces", "s3://bucket/faces"),
    ],
)
def test_what_is_published_says_nothing_of_this_machine(location: str, published: str) -> None:
    assert public_name(location) == published
