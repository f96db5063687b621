"""A data set carries its store, wherever it is copied or sent, and dataset.json never tells of it."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from support import write_dataset

from pipeline.common.errors import DataError
from pipeline.common.storage import Store
from pipeline.data.dataset import DATASET_FILE, Dataset, dump_dataset, open_dataset
from pipeline.data.shard_reader import iterate


def test_the_store_stays_with_every_copy(tmp_path: Path) -> None:
    dataset = open_dataset(write_dataset(tmp_path, images=8, shard=5))
    first = np.concatenate(list(iterate(dataset)))
    copies = [dataset.model_copy(), dataset.model_copy(update={"labels": {}}), pickle.loads(pickle.dumps(dataset))]
    for copy in copies:
        assert copy.location == str(tmp_path)
        np.testing.assert_array_equal(np.concatenate(list(iterate(copy))), first)


def test_the_store_is_no_part_of_the_record(tmp_path: Path) -> None:
    here, there = (open_dataset(write_dataset(tmp_path / name, images=4)) for name in ("here", "there"))
    assert here.location != there.location
    assert here == there
    assert hash(here) == hash(there)
    assert dump_dataset(here) == dump_dataset(there)
    assert here != here.model_copy(update={"source": {"kind": "other"}})
    assert here != here.fingerprint()


def test_a_data_set_is_opened_from_a_path_or_a_store_and_put_elsewhere(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "set", images=4)
    by_path, by_store = open_dataset(str(folder)), open_dataset(Store(folder))
    assert by_path == by_store
    moved = by_path.at(Store(tmp_path))
    assert (by_path.location, moved.location) == (str(folder), str(tmp_path))
    with pytest.raises(DataError, match=r"shard-000000\.tar: no such file"):
        next(iterate(moved))
    by_hand = Dataset.model_validate(by_path.model_dump())
    with pytest.raises(AssertionError, match="open_dataset"):
        _ = by_hand.store


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not JSON"),
        ("[]", "version None; this program reads version 1"),
        ('{"version": 2}', "version 2; this program reads version 1"),
        ('{"version": 1}', "image_size: Field required"),
    ],
)
def test_what_is_no_data_set_of_this_version_is_refused(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / DATASET_FILE).write_text(content)
    with pytest.raises(DataError, match=f"{DATASET_FILE}: {words}"):
        open_dataset(tmp_path)
