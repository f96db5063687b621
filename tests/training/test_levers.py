"""Options of an update beyond the paper: each equals a plain update in float64, and adds nothing where it is off."""

import pytest
import torch
from accelerate import Accelerator
from test_step import TINY
from test_update import batches, float64  # noqa: F401  # a fixture
from torch import Tensor

from pipeline.config import RunConfig, load_config
from pipeline.model.networks import build_discriminator, build_generator, initialize
from pipeline.training.step import AdversarialStep


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
    for reals, z in batches(config, count):
        real = torch.from_numpy(reals).permute(0, 3, 1, 2) / 127.5 - 1.0
        fake = generator(torch.from_numpy(z).double())
        real_logits, fake_logits = discriminator(real.double()), discriminator(fake.detach())
        loss = -(real_logits - fake_logits).sigmoid().log().mean()
        adam_d.zero_grad()
        loss.backward()
        adam_d.step()
        adam_g.zero_grad()
        (-(discriminator(fake) - discriminator(real.double())).sigmoid().log().mean()).backward()
        adam_g.step()
    return {**generator.state_dict(prefix="g."), **discriminator.state_dict(prefix="d.")}


def our_updates(config: RunConfig, count: int) -> dict[str, Tensor]:
    """Do the same with AdversarialStep."""
    step = AdversarialStep(config, Accelerator(cpu=True))
    for reals, z in batches(config, count):
        step.update(reals, z)
    return {**step.generator.state_dict(prefix="g."), **step.discriminator.state_dict(prefix="d.")}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if "num_batches" not in name and "running" not in name:
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-9, msg=f"{name}: {{}}".format)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("options", [["loss=relativistic"]], ids=str)
def test_updates_equal_plain_ones(options: list[str]) -> None:
    config = load_config(overrides=[*TINY, *options])
    assert_close(our_updates(config, 3), plain_updates(config, 3))
