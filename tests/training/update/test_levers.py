"""Options of an update beyond the paper: each equals a plain update in float64, and adds nothing where it is off."""

import os
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from test_step import BEYOND, TINY
from test_update import batches, float64  # noqa: F401  # a fixture
from torch import Tensor
from training_cases import hashes

from pipeline.common.errors import ConfigConflict, Stopped, UsageError
from pipeline.common.randomness import Purpose, raw_bits
from pipeline.config import AUGMENTATIONS, RunConfig, load_config
from pipeline.model.latents import latents
from pipeline.model.networks import build_discriminator, build_generator, initialize
from pipeline.training import schedule
from pipeline.training.identity import check_identity
from pipeline.training.loop import train
from pipeline.training.preflight import check_settings
from pipeline.training.step import AdversarialStep
from pipeline.training.update.augment import _choose, augment
from pipeline.training.update.chances import draw_chances, flip
from pipeline.training.update.penalty import gradient_penalty, leaf


def mirrored(image: NDArray[np.uint8], index: int) -> NDArray[np.uint8]:
    """Return image `index` of a run (size, size, channels), mirrored when the first bit of its block is 0."""
    return image if raw_bits(0, Purpose.FLIP, index, 1)[0] >> 63 else image[:, ::-1]


def changed(images: Tensor, start: int, use: int, kinds: str) -> Tensor:
    """Return images `start` to `start + n` of a run, (n, 3, 32, 32), as DiffAugment's paper changes each of them."""
    if not kinds:
        return images
    result = []
    for index, plain in enumerate(images):
        chance = latents(0, Purpose.AUGMENT, start + index, 1, 28)[0, 7 * use : 7 * use + 7].astype(float)
        bright = plain + chance[0] / 2
        gray = bright.sum(0) / 3
        saturated = torch.stack([gray + (1 + chance[1]) * (plane - gray) for plane in bright])
        colored = saturated.mean() + (1 + chance[2] / 2) * (saturated - saturated.mean())
        down, right = (int(np.floor((value + 1) / 2 * 9)) - 4 for value in chance[3:5])
        shifted = torch.zeros(3, 40, 40, dtype=plain.dtype)
        shifted[:, 4 - down : 36 - down, 4 - right : 36 - right] = colored
        row, column = (int(np.floor((value + 1) / 2 * 33)) for value in chance[5:7])
        hole = torch.ones(32, 32, dtype=plain.dtype)
        hole[max(row - 8, 0) : row + 8, max(column - 8, 0) : column + 8] = 0
        result.append(shifted[:, 4:36, 4:36] * hole)
    return torch.stack(result)


def decay(network: torch.nn.Module, share: float) -> None:
    """Add the gradient of share / 2 times the sum of the squared weights."""
    for weight in network.parameters():
        assert weight.grad is not None
        weight.grad += share * weight.detach()


def plain_updates(config: RunConfig, count: int) -> dict[str, Tensor]:
    """Do updates as the papers of the options write them; return the weights."""
    recipe = config.recipe
    generator, discriminator = build_generator(config.network), build_discriminator(config.network)
    initialize(generator, recipe.seed, lane=0)
    initialize(discriminator, recipe.seed, lane=1)
    adam_g, adam_d = (
        torch.optim.Adam(network.parameters(), 2e-4, (0.5, 0.999), foreach=False)
        for network in (generator, discriminator)
    )
    for index, (pixels, z) in enumerate(batches(config, count)):
        reals = pixels
        if recipe.flips:
            reals = np.stack([mirrored(image, index * len(z) + row) for row, image in enumerate(pixels)])
        real = torch.from_numpy(reals).permute(0, 3, 1, 2).double() / 127.5 - 1
        fake = generator(torch.from_numpy(z).double())
        see = partial(changed, start=index * len(z), kinds=recipe.augment)
        adam_d.zero_grad()
        (
            -(discriminator(see(real, use=0)) - discriminator(see(fake.detach(), use=1))).sigmoid().log().mean()
        ).backward()
        if index % recipe.penalty_interval == 0:
            for use, (batch, gamma) in enumerate(((real, recipe.r1), (fake, recipe.r2))):
                images = batch.detach().clone().requires_grad_()
                (gradients,) = torch.autograd.grad(discriminator(see(images, use=use)).sum(), images, create_graph=True)
                penalty = torch.stack([gamma / 2 * gradient.norm() ** 2 for gradient in gradients]).mean()
                (penalty * recipe.penalty_interval).backward()  # type: ignore[no-untyped-call]
        decay(discriminator, recipe.weight_decay)
        adam_d.step()
        adam_g.zero_grad()
        (-(discriminator(see(fake, use=2)) - discriminator(see(real, use=3))).sigmoid().log().mean()).backward()
        decay(generator, recipe.weight_decay)
        adam_g.step()
    return {**generator.state_dict(prefix="g."), **discriminator.state_dict(prefix="d.")}


def our_updates(config: RunConfig, count: int) -> dict[str, Tensor]:
    """Do the same with AdversarialStep."""
    step = AdversarialStep(config, Accelerator(cpu=True))
    for index, (reals, z) in enumerate(batches(config, count)):
        step.update(reals, z, index * config.recipe.batch)
    return {**step.generator.state_dict(prefix="g."), **step.discriminator.state_dict(prefix="d.")}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if "num_batches" not in name and "running" not in name:
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-9, msg=f"{name}: {{}}".format)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "options",
    [
        [],
        ["r1=2"],
        ["weight_decay=0.1"],
        ["r2=3", "penalty_interval=2"],
        ["flips=true"],
        ["r1=2", "flips=true", "augment=[cutout, translation, color]"],
    ],
    ids=str,
)
def test_updates_equal_plain_ones(options: list[str]) -> None:
    config = load_config(overrides=[*TINY, "loss=relativistic", *options])
    assert_close(our_updates(config, 3), plain_updates(config, 3))


def test_a_penalty_is_its_closed_form() -> None:
    """D(x) = w · x + x · x / 2 has the gradient w + x, and the penalty's by w is gamma times the mean of w + x."""
    images, weight = torch.arange(12.0).reshape(2, 3, 2, 1), torch.tensor([1.0, -2.0, 3.0, 0.0, 5.0, -6.0])
    weight.requires_grad_()
    images = leaf(images, torch.float32)
    flat = images.flatten(1)
    penalty = gradient_penalty(flat @ weight + flat.square().sum(1) / 2, images, 4.0)
    gradients = (weight + flat).detach()
    assert penalty.item() == pytest.approx(4 / 2 * gradients.norm(dim=1).square().mean().item())
    penalty.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(weight.grad, 4 * gradients.mean(0))


def trained(config: RunConfig, precision: str) -> tuple[AdversarialStep, Tensor]:
    """Return a step after two updates of a process in this precision, and the sums of their statistics."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        step = AdversarialStep(config, Accelerator(cpu=True, mixed_precision=precision))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    for index, (reals, z) in enumerate(batches(config, 2)):
        step.update(reals, z, index * config.recipe.batch)
    return step, step.statistics


def test_bf16_is_float32_but_for_rounding() -> None:
    config = load_config(overrides=[*TINY, *BEYOND])
    (_, exact), (step, rounded) = trained(config, "no"), trained(config, "bf16")
    assert step.examine() == 1
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0)


@pytest.mark.parametrize(("precision", "options", "words"), [("no", ["compile=true"], "compile"), ("fp16", [], "fp16")])
def test_where_penalties_cannot_be_they_are_refused(precision: str, options: list[str], words: str) -> None:
    config = load_config(overrides=["r2=1", *options])
    accelerator = SimpleNamespace(num_processes=1, mixed_precision=precision)
    with pytest.raises(ConfigConflict, match=f"recipe.r1 and recipe.r2 need second derivatives .*{words}"):
        check_settings(config, None, accelerator)  # type: ignore[arg-type]


def test_half_of_the_images_are_mirrored_anew_in_every_epoch() -> None:
    recipe = load_config(overrides=["flips=true", "batch=4096"]).recipe
    first, second = (draw_chances(recipe, position, 0, 1)[:, 0] < 0 for position in (0, 4096))
    assert abs(first.mean() - 0.5) < 0.03
    assert abs((first == second).mean() - 0.5) < 0.03
    pixels = torch.arange(24, dtype=torch.uint8).reshape(2, 2, 3, 2)
    found = flip(pixels, torch.tensor([-0.5, 0.5]))
    assert found[0].tolist() == pixels[0].numpy()[:, ::-1].tolist()
    assert torch.equal(found[1], pixels[1])


@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_each_kind_of_augmentation_alone(kind: str) -> None:
    """Of an image of ones: its level, its edge, a hole."""
    chances = torch.tensor([[1.0, -0.3, 0.4, 1.0, -1.0, 0.0, 0.0]])
    found = augment(torch.ones(1, 3, 32, 32), chances, kind)[0]
    assert found.shape == (3, 32, 32)
    expected = torch.ones(32, 32)
    if kind == "color":
        expected += 0.5
    elif kind == "translation":
        expected[-4:] = expected[:, :4] = 0
    else:
        expected[8:24, 8:24] = 0
    torch.testing.assert_close(found, expected.expand(3, -1, -1))


def test_shifts_and_holes_are_equally_likely_everywhere() -> None:
    counts = torch.bincount(_choose(torch.linspace(-1, 1, 9001), 9))
    assert counts.shape == (9,)
    assert (counts - 1000).abs().max() <= 2


def test_augmentation_has_two_names_for_nothing_and_one_order() -> None:
    for text, kinds in {"": "", "[]": "", "cutout, color": "color,cutout", "[translation]": "translation"}.items():
        assert load_config(overrides=[f"recipe.augment={text}"]).recipe.augment == kinds
    with pytest.raises(UsageError, match=r"recipe\.augment='colors': no such kind 'colors'; expected some of color, "):
        load_config(overrides=["augment=colors"])


def test_a_checkpoint_that_does_not_know_the_options_is_of_the_same_run() -> None:
    def described(*overrides: str) -> dict[str, Any]:
        return {"config": load_config(overrides=list(overrides)).model_dump(), "dataset": {"fingerprint": "0"}}

    saved = described()
    for key in ("r1", "r2", "penalty_interval", "flips", "augment"):
        del saved["config"]["recipe"][key]
    assert check_identity(saved, described(), [], "run") == []
    with pytest.raises(ConfigConflict, match=r"recipe\.r1 0\.0 -> 1\.0"):
        check_identity(saved, described("r1=1"), [], "run")


@pytest.mark.usefixtures("one_thread")
def test_a_stopped_run_ends_with_the_same_bits(faces32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "AGREEMENT_SECONDS", 0.0)  # at every step
    lengths = ["total_images=64", "log_every_images=64", "evaluate_samples=64"]
    config = load_config(overrides=[*TINY, *BEYOND, *lengths])
    train(config, data=str(faces32), out=tmp_path / "whole")

    def stop(at: int, *_: object) -> None:
        if at == 16:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped, match="at image 32, "):
        train(config, data=str(faces32), out=tmp_path / "run", on_batch=stop)
    train(config, data=str(faces32), out=tmp_path / "run")
    assert hashes(tmp_path / "run", 64) == hashes(tmp_path / "whole", 64)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_frozen_stages_of_the_discriminator_stay_as_they_began(precision: str) -> None:
    """And the passes in bf16 read them, although nothing is copied back from there."""
    config = load_config(overrides=[*TINY, "freeze_d=2", "r1=1"])
    network = build_discriminator(config.network)
    initialize(network, 0, lane=1)
    began = dict(network.named_parameters())
    step, _ = trained(config, precision)
    found = dict(step.discriminator.named_parameters())
    stayed = {name for name, tensor in found.items() if torch.equal(tensor, began[name])}
    assert stayed == {name for name in found if name.startswith(("layers.0.", "layers.2.", "layers.3."))}
    passes = dict(step._pass_d.named_parameters())
    assert all(torch.equal(passes[name], found[name].to(passes[name].dtype)) for name in stayed)
