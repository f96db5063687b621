"""What a checkpoint brings back: the same state, whatever of the runtime has changed since."""

from accelerate import Accelerator
from test_step import TINY, batch_of

from pipeline.checkpoints.store import Checkpoint
from pipeline.config import load_config
from pipeline.training.manager import checkpoint_files, restore
from pipeline.training.step import AdversarialStep


def test_moments_stay_with_their_weights_when_the_memory_order_changes() -> None:
    """The fused optimizer reads memory flat: moments in another order would belong to other weights."""
    config = load_config(overrides=TINY)
    accelerator = Accelerator(cpu=True)
    before = AdversarialStep(config, accelerator)
    before(*batch_of(config), 16)
    files = checkpoint_files(before, 16, b"")
    after = AdversarialStep(load_config(overrides=[*TINY, "channels_last=false"]), accelerator)
    restore(after, Checkpoint("here", {}, files))
    for old, new in ((before.optimizer_g, after.optimizer_g), (before.optimizer_d, after.optimizer_d)):
        for group_old, group_new in zip(old.param_groups, new.param_groups, strict=True):
            for weight_old, weight_new in zip(group_old["params"], group_new["params"], strict=True):
                for name in ("exp_avg", "exp_avg_sq"):
                    moment = new.state[weight_new][name]
                    assert moment.stride() == weight_new.stride()
                    assert moment.equal(old.state[weight_old][name])
