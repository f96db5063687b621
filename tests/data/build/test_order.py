"""A listing larger than memory has the order, the identity and the shards that it had when it was sorted in memory."""

import hashlib
import json
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from picture_files import make_folder
from support import ROOT

from pipeline.common.imaging import Pixels
from pipeline.data import spool
from pipeline.data.build import order
from pipeline.data.build.order import in_order
from pipeline.data.build.plan import PlannedBuild, Selection, in_validation, key_hash, plan_build
from pipeline.data.build.transform import Recipe
from pipeline.data.sources.interface import Item, Items, Listing, printable
from pipeline.data.spool import Spool

RECIPE = Recipe(size=4, channels=1, encoding="packed", quality=100, min_side=1)


class Gray:
    """A source whose pictures are all the same."""

    def listing(self) -> Listing:
        raise NotImplementedError

    def read(self, item: Item) -> Pixels:
        return np.zeros((4, 4, 1), np.uint8)


def pictures(count: int) -> list[Item]:
    """Return pictures with names that need care in JSON, labels of every type, and sizes or other places."""
    names = ['quo"te', "back\\slash", "ümlaut", "\udcff broken", "plain", "日本"]
    return [
        Item(
            f"{i % 7}/{names[i % len(names)]} {i}.png",
            (i % 3 == 0, i, i / 8, None if i % 5 else f"class é {i % 4}", float("nan") if i % 11 == 0 else 1e300),
            i if i % 2 else ("a.tar", i, 5, (4, 4, 1)),
        )
        for i in range(count)
    ]


LABELS: dict[str, Any] = {"a": "bool", "b": "int", "c": "float", "d": "str", "e": "float"}


def former(items: list[Item], selection: Selection) -> tuple[list[Item], str]:
    """Return the order and the digest as they were made in memory."""
    chosen = sorted(items, key=lambda item: key_hash(selection.seed, item.key))[: selection.limit]
    if selection.split != "all":
        chosen = [item for item in chosen if in_validation(item.key, selection) is (selection.split == "val")]
    digest = hashlib.sha256()
    for item in chosen:
        size = item.where if isinstance(item.where, int) else 0
        digest.update(json.dumps([printable(item.key), item.labels, size]).encode())
    return chosen, digest.hexdigest()


def planned(items: list[Item], selection: Selection) -> PlannedBuild:
    listing = Listing(dict(LABELS), Items(items))
    return plan_build(Gray(), listing, {}, selection, RECIPE, shard_bytes=32_000_000, shard_images=100)


@pytest.mark.parametrize("memory", ["all in memory", "runs on disk", "runs of runs"])
@pytest.mark.parametrize(
    "selection",
    [
        Selection(seed=3),
        Selection(seed=4, limit=700),
        Selection(seed=5, limit=900, val_fraction=0.2, split="val"),
        Selection(seed=5, limit=900, val_fraction=0.2, split="train"),
    ],
)
def test_order_identity_and_groups_are_the_former_ones(
    monkeypatch: pytest.MonkeyPatch, selection: Selection, memory: str
) -> None:
    if memory != "all in memory":
        monkeypatch.setattr(order, "SORTED_ROWS", 500 if memory == "runs on disk" else 8)
        monkeypatch.setattr(spool, "CHUNK", 16)
        monkeypatch.setattr(spool, "SPOOL_BYTES", 1)
    items = pictures(1_000)
    expected, digest = former(items, selection)
    build = planned(items, selection)
    assert str(list(build.pictures)) == str(expected)  # a NaN is not equal to itself
    assert (build.plan.listing, build.plan.pictures) == (digest, len(expected))
    total, groups = len(expected), build.plan.groups
    for index in (groups - 1, 0, groups // 2):
        span = slice(total * index // groups, total * (index + 1) // groups)
        assert str(build.group(index)) == str(expected[span])
        assert build.span(index) == range(span.start, span.stop)


def test_the_identity_is_the_one_that_data_sets_record() -> None:
    """Made by the program before this one: a data set that it built is recognized, not built again."""
    assert (
        planned(pictures(1_000), Selection(seed=3)).plan.listing
        == "7c73ab447214cbe27e01e4033834814d43b3d28b1b168c74fafa722c13525e85"
    )


def test_a_built_set_has_the_bytes_that_it_had(
    dcgan_data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(order, "SORTED_ROWS", 8)
    monkeypatch.setattr(spool, "CHUNK", 4)
    src = make_folder(tmp_path / "src", 40, classes=("cat", "dog"), size=16)
    build = ("build", "folder", src, tmp_path / "out", "--size", 16, "--shard-images", 12, "--workers", 1)
    assert dcgan_data(*build).code == 0
    shards = sorted((tmp_path / "out").glob("*.tar"))
    assert (
        hashlib.sha256(b"".join(path.read_bytes() for path in shards)).hexdigest()
        == "de78534abdfcf1b1a7d39a60135fb9e928bd92f01d7f4b279b760e97256ce05a"
    )
    content = json.loads((tmp_path / "out" / "dataset.json").read_text())
    content["source"].pop("listing")  # counts the files' sizes, which are the encoder's
    content["source"].pop("sizes", None)  # counted since then, and no part of the identity
    assert (
        hashlib.sha256(json.dumps(content).encode()).hexdigest()
        == "2734d4e562ddbd7dba9b73aa57fb50757e79160daa7f3539f879affce98e7df2"
    )


def test_equal_hashes_are_in_the_order_of_their_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """A listing of a folder has no order of its own, and parts on other machines must agree."""
    monkeypatch.setattr(order, "SORTED_ROWS", 10)
    rows = [(bytes(8) + f"{i * 37 % 100:02d}".encode(), (), i) for i in range(100)]
    assert [row[0][8:].decode() for row in in_order(rows)] == [f"{i:02d}" for i in range(100)]


def test_a_walk_takes_no_more_than_it_needs() -> None:
    """The limit is a draw: what follows it is sorted, but never read."""
    rows = ((key_hash(0, str(i)), (), i) for i in range(300))
    assert len(list(islice(in_order(rows), 10))) == 10


def test_a_spool_is_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "CHUNK", 7)
    values = Spool[int](range(20), memory_bytes=1)
    values.append(20)
    values += range(21, 40)
    values.flush()
    values.extend(range(40, 50))
    assert (len(values), list(values), list(values)) == (50, list(range(50)), list(range(50)))
    for start, stop in ((0, 0), (0, 50), (6, 8), (7, 14), (13, 49), (49, 50), (20, 21)):
        assert values.slice(start, stop) == list(range(start, stop))
    values.append(50)
    assert list(values)[-1] == 50
    assert not Spool[int]()


@pytest.mark.slow
def test_a_part_of_ten_million_pictures_is_planned_within_two_gigabytes() -> None:
    """Memory does not grow with the listing: `benchmarks/results/listing.json` has it for more."""
    script = str(ROOT / "benchmarks" / "listing.py")
    command = [sys.executable, script, "--only", "plan", "10000000"]
    done = subprocess.run(command, check=True, capture_output=True, timeout=1200)
    found = json.loads(done.stdout)
    assert found["pictures_of_a_part"] == pytest.approx(10_000_000 / 64, rel=0.01)
    assert found["peak_bytes"] < 2e9, found
