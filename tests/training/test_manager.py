"""What a checkpoint brings back: the same state, whatever of the runtime has changed since."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from test_step import TINY, batch_of

from pipeline.checkpoints.store import Checkpoint, CheckpointStore
from pipeline.checkpoints.weights import FILE_OF_KIND, Kind
from pipeline.common.errors import ConfigConflict, DataError
from pipeline.common.storage import Store
from pipeline.config import load_config
from pipeline.training.collapse.reverts import Revert
from pipeline.training.identity import check_identity
from pipeline.training.manager import OPTIMIZERS, CheckpointManager, checkpoint_files, restore, state_of
from pipeline.training.step import AdversarialStep


def test_moments_stay_with_their_weights_when_the_memory_order_changes() -> None:
    """The fused optimizer reads memory flat: moments in another order would belong to other weights."""
    config = load_config(overrides=TINY)
    accelerator = Accelerator(cpu=True)
    before = AdversarialStep(config, accelerator)
    before.update(*batch_of(config), 0)
    files = checkpoint_files(state_of(before), config.network, 16, b"")
    after = AdversarialStep(load_config(overrides=[*TINY, "channels_last=false", "learning_rate_g=1e-3"]), accelerator)
    restore(after, Checkpoint("here", {"images_seen": 16}, files))
    for here, there in (
        (before.generator, after.generator),
        (before.discriminator, after.discriminator),
        (before.ema.generator, after.ema.generator),
    ):
        assert all(map(torch.equal, here.state_dict().values(), there.state_dict().values()))
    assert after.ema.images_seen == 16, "the next weight of the average follows from it"
    rates = [optimizer.param_groups[0]["lr"] for optimizer in (after.optimizer_g, after.optimizer_d)]
    assert rates == [1e-3, 2e-4], "learning rates follow the configuration"
    for old, new in ((before.optimizer_g, after.optimizer_g), (before.optimizer_d, after.optimizer_d)):
        for group_old, group_new in zip(old.param_groups, new.param_groups, strict=True):
            for weight_old, weight_new in zip(group_old["params"], group_new["params"], strict=True):
                for name in ("exp_avg", "exp_avg_sq"):
                    moment = new.state[weight_new][name]
                    assert moment.stride() == weight_new.stride()
                    assert moment.equal(old.state[weight_old][name])

    # The same weights fit no other network, and are not half restored in silence.
    for file in (FILE_OF_KIND["raw"], FILE_OF_KIND["discriminator"]):
        other: Kind = "discriminator" if file == FILE_OF_KIND["raw"] else "raw"
        with pytest.raises(DataError, match=f"here/{file}: does not fit the network"):
            restore(after, Checkpoint("here", {}, {**files, file: files[FILE_OF_KIND[other]]}))
    with pytest.raises(DataError, match=f"here/{OPTIMIZERS}: cannot be restored"):
        restore(after, Checkpoint("here", {}, {**files, OPTIMIZERS: b"moments"}))


def description(*overrides: str) -> dict[str, Any]:
    """Return what a checkpoint says of its run."""
    return {"config": load_config(overrides=list(overrides)).model_dump(), "dataset": {"fingerprint": "0" * 64}}


@pytest.mark.parametrize(("threads", "lines"), [(torch.get_num_threads(), 0), (99, 1), (None, 0)])
def test_other_threads_are_said_when_a_checkpoint_is_found(
    tmp_path: Path, threads: int | None, lines: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    manager = CheckpointManager(load_config(), description(), Accelerator(cpu=True), tmp_path, None)
    manager.process["threads"] = torch.get_num_threads()
    state = description() | ({} if threads is None else {"threads": threads})
    CheckpointStore(Store(tmp_path)).save(16, {"weights": b"some"}, state)
    found = manager.find("auto", [])
    assert found is not None
    assert found.images_seen == 16
    assert sum("99 before: results may differ in the last bits" in line for line in caplog.messages) == lines
    assert sum("before: results" in line for line in caplog.messages) == lines
    assert manager.mirror_state == (0, 0.0), "there is none"


def test_a_change_may_be_allowed_that_was_not_made() -> None:
    """A command that a scheduler repeats makes it once."""
    both = ["recipe.r1", "recipe.batch"]
    assert check_identity(description(), description("r1=1"), both, "run") == ["recipe.r1 0.0 -> 1.0"]
    assert check_identity(description(), description(), both, "run") == []
    with pytest.raises(ConfigConflict, match=r"recipe\.r1 0\.0 -> 1\.0\. Restore"):
        check_identity(description(), description("r1=1", "recipe.batch=64"), both[1:], "run")


def test_each_return_halves_the_learning_rates_of_the_recipe(tmp_path: Path) -> None:
    config, accelerator = load_config(overrides=[*TINY, "learning_rate_d=4e-4"]), Accelerator(cpu=True)
    step = AdversarialStep(config, accelerator)
    checkpoint = Checkpoint("here", {"images_seen": 16}, checkpoint_files(state_of(step), config.network, 16, b""))
    manager = CheckpointManager(config, description(), accelerator, tmp_path, None)
    for images, share in ((64, 0.5), (96, 0.25), (128, 0.125)):
        manager.go_back(step, checkpoint, Revert(images=images, to=16, reasons=["samples vary little"]))
        rates = [optimizer.param_groups[0]["lr"] for optimizer in (step.optimizer_g, step.optimizer_d)]
        assert rates == [share * 2e-4, share * 4e-4]
    assert [record["images"] for record in manager.reverts] == [64, 96, 128]
