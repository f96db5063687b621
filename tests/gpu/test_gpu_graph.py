"""On an NVIDIA GPU: an update as one CUDA graph does what its kernels do one by one, on whatever feeds it."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from support import TINY

from pipeline.common.errors import ConfigConflict
from pipeline.config import load_config
from pipeline.model.latents import latent_batches
from pipeline.training.step import AdversarialStep
from pipeline.training.update.graph import WARM_UP

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

UPDATES = WARM_UP + 20


@pytest.fixture(autouse=True)
def _same_algorithms(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without cuDNN's timed choice, and without sums in any order, so that numbers can be compared."""
    monkeypatch.setattr("pipeline.training.step.set_kernels", lambda *_, **__: None)
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = False


def new_step(*overrides: str, precision: str = "no") -> AdversarialStep:
    AcceleratorState._reset_state(reset_partial_state=True)
    return AdversarialStep(load_config(overrides=[*TINY, *overrides]), Accelerator(mixed_precision=precision))


def train(
    step: AdversarialStep, updates: int = UPDATES, convert: Callable[[Any], Any] = np.asarray, start: int = 0
) -> dict[str, torch.Tensor]:
    """Do updates on batches that all differ, from batch `start` on; return all that they leave."""
    latents = latent_batches(load_config(overrides=list(TINY)), start=0)
    for index in range(start + updates):
        reals = np.random.Generator(np.random.Philox(index)).integers(0, 256, (16, 32, 32, 3), np.uint8)
        z = next(latents)
        if index >= start:
            step.update(convert(reals), z, index * len(z))
    step.examine(images=True)
    torch.cuda.synchronize()
    found = {**step.generator.state_dict(prefix="g."), **step.discriminator.state_dict(prefix="d.")}
    found |= {**step.ema.generator.state_dict(prefix="e."), "statistics": step.statistics}
    return {name: tensor.clone() for name, tensor in found.items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=tolerance, msg=f"{name}: {{}}".format)


@pytest.mark.parametrize("override", ["accumulate=1", "accumulate=2", "fused_optimizer=false", "compile=true"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_graph_equals_its_kernels(precision: str, override: str) -> None:
    eager, graphed = (new_step(f"graph={graph}", override, precision=precision) for graph in ("off", "on"))
    assert (eager.graphed, graphed.graphed) == (False, True)
    assert_same(train(graphed), train(eager), 1e-4 if precision == "no" else 2e-2)
    assert graphed._run._graph is not None, "it was replayed"


@pytest.mark.parametrize("norm", [[], ["discriminator_norm=spectral"]], ids=str)
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_options_beyond_the_paper_are_graphs_too(precision: str, norm: list[str]) -> None:
    """Updates with penalties are one, and those between them another."""
    penalties = ["r1=1", "r2=1", "penalty_interval=2"]
    options = ["loss=relativistic", *penalties, "flips=true", "augment=color,translation,cutout", *norm]
    eager, graphed = (new_step(f"graph={graph}", *options, precision=precision) for graph in ("off", "on"))
    assert_same(train(graphed), train(eager), 1e-4 if precision == "no" else 2e-2)
    assert graphed._run._graph is not None, "it was replayed"
    assert graphed._run_penalized._graph is not None, "it was replayed"


def test_updates_in_turn_are_a_graph_each() -> None:
    eager, graphed = (new_step(f"graph={graph}", "alternate=true") for graph in ("off", "on"))
    assert_same(train(graphed), train(eager), 1e-4)
    assert graphed._run._graph is not None, "D's was replayed"
    assert graphed._run_generator._graph is not None, "G's was replayed"


def test_auto_is_a_graph_except_in_fp16() -> None:
    assert new_step().graphed
    assert new_step(precision="bf16").graphed
    assert not new_step(precision="fp16").graphed
    with pytest.raises(ConfigConflict, match=r"runtime\.graph=on: .*loss scaler"):
        new_step("graph=on", precision="fp16")


def test_whatever_feeds_it() -> None:
    """Ordinary memory, pinned memory, and images that are on the GPU already, each overwritten at once."""

    def pinned(reals: Any) -> Any:
        return torch.from_numpy(reals).pin_memory().numpy()

    def on_the_gpu(reals: Any) -> Any:
        return torch.from_numpy(reals).cuda()

    expected = train(new_step())
    for convert in (pinned, on_the_gpu):
        assert_same(train(new_step(), convert=convert), expected, 1e-6)


def test_inputs_are_not_mixed_when_the_host_runs_far_ahead() -> None:
    step = new_step()
    train(step)  # captured
    torch.cuda._sleep(1_000_000_000)  # type: ignore[no-untyped-call] # half a second
    ahead = train(step, 20, start=UPDATES)
    other = new_step()
    train(other)
    torch.cuda.synchronize()
    assert_same(train(other, 20, start=UPDATES), ahead, 1e-6)


def test_nonfinite_gradients_change_nothing_in_a_graph() -> None:
    step = new_step()
    before = train(step)
    poisoned = np.full((16, 8), np.nan, np.float32)
    step.update(np.zeros((16, 32, 32, 3), np.uint8), poisoned, 0)
    torch.cuda.synchronize()
    for name, weight in step.discriminator.named_parameters():
        assert torch.equal(before[f"d.{name}"], weight)
    assert step.statistics[6] == 1


def test_other_learning_rates_are_captured_anew() -> None:
    """A run that goes back halves them: a graph that had been kept would step as far as before."""
    expected, graphed = (new_step(f"runtime.graph={choice}") for choice in ("off", "on"))
    for step in (expected, graphed):
        train(step)
        step.scale_learning_rates(0.5)
        assert step._run._graph is None
    assert_same(train(graphed, start=UPDATES), train(expected, start=UPDATES), 1e-5)
    assert graphed._run._graph is not None
