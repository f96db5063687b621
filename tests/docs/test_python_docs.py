"""Every example of docs/python.md runs, against a small run, its model and the bundled faces."""

import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import warm_start
from support import ROOT, train_command

from export.builders.onnx_model import export_onnx
from pipeline.common.randomness import Purpose
from pipeline.model.sampling import sample

SMALL = ("network.image_size=64", "schedule.total_images=64", "schedule.evaluate_samples=64")
LINES = 14
"""Lines of code that an example may have."""

pytestmark = pytest.mark.timeout(300)


def examples() -> dict[str, str]:
    """Return the code of each section of the page, by its heading."""
    page = (ROOT / "docs" / "python.md").read_text()
    return dict(re.findall(r"^## ([^\n]*)\n```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with demo/data, demo/run and demo/model, as `make demo` leaves them."""
    folder = tmp_path_factory.mktemp("notebook")
    demo = folder / "demo"
    demo.mkdir()
    (demo / "data").symlink_to(ROOT / "data" / "faces")
    command = train_command(demo / "data", demo / "run", *SMALL)
    alone = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = warm_start.run(command, env=alone)
    assert done.returncode == 0, done.stderr
    export_onnx(str(demo / "run"), demo / "model", max_batch=64, parity_images=64)
    return folder


def samples_1000_to_1003(found: dict[str, Any]) -> bool:
    """Whether an example's images are those of the checkpoint, up to one gray level."""
    from pipeline.checkpoints.reference import load_generator

    expected = sample(load_generator("demo/run").generator, 0, Purpose.SAMPLE, 1000, 4)
    return bool(np.abs(expected.astype(int) - found["images"][:4].astype(int)).max() <= 1)


CHECKS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "Read a data set": lambda found: found["dataset"].images == 5000 and found["images"].shape == (64, 64, 64, 3),
    "Read what a training reads": lambda found: (
        found["images"].shape == (128, 3, 64, 64) and len(found["positions"]) == 128
    ),
    "Load a generator": lambda found: found["images"].shape == (8, 64, 64, 3),
    "Sample from any model": lambda found: found["first"] + len(found["images"]) == 1100,
    "The z of an image": samples_1000_to_1003,
    "Measure: sliced Wasserstein distance": lambda found: len(found["sides"]) == 2,
    "Measure: Fréchet distance": lambda found: found["frechet_distance"](found["a"], found["b"]) > 0,
    "Walk through latent space": lambda found: Path("walk.png").stat().st_size > 0,
    "Train": lambda found: Path("run/checkpoints/000000000064/state.json").is_file(),
}
"""What holds after each example, of its names."""


def test_every_example_has_a_check() -> None:
    assert list(examples()) == list(CHECKS)


@pytest.fixture
def own_signals() -> Iterator[None]:
    """Put back the handlers that a training in this process sets."""
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    yield
    for number, handler in before.items():
        if handler is not signal.getsignal(number):
            signal.signal(number, handler)


@pytest.mark.usefixtures("own_signals")
@pytest.mark.parametrize("heading", examples())
def test_example(heading: str, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    code = examples()[heading]
    assert len([line for line in code.splitlines() if line]) <= LINES
    found: dict[str, Any] = {"__name__": "notebook"}
    exec(compile(code, f"docs/python.md: {heading}", "exec"), found)
    assert CHECKS[heading](found)
