"""Shards that we write open in other libraries as they are: wids, Hugging Face datasets, torchdata.

`make test-interop` installs them. Stock webdataset is tried in tests/data/test_verify.py and tests/deploy.
"""

import io
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from picture_files import make_folder
from PIL import Image
from support import ROOT

from pipeline.checkpoints.weights import serialize
from pipeline.common.imaging import Pixels
from pipeline.config import NetworkConfig
from pipeline.data.dataset import Dataset, open_dataset
from pipeline.data.shard_reader import iterate
from pipeline.data.specification import expand
from pipeline.model.networks import build_generator, initialize

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent
OLDER = ROOT / "build" / "interop"
"""The last webdataset with wids and the last torchdata with DataPipes, which `make test-interop` puts there."""

Samples = list[dict[str, Any]]

READ_WIDS = """
import sys, wids
dataset = wids.ShardListDataset(sys.argv[1], cache_dir=sys.argv[2], transformations=[])
found = [{key.lstrip("."): value.read() for key, value in dataset[index].items() if key.startswith(".")}
         for index in reversed(range(len(dataset)))]
"""
READ_DATAPIPES = """
import sys
from torchdata.datapipes.iter import FileOpener, IterableWrapper
pipe = FileOpener(IterableWrapper(sys.argv[1:]), mode="b").load_from_tar().webdataset()
found = [{key.lstrip("."): value.read() for key, value in sample.items() if key.startswith(".")} for sample in pipe]
"""


def run(*command: object, **environment: str) -> bytes:
    """Run a command and return what it prints."""
    done = subprocess.run(
        [*map(str, command)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def run_older(script: str, *arguments: object) -> Samples:
    """Return the samples that a script of the older libraries finds, as bytes by suffix."""
    if not OLDER.is_dir():
        pytest.skip("make test-interop installs the older libraries")
    code = f"{script}\nimport pickle\nsys.stdout.buffer.write(b'<<<' + pickle.dumps(found))"
    path = os.pathsep.join([str(OLDER), os.environ.get("PYTHONPATH", "")])
    samples: Samples = pickle.loads(run(sys.executable, "-c", code, *arguments, PYTHONPATH=path).partition(b"<<<")[2])
    return samples


SETS = [f"{kind} {encoding}" for kind in ("build", "generate") for encoding in ("packed", "png", "webp", "jpg")]


@pytest.fixture(scope="module", params=SETS)
def dataset(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A data set in two shards or more, of pictures with labels or of samples."""
    kind, encoding = request.param.split()
    folder = tmp_path_factory.mktemp(f"{kind}-{encoding}")
    if kind == "build":
        src = make_folder(folder / "src", 12, classes=("cat", "dog"))
        options = ["--size", 16, "--encoding", encoding, "--shard-images", 6, "--workers", 1]
        run(BIN / "dcgan-data", "build", "folder", src, folder / "set", *options)
    else:
        config = NetworkConfig(width=8, image_size=32)
        generator = build_generator(config)
        initialize(generator, 0, lane=0)
        with torch.no_grad():
            generator(torch.rand(64, config.latent_dim) * 2 - 1)  # BatchNorm statistics
        (folder / "model.safetensors").write_bytes(serialize(generator.eval(), config, "ema", 0))
        options = ["--count", 12, "--shard-images", 6, "--format", encoding, "--out", folder / "set"]
        run(BIN / "dcgan-generate", "--model", folder / "model.safetensors", *options)
    return open_dataset(folder / "set")


def tars(dataset: Dataset) -> list[str]:
    return expand(f"{dataset.location}/*.tar")


def check(dataset: Dataset, samples: Iterable[dict[str, Any]]) -> None:
    """Fail unless the samples, suffix → bytes or what a library made of them, are the images and labels of the set."""
    expected = {
        key: (image, tuple(columns[label][row] for label in dataset.labels))
        for images, columns in iterate(dataset, labels=True)
        for row, (image, key) in enumerate(zip(images, columns["key"], strict=True))
    }
    assert len(expected) == 12
    seen: dict[str, tuple[Pixels, tuple[Any, ...]]] = {}
    for sample in samples:
        content = sample["json"]
        if isinstance(content, bytes):
            content = json.loads(content)
        labels = [content["labels"][label] for label in dataset.labels]
        if dataset.encoding == "packed":
            block = sample["npy"]
            images = np.load(io.BytesIO(block)) if isinstance(block, bytes) else np.asarray(block, np.uint8)
            rows = list(zip(*labels, strict=True)) if labels else [()] * len(images)
            seen.update(zip(content["key"], zip(images, rows, strict=True), strict=True))
        else:
            picture = sample[dataset.encoding]
            image = np.asarray(Image.open(io.BytesIO(picture)) if isinstance(picture, bytes) else picture)
            seen[content["key"]] = (image, tuple(labels))
    assert seen.keys() == expected.keys()
    for key, (image, labels_of_image) in seen.items():
        assert labels_of_image == expected[key][1]
        assert np.abs(image.astype(int) - expected[key][0]).max() <= (2 if dataset.encoding == "jpg" else 0)


def test_hugging_face_datasets(dataset: Dataset, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="make test-interop installs it")
    for streaming in (False, True):
        found = datasets.load_dataset(
            "webdataset", data_files=tars(dataset), split="train", cache_dir=str(tmp_path), streaming=streaming
        )
        check(dataset, found)


def test_torchdata(dataset: Dataset) -> None:
    """Today's torchdata reads tars through webdataset; its loader keeps the position."""
    stateful = pytest.importorskip("torchdata.stateful_dataloader", reason="make test-interop installs it")
    import webdataset

    stock = webdataset.WebDataset(tars(dataset), shardshuffle=False)
    check(dataset, stateful.StatefulDataLoader(stock, batch_size=None))


def test_torchdata_datapipes(dataset: Dataset) -> None:
    check(dataset, run_older(READ_DATAPIPES, *tars(dataset)))


def test_wids(dataset: Dataset, tmp_path: Path) -> None:
    """An index by `widsindex` opens our shards at random, and names them to us."""
    create = "import sys, wids.wids_index; sys.argv[0] = 'widsindex'; wids.wids_index.main(); found = []"
    index = tmp_path / "index.json"
    run_older(create, "create", *tars(dataset), "--output", index)
    check(dataset, run_older(READ_WIDS, index, tmp_path / "cache"))
    assert expand(str(index)) == tars(dataset)
