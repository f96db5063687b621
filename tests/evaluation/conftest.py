"""Small sets of pictures with a known relation to each other."""

import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from evaluation_cases import Outcome
from numpy.typing import NDArray
from planted import conditional, write_legible_conditional, write_legible_run, write_planted, write_run

from pipeline.data.dataset import open_dataset
from pipeline.evaluation.classifier import FILE_NAME, Classifier, load_classifier
from pipeline.evaluation.classifier_training import make_classifier
from pipeline.evaluation.cli import main


def scenes(count: int, seed: int, size: int = 64) -> NDArray[np.uint8]:
    """Smooth color gradients with a random disc: enough structure for every level of a pyramid."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    images = np.empty((count, size, size, 3))
    for image in images:
        a, b, c = draw.uniform(-100, 100, (3, 3))
        center_y, center_x, radius = draw.uniform(0.2, 0.8, 3)
        disc = (y - center_y) ** 2 + (x - center_x) ** 2 < (radius / 3) ** 2
        image[:] = 128 + a * (x[..., None] - 0.5) + b * (y[..., None] - 0.5) + c * disc[..., None]
    return np.clip(images + draw.normal(0, 4, images.shape), 0, 255).astype(np.uint8)


@pytest.fixture
def evaluate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run dcgan-eval from its entry point; an exception that a user would see as a traceback fails the test."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["dcgan-eval", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        assert isinstance(end.value.code, int)
        return Outcome(end.value.code, *capsys.readouterr())

    return run


@pytest.fixture
def peak_bytes() -> Callable[[Callable[[], object]], int]:
    """Measure how much numpy and Python hold at most while a function runs."""

    def measure(work: Callable[[], object]) -> int:
        tracemalloc.start()
        try:
            work()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    return measure


@pytest.fixture(scope="session")
def gappy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Such pictures, an eighth of which lack the labels."""
    return write_planted(tmp_path_factory.mktemp("gappy") / "shards", gaps=8)


@pytest.fixture(scope="session")
def pictures() -> NDArray[np.uint8]:
    return scenes(512, seed=1)


@pytest.fixture(scope="session")
def make_scenes() -> Callable[..., NDArray[np.uint8]]:
    return scenes


@pytest.fixture(scope="session")
def labeled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """480 labeled 32x32 pictures in two packed shards."""
    return write_planted(tmp_path_factory.mktemp("planted") / "shards")


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with untrained networks for such pictures. Do not write into it."""
    return write_run(tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="session")
def conditional_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Such runs of conditional networks, by their conditioning, and the legible generator. Do not write into them."""
    folder = tmp_path_factory.mktemp("conditional")
    runs = {name: write_run(folder / name, network=conditional(name)) for name in ("projection", "concat")}
    return {**runs, "of_class": write_legible_conditional(folder / "g.safetensors")}


@pytest.fixture(scope="session")
def classifier_file(labeled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier that is trained on those pictures."""
    folder: Path = tmp_path_factory.mktemp("classifier")
    make_classifier(open_dataset(labeled), folder, seed=0, epochs=20)
    return folder / FILE_NAME


@pytest.fixture(scope="session")
def classifier(classifier_file: Path) -> Classifier:
    return load_classifier(str(classifier_file))


@pytest.fixture(scope="session")
def legible_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose generator paints what its z says. Do not write into it."""
    return write_legible_run(tmp_path_factory.mktemp("legible") / "run")
