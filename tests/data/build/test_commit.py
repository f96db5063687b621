"""No data set is committed whose shards are not all there, whoever took them away, and nothing foreign joins it."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from picture_files import make_folder, tree

from pipeline.common.storage import Store
from pipeline.data.build import builder
from pipeline.data.build.process_pool import run_tasks
from pipeline.data.build.state import STATE_FILE

SMALL = ("--size", 8, "--shard-images", 5, "--workers", 1)


def remove(out: Path) -> Path:
    (out / "000002.tar").unlink()
    return out / "000002.tar"


def cut(out: Path) -> Path:
    shard = out / "000002.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    return shard


def add(out: Path) -> Path:
    (out / "000002-1.tar").write_bytes(b"of another build")
    return out / "000002-1.tar"


FAULTS: dict[Callable[[Path], Path], str] = {
    remove: "missing, though its record says",
    cut: "bytes, though its record says",
    add: "no record names this shard",
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("command", ["build", "part", "merge", "merge parts"])
def test_what_a_listing_contradicts_is_refused_by_name_and_made_again(
    dcgan_data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, fault: Callable[[Path], Path]
) -> None:
    """The fault is another command's, in the moment between the last shard and the commit."""
    src, out = make_folder(tmp_path / "src", 20), tmp_path / "out"
    assert dcgan_data("build", "folder", src, tmp_path / "whole", *SMALL).code == 0
    build = ["build", "folder", src, out, *SMALL]
    places = [out] * 2
    if command == "merge parts":
        places = [tmp_path / "part0", tmp_path / "part1"]
    if command.startswith("merge"):
        for index, place in enumerate(places):
            assert dcgan_data("build", "folder", src, place, *SMALL, "--part", f"{index}/2").code == 0
    again = {
        "build": [build],
        "part": [[*build, "--part", "1/2"], [*build, "--part", "0/2"], ["merge", out]],
        "merge": [[*build, "--part", "1/2"], ["merge", out]],
        "merge parts": [["merge", out, *places]],
    }[command]
    write = Store.write
    shards: list[Path] = []

    def then_fault(*arguments: Any) -> Iterator[Any]:
        yield from run_tasks(*arguments)
        shards.append(fault(out))

    def write_then_fault(store: Store, name: str, data: Any) -> None:
        write(store, name, data)
        if name.endswith("000003.json"):
            shards.append(fault(out))

    with monkeypatch.context() as patch:
        if command in ("build", "part"):
            patch.setattr(builder, "run_tasks", then_fault)
        elif command == "merge parts":
            patch.setattr(Store, "write", write_then_fault)
        else:
            shards.append(fault(out))
        done = dcgan_data(*(again[-1] if command == "merge" else again[0]))
    if (command, fault) == ("part", add):  # of the parts that share OUT, none knows the shards of all
        assert done.code == 0
        done = dcgan_data(*again[1])
        done = dcgan_data(*again[2])
    assert done.code == 65, done.err
    assert f"error: {shards[0]}: " in done.err
    assert FAULTS[fault] in done.err
    assert not (out / "dataset.json").exists()
    assert (out / STATE_FILE).exists()
    if fault is add:
        shards[0].unlink()
    for line in again:
        assert dcgan_data(*line).code == 0
    assert tree(out) == tree(tmp_path / "whole")


def test_what_a_stopped_worker_was_writing_goes(
    dcgan_data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src, out = make_folder(tmp_path / "src", 20), tmp_path / "out"

    def stopped(*_: Any) -> Iterator[Any]:
        (out / ".000000.tar.x.tmp").write_bytes(b"half")
        (out / ".build" / ".000000.json.x.tmp").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGTERM)
        yield

    monkeypatch.setattr(builder, "run_tasks", stopped)
    done = dcgan_data("build", "folder", src, out, *SMALL)
    assert (done.code, "stopped: " in done.err) == (143, True), done.err
    assert set(tree(out)) == {".build/plan.json"}


def test_parts_that_make_no_whole_are_not_copied(dcgan_data: Any, tmp_path: Path) -> None:
    src = make_folder(tmp_path / "src", 20)
    for index in range(2):
        assert dcgan_data("build", "folder", src, tmp_path / f"{index}", *SMALL, "--part", f"{index}/3").code == 0
    done = dcgan_data("merge", tmp_path / "out", tmp_path / "0", tmp_path / "1")
    assert (done.code, "2 of 4 groups are missing (the first is 2)" in done.err) == (65, True), done.err
    assert not (tmp_path / "out").exists()


def test_sizes_are_of_one_listing_on_a_disk_and_in_a_store(tmp_path: Path) -> None:
    for store in (Store(tmp_path / "new"), Store("memory://sizes")):
        assert store.sizes() == {}
        store.write("a.tar", b"12345")
        store.write("folder/b.tar", b"1")
        assert store.sizes() == {"a.tar": 5}
