"""Runs that fall apart: what each choice of `schedule.on_collapse` does, and that a resume repeats it exactly.

The networks are so small, and the updates that may be bad so few, that all samples are alike when the guard begins to
look: a real collapse within seconds.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from support import ROOT, TINY
from training_cases import ENVIRONMENT, hashes

from pipeline.checkpoints.store import CheckpointStore
from pipeline.common.errors import Collapsed, DataError, Stopped
from pipeline.common.storage import Store
from pipeline.config import RunConfig, load_config
from pipeline.evaluation.metrics import collapse
from pipeline.training.loop import train
from pipeline.training.step import AdversarialStep

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEDULE = (
    "schedule.total_images=1280",
    "schedule.log_every_images=64",
    "schedule.grid_every_images=1280",
    "schedule.checkpoint_every_images=128",
    "schedule.evaluate_every_images=128",
    "schedule.evaluate_samples=64",
    "schedule.keep_checkpoints=2",
)
PATCHED = 8
"""Updates that a run may begin badly for: 128 images, the first evaluation."""


@pytest.fixture(autouse=True)
def early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collapse, "AFTER_UPDATES", PATCHED)


def settings(choice: str, *more: str) -> RunConfig:
    return load_config(overrides=[*TINY, *SCHEDULE, f"schedule.on_collapse={choice}", *more])


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def state(run: Path, images: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "checkpoints" / f"{images:012d}" / "state.json").read_text())
    return found


@pytest.fixture(scope="module")
def reverted(faces32: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that goes back three times, and then gives up."""
    out = tmp_path_factory.mktemp("reverted") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collapse, "AFTER_UPDATES", PATCHED)
        with pytest.raises(Collapsed, match="it has gone back 3 times"):
            train(settings("revert"), data=str(faces32), out=out)
    return out


def test_warn_says_so_once_and_changes_nothing(
    faces32: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = "schedule.total_images=640"
    train(settings("warn", short), data=str(faces32), out=tmp_path / "run")
    said = [record.getMessage() for record in caplog.records if "fallen apart" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("the run has fallen apart at image 384: samples vary ")
    assert "try a smaller recipe.learning_rate_g, or schedule.on_collapse=revert" in said[0]
    monkeypatch.setattr(collapse, "AFTER_UPDATES", 500)  # that of a run that nobody looks at
    train(settings("warn", short), data=str(faces32), out=tmp_path / "unseen")
    for run in ("run", "unseen"):
        assert "on_collapse" not in state(tmp_path / run, 640)["config"]["schedule"]
    assert state(tmp_path / "run", 640) == state(tmp_path / "unseen", 640), "all hashes, and all that is said"


def test_stop_saves_keeps_the_best_and_says_how_to_go_on(faces32: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(
        Collapsed, match=r"at image 384: samples vary .* try a smaller recipe\.learning_rate_g; "
    ) as end:
        train(settings("stop"), data=str(faces32), out=out)
    assert end.value.exit_code == 79
    store = CheckpointStore(Store(out))
    assert store.names() == ["000000000128", "000000000256", "000000000384"]
    best, last = store.path("000000000128"), store.path("000000000384")
    assert f"the best checkpoint is {best}, the last {last}: schedule.on_collapse=warn" in str(end.value)
    # The same command goes on to the next evaluation, which says the same; and where one lets it, to its end.
    with pytest.raises(Collapsed, match="at image 512"):
        train(settings("stop"), data=str(faces32), out=out)
    train(settings("stop", "schedule.total_images=640"), data=str(faces32), out=out)


def test_revert_takes_the_best_weights_goes_on_at_half_the_rates_and_gives_up_after_three(reverted: Path) -> None:
    store = CheckpointStore(Store(reverted))
    assert store.names()[-1] == "000000001152"
    records = state(reverted, 1152)["reverts"]
    assert [(record["images"], record["to"]) for record in records] == [(384, 128), (640, 128), (896, 128)]
    assert all(re.match(r"samples vary \d+% as much as real images", record["reasons"][0]) for record in records)
    returns = [(line["images"], line["reverted_to"]) for line in lines(reverted) if "reverted_to" in line]
    assert returns == [(384, 128), (640, 128), (896, 128)]
    seen = [line["images"] for line in lines(reverted) if "loss_d" in line]
    assert seen == list(range(64, 1153, 64)), "its position went on"
    assert store.best() == "000000000128", "no bad evaluation counts, though their SWD is as small"


def test_what_it_goes_on_with_is_the_best_checkpoint(reverted: Path, faces32: Path, tmp_path: Path) -> None:
    """Weights, average and moments of both networks, byte for byte, and learning rates of half the recipe's."""
    rates: list[float] = []

    def note(position: int, *_: object) -> None:
        if position == 384:
            rates.extend(group["lr"] for step in steps for group in step.optimizer_g.param_groups)
            os.kill(os.getpid(), signal.SIGTERM)

    steps: list[AdversarialStep] = []

    class Kept(AdversarialStep):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            steps.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.training.loop.AdversarialStep", Kept)
        with pytest.raises(Stopped):
            train(
                settings("revert", "schedule.keep_checkpoints=9"),
                data=str(faces32),
                out=tmp_path / "run",
                on_batch=note,
            )
    assert rates == [1e-4]
    for name in ("generator", "generator_ema", "discriminator"):
        tensors = []
        for images in (128, 384):
            with safe_open(tmp_path / "run/checkpoints" / f"{images:012d}" / f"{name}.safetensors", "np") as file:
                tensors.append({key: file.get_tensor(key).tobytes() for key in file.keys()})  # noqa: SIM118
        assert tensors[0] == tensors[1], name
    assert state(tmp_path / "run", 384)["metrics"] == {}


@pytest.mark.parametrize("position", [256, 704])
def test_a_run_that_is_stopped_before_or_after_a_return_ends_with_the_same_bits(
    reverted: Path, faces32: Path, tmp_path: Path, position: int
) -> None:
    out = tmp_path / "run"

    def stop(at: int, *_: object) -> None:
        if at == position:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        train(settings("revert"), data=str(faces32), out=out, on_batch=stop)
    with pytest.raises(Collapsed):
        train(settings("revert"), data=str(faces32), out=out)
    assert hashes(out, 1152) == hashes(reverted, 1152)
    assert state(out, 1152)["reverts"] == state(reverted, 1152)["reverts"]
    assert (out / "metrics.jsonl").read_bytes() == (reverted / "metrics.jsonl").read_bytes()


def test_a_record_that_was_tampered_with_is_refused(reverted: Path, faces32: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(reverted, out)
    path = out / "checkpoints/000000001152/state.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "reverts": [{"images": -1}]}))
    with pytest.raises(DataError, match=r"its entry `reverts` is damaged .*restore it, or resume from an earlier"):
        train(settings("revert"), data=str(faces32), out=out)


WORKER = """
import sys
from pipeline import train
from pipeline.evaluation.metrics import collapse
collapse.AFTER_UPDATES = int(sys.argv.pop(1))
train.run()
"""


def test_two_processes_go_back_together_and_end_with_79(faces32: Path, tmp_path: Path) -> None:
    out, worker = tmp_path / "run", tmp_path / "worker.py"
    worker.write_text(WORKER)
    launch = str(Path(sys.executable).parent / "dcgan-launch")
    arguments = ["--data", str(faces32), "--out", str(out), *TINY, *SCHEDULE, "schedule.on_collapse=revert"]
    done = subprocess.run(
        [launch, "--processes", "2", str(worker), str(PATCHED), *arguments],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 79, done.stderr
    assert done.stderr.count("it has gone back 3 times") == 1, "one rank says it for all"
    records = state(out, 1152)["reverts"]
    assert [(record["images"], record["to"]) for record in records] == [(384, 128), (640, 128), (896, 128)]
