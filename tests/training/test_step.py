"""One update: every lever that claims equal semantics gives the plain update's numbers, on any number of processes."""

import copy
import json
import os
import sys
from collections import Counter, defaultdict
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
from pipeline.model.ema import EMA
from pipeline.model.labels import draw_labels
from pipeline.model.latents import latents
from pipeline.model.networks import build_discriminator, build_generator, initialize
from pipeline.training.step import deviation

PENALIZED = ["loss=relativistic", "r1=2", "r2=3", "penalty_interval=2", "weight_decay=0.01"]
BEYOND = [*PENALIZED, "flips=true", "augment=color,translation,cutout"]
"""Options beyond the paper, together."""
SPECTRAL = "discriminator_norm=spectral"
LABELED = ["label=digit", "classes=['0','1','2']", "class_images=[5,1,4]"]
"""A network that reads a label, by projection."""
TINY = ["image_size=32", "width=4", "latent_dim=8", "batch=16", "streams=8"]


def batch_of(config: RunConfig) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    network, count = config.network, config.recipe.batch
    reals = np.random.Generator(np.random.Philox(1)).integers(0, 256, (count, *network.image_shape), np.uint8)
    return reals, latents(0, Purpose.TRAIN, 0, count, network.latent_dim)


def labels_of(config: RunConfig) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]] | None:
    """Return labels of reals and of fakes for `batch_of`; None for a network without a label."""
    network, count = config.network, config.recipe.batch
    if not network.label:
        return None
    return draw_labels(network, 1, Purpose.TRAIN, 0, count), draw_labels(network, 0, Purpose.TRAIN, 0, count)


def plain_updates(config: RunConfig, count: int) -> dict[str, torch.Tensor]:
    """Do what every tutorial does, in float64: the reference that the fast step must equal."""
    generator, discriminator = build_generator(config.network).double(), build_discriminator(config.network).double()
    initialize(generator, config.recipe.seed, lane=0)
    initialize(discriminator, config.recipe.seed, lane=1)
    adam = partial(torch.optim.Adam, lr=2e-4, betas=(0.5, 0.999), foreach=False)
    optimizer_g, optimizer_d = adam(generator.parameters()), adam(discriminator.parameters())
    reals, z = batch_of(config)
    real = torch.from_numpy(reals).permute(0, 3, 1, 2).double() / 127.5 - 1
    labels = [[torch.from_numpy(half).double()] for half in labels_of(config) or ()]
    of_reals, of_fakes = labels or ([], [])
    bce = nn.BCEWithLogitsLoss()
    ones, zeros = torch.ones(len(z)).double(), torch.zeros(len(z)).double()
    for _ in range(count):
        discriminator.zero_grad()
        fake = generator(torch.from_numpy(z).double(), *of_fakes)
        bce(discriminator(real, *of_reals), ones).backward()
        bce(discriminator(fake.detach(), *of_fakes), zeros).backward()
        optimizer_d.step()
        generator.zero_grad()
        bce(discriminator(fake, *of_fakes), ones).backward()
        optimizer_g.step()
    return {**generator.state_dict(prefix="g."), **discriminator.state_dict(prefix="d.")}


WORKER = """
import os, sys, json, torch
torch.set_default_dtype(torch.float64)
from torch import nn
sys.path[:0] = {tests!r}
from pipeline.config import load_config
from pipeline.training.accelerator import make_accelerator
from pipeline.training.step import AdversarialStep
from test_step import batch_of, labels_of
options = json.loads(sys.argv[1])
accelerator = make_accelerator()
rank, world = accelerator.process_index, accelerator.num_processes
assert world == options["processes"], world
found = []
for case in options["cases"]:
    config = load_config(overrides=case["overrides"])
    step = AdversarialStep(config, accelerator)
    if not case["batchnorm"]:
        for module in [*step.generator.modules(), *step.discriminator.modules()]:
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    reals, z = batch_of(config)
    labels = labels_of(config)
    rows = [*range(0, len(z), 2), *range(1, len(z), 2)] if case["in_ranks"] else [*range(rank, len(z), world)]
    for index in range(3):
        step.statistics.zero_()
        step.update(reals[rows], z[rows], index * len(z), labels and tuple(half[rows] for half in labels))
    step.examine(images=True)
    found.append({{**step.generator.state_dict(prefix="g."), **step.discriminator.state_dict(prefix="d."),
                  **step.ema.generator.state_dict(prefix="e."), "statistics": step.statistics, "flags": [
                      [network.broadcast_buffers, network.gradient_as_bucket_view]
                      for network in (step._ddp_g, step._ddp_d) if world > 1]}})
torch.save(found, options["out"] + str(rank))
accelerator.end_training()
sys.stdout.flush()
os._exit(0)  # gloo's threads may abort Python's teardown
"""


def case(*overrides: str, batchnorm: bool = True, in_ranks: bool = False) -> dict[str, Any]:
    """Return what `updates` does: with BatchNorm's statistics of each batch, or with fixed ones.

    `in_ranks` orders the images as two ranks share them: with accumulate=2 a micro-batch is what a rank would have.
    """
    return {"overrides": [*TINY, *overrides], "batchnorm": batchnorm, "in_ranks": in_ranks}


def updates(tmp_path: Path, *cases: dict[str, Any], processes: int = 1) -> list[list[dict[str, Any]]]:
    """Run three updates of AdversarialStep in float64 for each case, in real processes that are set up as the
    trainer's; return each rank's weights and statistics of each case.
    """
    worker, out = tmp_path / "worker.py", tmp_path / f"{processes}."
    worker.write_text(WORKER.format(tests=[str(folder) for folder in list(Path(__file__).parents)[:2]]))
    options = {"cases": cases, "processes": processes, "out": str(out)}
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    warm_start.run_ranks([sys.executable, worker, json.dumps(options)], processes, env=environment)
    return [torch.load(f"{out}{rank}", weights_only=True) for rank in range(processes)]


def assert_equal_weights(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    for name, weight in expected.items():
        if name.startswith(("g.", "d.")) and weight.is_floating_point():
            message = f"{name}: {{}}".format  # torch puts its own message there
            torch.testing.assert_close(found[name], weight, rtol=0, atol=tolerance, msg=message)


def test_levers_equal_the_tutorial_in_float64(tmp_path: Path) -> None:
    plain, fast = ["channels_last=false", "fused_optimizer=false"], ["channels_last=true", "fused_optimizer=true"]
    concat = [*LABELED, "conditioning=concat"]
    (one,) = updates(tmp_path, case(*plain), case(*fast), case(*fast, "compile=true"), case(*LABELED), case(*concat))
    expected = [plain_updates(load_config(overrides=[*TINY, *more]), 3) for more in ([], LABELED, concat)]
    for found, number in zip(one, (0, 0, 0, 1, 2), strict=True):
        # Adam divides by the root of tiny second moments, which magnifies rounding: 1e-10 of weights of 1e-2.
        assert_equal_weights(found, expected[number], 1e-9)


@pytest.mark.parametrize("lever", ["compile=false", pytest.param("compile=true", marks=pytest.mark.slow)])
def test_two_processes_equal_one(tmp_path: Path, lever: str) -> None:
    """BatchNorm's statistics are those of each process, which one process does as those of each micro-batch."""
    fixed, own = case(batchnorm=False), case("accumulate=2", in_ranks=True)
    beyond, beyond_own = case(*BEYOND, batchnorm=False), case(*PENALIZED, "accumulate=2", in_ranks=True)
    labeled, labeled_own = case(*LABELED, batchnorm=False), case(*LABELED, "accumulate=2", in_ranks=True)
    in_turn, in_turn_accumulated = (case("alternate=true", *more, batchnorm=False) for more in ([], ["accumulate=2"]))
    concat = case(*LABELED, "conditioning=concat", batchnorm=False)
    spectral = [SPECTRAL, *PENALIZED, *LABELED]
    of_spectral, spectral_accumulated = (case(*spectral, *more, batchnorm=False) for more in ([], ["accumulate=2"]))
    cases = [fixed, fixed, own, beyond, beyond, beyond_own, labeled, labeled_own, in_turn, concat]
    (one,) = updates(tmp_path, *cases, of_spectral, of_spectral)
    accumulated = case(lever, "accumulate=2", batchnorm=False)
    cases = [case(lever, batchnorm=False), accumulated, case(lever)]
    accumulated = case(*BEYOND, "accumulate=2", batchnorm=False)
    cases += [case(*BEYOND, batchnorm=False), accumulated, case(*PENALIZED)]
    cases += [case(*LABELED, "accumulate=2", batchnorm=False), case(*LABELED), in_turn_accumulated, concat]
    cases += [of_spectral, spectral_accumulated]
    ranks = updates(tmp_path, *cases, processes=2)
    for number, state in enumerate(one):
        expected = {name: value for name, value in state.items() if "running" not in name}
        for rank in ranks:
            assert_equal_weights(rank[number], expected, 1e-9)
            name = next(name for name in expected if name.startswith("e.layers."))
            torch.testing.assert_close(rank[number][name], expected[name], rtol=0, atol=1e-9)
            assert rank[number]["flags"] == 2 * [[False, True]], "buffers are averaged when saving, not sent before D's"


@pytest.mark.slow
def test_two_processes_equal_one_at_other_shapes(tmp_path: Path) -> None:
    shapes = (
        ["image_size=28", "channels=1"],
        ["image_size=96x64"],
        ["image_size=64x96", "channels=4"],
        ["image_size=256"],
    )
    cases = [case(*shape, batchnorm=False) for shape in shapes]
    (one,) = updates(tmp_path, *cases)
    for rank in updates(tmp_path, *cases, processes=2):
        for found, expected in zip(rank, one, strict=True):
            assert_equal_weights(found, expected, 1e-9)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_generator_update_computes_no_gradients_of_discriminator_weights(compiled: bool) -> None:
    """Counted in what PyTorch really runs: a compiled backward computes all that its forward asked for."""
    from accelerate import Accelerator
    from torch.profiler import ProfilerActivity, profile

    from pipeline.training.step import AdversarialStep

    config = load_config(overrides=[*TINY, f"compile={compiled}"])
    step = AdversarialStep(config, Accelerator(cpu=True))
    reals, z = batch_of(config)
    step.update(reals, z, 0)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        step.update(reals, z, 0)
    # For each backward convolution: the gradients (of its input, its weights, its bias) that it computes.
    masks = Counter(e.concrete_inputs[-1][1] for e in profiled.events() if e.name == "aten::convolution_backward")
    layers_d, layers_g = (
        sum(isinstance(module, nn.Conv2d | nn.ConvTranspose2d) for module in network.modules())
        for network in (step.discriminator, step.generator)
    )
    assert masks == {True: 2 * layers_d + layers_g, False: layers_d}  # reals and fakes, then G through D


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_what_the_statistics_mean(micro_batches: int) -> None:
    """Computed again from the weights before the update, and for G's loss from D's after it."""
    from accelerate import Accelerator

    from pipeline.training.step import STATISTICS, AdversarialStep

    config = load_config(overrides=[*TINY, f"accumulate={micro_batches}"])
    step = AdversarialStep(config, Accelerator(cpu=True))
    reals, z = batch_of(config)
    reals[: len(reals) // 2] //= 4  # so that D tells the halves, and reals from fakes
    step.update(reals, z, 0)
    generator, before = copy.deepcopy(step.generator), copy.deepcopy(step.discriminator)
    average = EMA(step.ema.generator, config.recipe.ema_half_life_images, config.recipe.ema_ramp_up, 16)
    average.images_seen.fill_(16)
    step.statistics.zero_()
    step.update(reals, z, 0)
    assert step.statistics.tolist()[-2:] == [0, 0], "they cost a pass over the images"
    step.examine(images=True)
    found = dict(zip(STATISTICS, step.statistics.tolist(), strict=True))
    after = copy.deepcopy(step.discriminator)
    sums: defaultdict[str, float] = defaultdict(float)
    for real, noise in zip(np.split(reals, micro_batches), np.split(z, micro_batches), strict=True):
        pixels = torch.from_numpy(real / np.float32(127.5) - 1).permute(0, 3, 1, 2)
        fakes = generator(torch.from_numpy(noise)).detach()
        real_logits, fake_logits = before(pixels), before(fakes)
        ones, zeros = torch.ones(len(noise)), torch.zeros(len(noise))
        bce = nn.functional.binary_cross_entropy_with_logits
        loss_d = bce(real_logits, ones) + bce(fake_logits, zeros)
        (loss_d / micro_batches).backward()  # type: ignore[no-untyped-call]
        loss_g = bce(after(generator(torch.from_numpy(noise))), ones)
        (loss_g / micro_batches).backward()  # type: ignore[no-untyped-call]
        sums["loss_d"] += loss_d.item()
        sums["loss_g"] += loss_g.item()
        sums["d_real"] += (1 / (1 + np.exp(-real_logits.detach().numpy()))).mean()
        sums["d_fake"] += (1 / (1 + np.exp(-fake_logits.detach().numpy()))).mean()
        sums["deviation_real"] += pixels.numpy().std(0).mean()
        sums["deviation_fake"] += fakes.numpy().std(0).mean()
    expected = {name: total / micro_batches for name, total in sums.items()}
    for letter, network in (("d", before), ("g", generator)):
        gradients = [weight.grad.numpy().ravel() for weight in network.parameters() if weight.grad is not None]
        expected[f"grad_norm_{letter}"] = float(np.linalg.norm(np.concatenate(gradients)))
    assert found == pytest.approx({**expected, "nonfinite": 0, "skipped": 0}, rel=1e-4)
    average.update(list(step.generator.parameters()))  # G after this update
    assert all(map(torch.equal, step.ema.generator.parameters(), average.generator.parameters()))
    values = sorted(expected.values())
    assert all(big > 1.01 * small for small, big in zip(values, values[1:], strict=False)), "two could be swapped"


def test_nonfinite_gradients_change_nothing_and_are_counted() -> None:
    from accelerate import Accelerator

    from pipeline.training.step import STATISTICS, AdversarialStep

    config = load_config(overrides=TINY)
    step = AdversarialStep(config, Accelerator(cpu=True))
    reals, z = batch_of(config)
    step.update(reals, z, 0)
    step.statistics.zero_()
    before = {name: value.clone() for name, value in step.discriminator.named_parameters()}
    poisoned = z.copy()
    poisoned[0, 0] = np.nan
    step.update(reals, poisoned, 0)
    assert step.statistics[STATISTICS.index("nonfinite")] == 1
    assert [step.statistics[STATISTICS.index(name)].item() for name in ("loss_d", "loss_g")] == [0, 0]
    assert torch.isfinite(step.statistics).all(), "what is not finite counts as 0"
    assert all(torch.equal(before[name], value) for name, value in step.discriminator.named_parameters())
    assert all(torch.isfinite(weight).all() for weight in step.generator.parameters())
    assert step.examine(images=True) == 1
    assert step.statistics[STATISTICS.index("deviation_fake")] == 0, "of images that are not finite"


def test_nonfinite_gradients_are_counted_whatever_the_optimizer() -> None:
    """A plain optimizer applies them; a finite loss must not let such weights pass for good until the next step."""
    from accelerate import Accelerator

    from pipeline.training.step import STATISTICS, AdversarialStep

    config = load_config(overrides=[*TINY, "fused_optimizer=false"])
    step = AdversarialStep(config, Accelerator(cpu=True))
    first = step.generator.get_parameter("layers.0.weight")
    first.register_hook(lambda gradient: gradient * np.nan)  # type: ignore[no-untyped-call]
    step.update(*batch_of(config), 0)
    assert step.statistics[STATISTICS.index("loss_g")] > 0
    assert step.statistics[STATISTICS.index("nonfinite")] == 1
    assert step.examine() == 0


def test_no_host_sync_inside_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a tensor's value is what makes a GPU wait: count every such read."""
    from accelerate import Accelerator

    from pipeline.training.step import AdversarialStep

    config = load_config(overrides=TINY)
    step = AdversarialStep(config, Accelerator(cpu=True))
    reals, z = batch_of(config)
    step.update(reals, z, 0)
    reads: list[str] = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)

        def counted(self: torch.Tensor, *args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
            reads.append(_name)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)
    step.update(reals, z, 0)
    assert reads == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deviation_is_that_of_the_images_and_leaves_them_alone(dtype: torch.dtype) -> None:
    images = torch.randn(16, 3, 8, 8).to(dtype).contiguous(memory_format=torch.channels_last)
    before = images.clone()
    torch.testing.assert_close(deviation(images), images.float().std(0, correction=0).mean())
    assert torch.equal(images, before)
    assert deviation(images[:1].expand(16, -1, -1, -1)) < 1e-6
