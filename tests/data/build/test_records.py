"""A merge asks a store for many things at the same time, and keeps little of what it reads."""

import threading
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from picture_files import make_folder, tree

from pipeline.common.storage import Store
from pipeline.data.build import builder
from pipeline.data.build.process_pool import run_tasks
from pipeline.data.build.records import read_records
from pipeline.data.build.state import Group, group_name, shard_name
from pipeline.data.dataset import Shard

GROUPS = 8
OPTIONS = ("--size", 8, "--shard-images", 2, "--workers", 1)


def test_records_and_shards_of_a_store_are_read_at_the_same_time(
    dcgan_data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each read waits for those of the other groups: one after another, they would wait for ever."""
    assert builder.COPIERS == GROUPS
    src = make_folder(tmp_path / "src", 2 * GROUPS)
    parts = [f"memory://merged/{index}" for index in range(2)]
    for index, part in enumerate(parts):
        assert dcgan_data("build", "folder", src, part, *OPTIONS, "--part", f"{index}/2").code == 0
    assert dcgan_data("build", "folder", src, tmp_path / "whole", *OPTIONS).code == 0
    everyone = {suffix: threading.Barrier(GROUPS, timeout=200) for suffix in (".json", ".tar")}
    read = Store.read

    def together(store: Store, name: str) -> bytes:
        if store.remote and not name.endswith("plan.json"):
            everyone[Path(name).suffix].wait()
        return read(store, name)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "read", together)
        assert dcgan_data("merge", tmp_path / "out", *parts).code == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_many_records_are_summed_in_little_memory(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (tmp_path / ".build").mkdir()
    places = {"offsets": list(range(512, 23_000, 2048)), "sizes": [1000] * 11}
    for index in range(400):
        shard = Shard(name=shard_name(index, 0), images=11, bytes=30_000, sha256="ab" * 32, **places)
        record = Group(shards=[shard], refused=[("a", "b")], skipped=[])
        (tmp_path / group_name(index)).write_text(record.model_dump_json())
    read_records({0: store})
    tracemalloc.start()
    try:
        found = read_records(dict.fromkeys(range(400), store))
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (len(found.shards), len(found.refused), list(found.group_of)) == (400, 400, list(range(400)))
    assert found.shards[399].offsets == places["offsets"]
    assert held < 900 * 400, "records themselves are 2.6 kB a shard"


def test_tasks_are_made_when_workers_are_free() -> None:
    """A build of a million groups does not hold all their pictures at once."""
    made: list[int] = []

    def tasks() -> Any:
        for index in range(1_000):
            made.append(index)
            yield index

    results = run_tasks(abs, tasks(), 2)
    assert next(results) in range(8)
    assert len(made) < 20
    assert len(list(results)) == 999
    assert len(made) == 1_000
