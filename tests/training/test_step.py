"""One update: every lever that claims equal semantics gives the plain update's numbers, on any number of processes."""

import json
import os
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import warm_start
from torch import nn

from pipeline.common.randomness import Purpose
from pipeline.config import RunConfig, load_config
from pipeline.model.latents import latents
from pipeline.model.networks import build_discriminator, build_generator, initialize
from pipeline.training.step import deviation

TINY = ["image_size=32", "width=4", "latent_dim=8", "batch=16", "streams=8"]


def batch_of(config: RunConfig) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    network, count = config.network, config.recipe.batch
    size = network.image_size
    reals = np.random.Generator(np.random.Philox(1)).integers(0, 256, (count, size, size, network.channels), np.uint8)
    return reals, latents(0, Purpose.TRAIN, 0, count, network.latent_dim)


def plain_updates(config: RunConfig, count: int) -> dict[str, torch.Tensor]:
    """Do what every tutorial does, in float64: the reference that the fast step must equal."""
    generator, discriminator = build_generator(config.network).double(), build_discriminator(config.network).double()
    initialize(generator, config.recipe.seed, lane=0)
    initialize(discriminator, config.recipe.seed, lane=1)
    adam = partial(torch.optim.Adam, lr=2e-4, betas=(0.5, 0.999), foreach=False)
    optimizer_g, optimizer_d = adam(generator.parameters()), adam(discriminator.parameters())
    reals, z = batch_of(config)
    real = torch.from_numpy(reals).permute(0, 3, 1, 2).double() / 127.5 - 1
    bce = nn.BCEWithLogitsLoss()
    ones, zeros = torch.ones(len(z)).double(), torch.zeros(len(z)).double()
    for _ in range(count):
        discriminator.zero_grad()
        fake = generator(torch.from_numpy(z).double())
        bce(discriminator(real), ones).backward()
        bce(discriminator(fake.detach()), zeros).backward()
        optimizer_d.step()
        generator.zero_grad()
        bce(discriminator(fake), ones).backward()
        optimizer_g.step()
    return {**generator.state_dict(prefix="g."), **discriminator.state_dict(prefix="d.")}


WORKER = """
import os, sys, json, torch
torch.set_default_dtype(torch.float64)
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import nn
sys.path[:0] = {tests!r}
from pipeline.config import load_config
from pipeline.training.step import AdversarialStep
from test_step import batch_of
options = json.loads(sys.argv[1])
accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)])
assert accelerator.num_processes == options["processes"], accelerator.num_processes
config = load_config(overrides=options["overrides"])
step = AdversarialStep(config, accelerator)
if options["without_batchnorm"]:  # its statistics are per process by design; everything else must agree
    for module in [*step.generator.modules(), *step.discriminator.modules()]:
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
reals, z = batch_of(config)
rank, world = accelerator.process_index, accelerator.num_processes
for position in range(options["updates"]):
    statistics = step(reals[rank::world], z[rank::world], 16 * (position + 1))
if accelerator.is_main_process:
    torch.save({{**step.generator.state_dict(prefix="g."), **step.discriminator.state_dict(prefix="d."),
                **step.ema.generator.state_dict(prefix="e."), "statistics": statistics}}, options["out"])
accelerator.end_training()
sys.stdout.flush()
os._exit(0)  # gloo's threads may abort Python's teardown
"""


def updates(
    tmp_path: Path, overrides: list[str], *, processes: int = 1, without_batchnorm: bool = False
) -> dict[str, Any]:
    """Run three updates of AdversarialStep in float64 in real processes, and return the weights."""
    worker, out = tmp_path / "worker.py", tmp_path / f"{len(list(tmp_path.iterdir()))}.pt"
    worker.write_text(WORKER.format(tests=[str(folder) for folder in list(Path(__file__).parents)[:2]]))
    options = {
        "overrides": TINY + overrides,
        "processes": processes,
        "without_batchnorm": without_batchnorm,
        "updates": 3,
        "out": str(out),
    }
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    warm_start.run_ranks([sys.executable, worker, json.dumps(options)], processes, env=environment)
    loaded: dict[str, Any] = torch.load(out, weights_only=True)
    return loaded


def assert_equal_weights(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    for name, weight in expected.items():
        if name.startswith(("g.", "d.")) and weight.is_floating_point():
            message = f"{name}: {{}}".format  # torch puts its own message there
            torch.testing.assert_close(found[name], weight, rtol=0, atol=tolerance, msg=message)


@pytest.mark.parametrize(
    "levers",
    [
        ["channels_last=false", "fused_optimizer=false"],
        ["channels_last=true", "fused_optimizer=true"],
        ["channels_last=true", "fused_optimizer=true", "compile=true"],
    ],
    ids=["plain", "fast", "compiled"],
)
def test_levers_equal_the_tutorial_in_float64(tmp_path: Path, levers: list[str]) -> None:
    found = updates(tmp_path, levers)
    expected = plain_updates(load_config(overrides=TINY), 3)
    # Adam divides by the root of tiny second moments, which magnifies rounding: 1e-10 of weights of 1e-2.
    assert_equal_weights(found, expected, 1e-9)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_equal_one(tmp_path: Path, accumulate: int) -> None:
    one = updates(tmp_path, [], without_batchnorm=True)
    two = updates(tmp_path, [f"accumulate={accumulate}"], processes=2, without_batchnorm=True)
    assert_equal_weights(two, one, 1e-9)
    torch.testing.assert_close(one["e.layers.0.weight"], two["e.layers.0.weight"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_generator_update_computes_no_gradients_of_discriminator_weights(compiled: bool) -> None:
    """Counted in what PyTorch really runs: a compiled backward computes all that its forward asked for."""
    from accelerate import Accelerator
    from torch.profiler import ProfilerActivity, profile

    from pipeline.training.step import AdversarialStep

    config = load_config(overrides=[*TINY, f"compile={compiled}"])
    step = AdversarialStep(config, Accelerator(cpu=True))
    reals, z = batch_of(config)
    step(reals, z, 16)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        step(reals, z, 32)
    # For each backward convolution: the gradients (of its input, its weights, its bias) that it computes.
    masks = Counter(e.concrete_inputs[-1][1] for e in profiled.events() if e.name == "aten::convolution_backward")
    layers_d, layers_g = (
        sum(isinstance(module, nn.Conv2d | nn.ConvTranspose2d) for module in network.modules())
        for network in (step.discriminator, step.generator)
    )
    assert masks == {True: 2 * layers_d + layers_g, False: layers_d}  # reals and fakes, then G through D


def test_nonfinite_gradients_change_nothing_and_are_counted() -> None:
    from accelerate import Accelerator

    from pipeline.training.step import STATISTICS, AdversarialStep

    config = load_config(overrides=TINY)
    step = AdversarialStep(config, Accelerator(cpu=True))
    reals, z = batch_of(config)
    step(reals, z, 16)
    before = {name: value.clone() for name, value in step.discriminator.named_parameters()}
    poisoned = z.copy()
    poisoned[0, 0] = np.nan
    statistics = step(reals, poisoned, 32)
    assert statistics[STATISTICS.index("nonfinite")] == 1
    assert all(torch.equal(before[name], value) for name, value in step.discriminator.named_parameters())
    assert all(torch.isfinite(weight).all() for weight in step.generator.parameters())
    assert step.weights_finite() == 1


def test_nonfinite_gradients_are_counted_whatever_the_optimizer() -> None:
    """A plain optimizer applies them; a finite loss must not let such weights pass for good until the next step."""
    from accelerate import Accelerator

    from pipeline.training.step import STATISTICS, AdversarialStep

    config = load_config(overrides=[*TINY, "fused_optimizer=false"])
    step = AdversarialStep(config, Accelerator(cpu=True))
    first = step.generator.get_parameter("layers.0.weight")
    first.register_hook(lambda gradient: gradient * np.nan)  # type: ignore[no-untyped-call]
    statistics = step(*batch_of(config), 16)
    assert torch.isfinite(statistics[STATISTICS.index("loss_g")])
    assert statistics[STATISTICS.index("nonfinite")] == 1
    assert step.weights_finite() == 0


def test_no_host_sync_inside_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a tensor's value is what makes a GPU wait: count every such read."""
    from accelerate import Accelerator

    from pipeline.training.step import AdversarialStep

    config = load_config(overrides=TINY)
    step = AdversarialStep(config, Accelerator(cpu=True))
    reals, z = batch_of(config)
    step(reals, z, 16)
    reads: list[str] = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)

        def counted(self: torch.Tensor, *args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
            reads.append(_name)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)
    step(reals, z, 32)
    assert reads == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deviation_is_that_of_the_images_and_leaves_them_alone(dtype: torch.dtype) -> None:
    images = torch.randn(16, 3, 8, 8).to(dtype).contiguous(memory_format=torch.channels_last)
    before = images.clone()
    torch.testing.assert_close(deviation(images), images.float().std(0, correction=0).mean())
    assert torch.equal(images, before)
    assert deviation(images[:1].expand(16, -1, -1, -1)) < 1e-6
