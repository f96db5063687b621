"""A run that begins from the weights of another: what it records, and that it never needs them again."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import TINY
from training_cases import SCHEDULE, hashes

from pipeline.checkpoints.reference import load_generator
from pipeline.common.errors import ConfigConflict
from pipeline.common.storage import sha256_file
from pipeline.config import load_config
from pipeline.training.loop import train

LENGTH = (
    "schedule.total_images=64",
    "schedule.checkpoint_every_images=32",
    "schedule.keep_checkpoints=9",
    "recipe.freeze_d=2",
)


def state(run: Path, images: int) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "checkpoints" / f"{images:012d}" / "state.json").read_text())
    return content


@pytest.mark.usefixtures("one_thread")
def test_a_run_begins_from_another_and_resumes_without_it(whole_run: Path, faces32: Path, tmp_path: Path) -> None:
    source, out, again = tmp_path / "source", tmp_path / "run", tmp_path / "again"
    shutil.copytree(whole_run, source)
    config = load_config(overrides=[*TINY, *SCHEDULE, *LENGTH])
    train(config, data=str(faces32), out=out, init_from=[f"{source}@last"])
    last = source / "checkpoints" / f"{256:012d}"
    began = out / "checkpoints" / f"{0:012d}"
    shutil.copytree(out, again)

    record = {one["network"]: one for one in state(out, 64)["init_from"]}
    assert record.keys() == {"generator", "average", "discriminator"}
    assert record["average"]["sha256"] == sha256_file(last / "generator_ema.safetensors")
    assert record["generator"]["reference"] == f"source/checkpoints/{256:012d}/generator.safetensors"
    assert json.loads((out / "config.json").read_text())["init_from"] == state(out, 64)["init_from"]
    loaded = load_generator(f"{out}@last")
    assert loaded.init_from == [one["sha256"] for one in record.values()]

    first = load_file(began / "discriminator.safetensors")
    theirs, ended = (load_file(folder / "discriminator.safetensors") for folder in (last, began.parent / f"{64:012d}"))
    for name, tensor in theirs.items():
        assert torch.equal(first[name], tensor), "as it was there"
        frozen = name.startswith(("layers.0.", "layers.2.", "layers.3.")) and "running" not in name
        assert torch.equal(ended[name], tensor) == (frozen or "num_batches" in name), name

    shutil.rmtree(source)
    for images in (32, 64):
        shutil.rmtree(again / "checkpoints" / f"{images:012d}")  # as if it had been killed right after its start
    train(config, data=str(faces32), out=again, init_from=[f"{source}@last"])
    assert hashes(again, 64) == hashes(out, 64)
    assert state(again, 64)["init_from"] == state(out, 64)["init_from"]

    shutil.rmtree(again / "checkpoints")
    with pytest.raises(ConfigConflict, match="name --init-from again"):
        train(config, data=str(faces32), out=again)


@pytest.mark.usefixtures("one_thread")
def test_a_run_from_noise_does_not_take_weights_later(whole_run: Path, faces32: Path) -> None:
    config = load_config(overrides=[*TINY, *SCHEDULE])
    with pytest.raises(ConfigConflict, match="began from noise"):
        train(config, data=str(faces32), out=whole_run, init_from=[str(whole_run)])


def test_too_many_stages_to_freeze_are_refused(faces32: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigConflict, match=r"recipe\.freeze_d=4: the discriminator has 3 stages"):
        train(load_config(overrides=[*TINY, "freeze_d=4"]), data=str(faces32), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
