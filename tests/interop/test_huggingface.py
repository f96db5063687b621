"""What Hugging Face's `datasets` writes is read by `dcgan-data build huggingface`: to_parquet, save_to_disk, its cache.

`make test-interop` installs it.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from picture_files import make_picture
from PIL import Image

from pipeline.data.dataset import open_dataset
from pipeline.data.shard_reader import iterate

pytestmark = pytest.mark.slow
datasets = pytest.importorskip("datasets", reason="make test-interop installs datasets")

NAMES = ["cat", "dog"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `datasets` writes of 30 pictures for training and 10 for testing, in each of its forms."""
    root = tmp_path_factory.mktemp("written")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=NAMES),
            "number": datasets.Value("int32"),
            "boxes": datasets.Sequence(datasets.Value("int32")),
        }
    )

    def pictures(first: int, count: int) -> Any:
        for i in range(first, first + count):
            yield {"image": Image.fromarray(make_picture(i, 32, 32)), "label": i % 2, "number": i, "boxes": [i]}

    splits = {
        split: datasets.Dataset.from_generator(
            pictures, features=features, cache_dir=str(root / "cache"), gen_kwargs={"first": first, "count": count}
        )
        for split, first, count in (("train", 0, 30), ("test", 30, 10))
    }
    datasets.DatasetDict(splits).save_to_disk(root / "saved")
    splits["train"].save_to_disk(root / "alone", num_shards=2)
    (root / "hub" / "data").mkdir(parents=True)
    for split, rows in splits.items():
        for shard in range(2):
            part = rows.shard(2, shard, contiguous=True)
            part.to_parquet(root / "hub" / "data" / f"{split}-{shard:05d}-of-00002.parquet")
    return root


@pytest.mark.parametrize("form", ["saved", "alone", "hub"])
def test_datasets_that_hugging_face_wrote_keep_pixels_and_labels(written: Path, tmp_path: Path, form: str) -> None:
    code = "from pipeline.data.cli import main; main()"
    command = [sys.executable, "-c", code, "build", "huggingface", str(written / form), str(tmp_path / "out")]
    done = subprocess.run([*command, "--size", "32"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "the columns boxes were passed over" in done.stderr
    seen = set()
    for images, columns in iterate(open_dataset(tmp_path / "out"), labels=True):
        for index, number in enumerate(columns["number"]):
            seen.add(number)
            assert (images[index] == make_picture(number, 32, 32)).all()
            assert columns["label"][index] == NAMES[number % 2]
    assert seen == set(range(30))
