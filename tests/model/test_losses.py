"""Each loss is its formula, and pulls both networks the right way."""

import numpy as np
import pytest
import torch

from pipeline.config import LOSSES
from pipeline.model.losses import load_loss, needs_real_logits

REAL, FAKE = torch.tensor([2.0, -0.5, 0.25]), torch.tensor([-3.0, 0.5, 0.0])


def test_non_saturating() -> None:
    loss = load_loss("non_saturating")
    expected = -REAL.sigmoid().log().mean() - (1 - FAKE.sigmoid()).log().mean()
    torch.testing.assert_close(loss.discriminator_loss(REAL, FAKE), expected)
    torch.testing.assert_close(loss.generator_loss(FAKE), -FAKE.sigmoid().log().mean())


def test_hinge() -> None:
    loss = load_loss("hinge")
    # Reals: 0, 1.5, 0.75. Fakes: 0, 1.5, 1.
    assert loss.discriminator_loss(REAL, FAKE).item() == pytest.approx(2.25 / 3 + 2.5 / 3)
    assert loss.generator_loss(FAKE).item() == pytest.approx(2.5 / 3)


def test_relativistic() -> None:
    """Of real - fake: 5, -1, 0.25."""
    loss = load_loss("relativistic")
    margins = np.array([5.0, -1.0, 0.25])
    assert loss.discriminator_loss(REAL, FAKE).item() == pytest.approx(np.log1p(np.exp(-margins)).mean())
    assert loss.generator_loss(FAKE, REAL).item() == pytest.approx(np.log1p(np.exp(margins)).mean())


def test_only_relativistic_costs_a_pass_of_the_reals_in_the_generator_update() -> None:
    assert [name for name in LOSSES if needs_real_logits(load_loss(name))] == ["relativistic"]


@pytest.mark.parametrize("name", LOSSES)
def test_d_raises_reals_and_lowers_fakes_and_g_raises_fakes(name: str) -> None:
    loss = load_loss(name)
    real, fake = REAL.clone().requires_grad_(), FAKE.clone().requires_grad_()
    loss.discriminator_loss(real, fake).backward()  # type: ignore[no-untyped-call]
    assert real.grad is not None
    assert fake.grad is not None
    assert (real.grad <= 0).all()
    assert real.grad.sum() < 0
    assert (fake.grad >= 0).all()
    assert fake.grad.sum() > 0
    fake = FAKE.clone().requires_grad_()
    logits = (fake, REAL) if needs_real_logits(loss) else (fake,)
    loss.generator_loss(*logits).backward()  # type: ignore[no-untyped-call]
    assert fake.grad is not None
    assert bool((fake.grad < 0).all())
