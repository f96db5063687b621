"""Options of an update beyond the paper: each equals a plain update in float64, and adds nothing where it is off."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from test_step import BEYOND, TINY
from test_update import batches, float64  # noqa: F401  # a fixture
from torch import Tensor

from pipeline.common.errors import ConfigConflict
from pipeline.common.randomness import Purpose, raw_bits
from pipeline.config import RunConfig, load_config
from pipeline.model.networks import build_discriminator, build_generator, initialize
from pipeline.training.preflight import check_settings
from pipeline.training.step import AdversarialStep
from pipeline.training.update.chances import draw_chances, flip
from pipeline.training.update.penalty import gradient_penalty, leaf


def mirrored(image: NDArray[np.uint8], index: int) -> NDArray[np.uint8]:
    """Return image `index` of a run (size, size, channels), mirrored when the first bit of its block is 0."""
    return image if raw_bits(0, Purpose.FLIP, index, 1)[0] >> 63 else image[:, ::-1]


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
        adam_d.zero_grad()
        (-(discriminator(real) - discriminator(fake.detach())).sigmoid().log().mean()).backward()
        if index % recipe.penalty_interval == 0:
            for batch, gamma in ((real, recipe.r1), (fake, recipe.r2)):
                images = batch.detach().clone().requires_grad_()
                (gradients,) = torch.autograd.grad(discriminator(images).sum(), images, create_graph=True)
                penalty = torch.stack([gamma / 2 * gradient.norm() ** 2 for gradient in gradients]).mean()
                (penalty * recipe.penalty_interval).backward()
        adam_d.step()
        adam_g.zero_grad()
        (-(discriminator(fake) - discriminator(real)).sigmoid().log().mean()).backward()
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
@pytest.mark.parametrize("options", [[], ["r1=2"], ["r2=3", "penalty_interval=2"], ["flips=true"]], ids=str)
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
