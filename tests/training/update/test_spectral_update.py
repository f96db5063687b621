"""`network.discriminator_norm=spectral` in updates: the paper's in float64, one iteration for each update of D."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from test_levers import assert_close, our_updates, trained
from test_step import SPECTRAL, TINY
from test_update import batches, float64  # noqa: F401  # a fixture
from torch import Tensor
from training_cases import hashes

from pipeline.common.errors import ConfigConflict
from pipeline.config import RunConfig, load_config
from pipeline.model.networks import build_discriminator, build_generator, initialize
from pipeline.model.spectral import Spectral
from pipeline.training.loop import train
from pipeline.training.step import AdversarialStep

PENALTY = ["r1=2", "penalty_interval=2"]


def plain_updates(config: RunConfig, count: int) -> dict[str, Tensor]:
    """Do updates as Miyato et al. 2018 write them (algorithm 1, with u^T W v); return the weights."""
    recipe = config.recipe
    generator, network = build_generator(config.network), build_discriminator(config.network)
    initialize(generator, recipe.seed, lane=0)
    initialize(network, recipe.seed, lane=1)
    weights, vectors = dict(network.named_parameters()), dict(network.named_buffers())
    adam = partial(torch.optim.Adam, lr=2e-4, betas=(0.5, 0.999), foreach=False)
    adam_g, adam_d = adam(generator.parameters()), adam(network.parameters())

    def discriminator(maps: Tensor) -> Tensor:
        for name in ("layers.0", "layers.2", "layers.4", "head"):
            matrix, u = weights[f"{name}.weight"].flatten(1), vectors[f"{name}.u"].clone()
            v = F.normalize(matrix.detach().T @ u, dim=0)
            weight, bias = weights[f"{name}.weight"] / (u @ matrix @ v), weights.get(f"{name}.bias")
            if name == "head":
                return F.conv2d(maps, weight, bias).flatten()
            maps = F.leaky_relu(F.conv2d(maps, weight, bias, 2, 1), 0.2)
        raise AssertionError

    for index, (pixels, z) in enumerate(batches(config, count)):
        real = (torch.from_numpy(pixels).permute(0, 3, 1, 2).double() / 127.5 - 1).requires_grad_()
        fake = generator(torch.from_numpy(z).double())
        for name, u in vectors.items():
            matrix = weights[name.replace(".u", ".weight")].detach().flatten(1)
            u.copy_(F.normalize(matrix @ F.normalize(matrix.T @ u, dim=0), dim=0))
        adam_d.zero_grad()
        logits = discriminator(real)
        loss = F.relu(1 - logits).mean() + F.relu(1 + discriminator(fake.detach())).mean()
        if recipe.r1 and index % recipe.penalty_interval == 0:
            (gradient,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
            loss = loss + recipe.penalty_interval * recipe.r1 / 2 * gradient.square().flatten(1).sum(1).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        adam_d.step()
        adam_g.zero_grad()
        (-discriminator(fake).mean()).backward()  # type: ignore[no-untyped-call]
        adam_g.step()
    return {**generator.state_dict(prefix="g."), **network.state_dict(prefix="d.")}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("options", [[], PENALTY], ids=str)
def test_updates_equal_the_papers(options: list[str]) -> None:
    config = load_config(overrides=[*TINY, SPECTRAL, "loss=hinge", *options])
    assert_close(our_updates(config, 3), plain_updates(config, 3))


@pytest.mark.parametrize("options", [[], ["accumulate=2"], ["loss=relativistic"], ["alternate=true"]], ids=str)
def test_an_update_of_d_iterates_once_and_nothing_else_does(options: list[str]) -> None:
    config = load_config(overrides=[*TINY, SPECTRAL, *options])
    step = AdversarialStep(config, Accelerator(cpu=True))
    layers = [layer for layer in step.discriminator.modules() if isinstance(layer, Spectral)]
    for index, (reals, z) in enumerate(batches(config, 4)):
        expected = [layer.u.clone() for layer in layers]
        if not config.recipe.alternate or index % 2:
            matrices = [layer.weight.detach().flatten(1) for layer in layers]
            expected = [F.normalize(w @ (w.T @ u), dim=0) for w, u in zip(matrices, expected, strict=True)]
        step.update(reals, z, index * len(z))
        for layer, u in zip(layers, expected, strict=True):
            torch.testing.assert_close(layer.u, u, rtol=1e-5, atol=1e-6)


def test_bf16_is_float32_but_for_rounding() -> None:
    config = load_config(overrides=[*TINY, SPECTRAL, "loss=relativistic", *PENALTY])
    (exact, expected), (step, rounded) = trained(config, "no"), trained(config, "bf16")
    assert step.examine() == 1
    assert not torch.equal(expected, rounded)
    torch.testing.assert_close(rounded, expected, rtol=0.05, atol=0)
    assert all(buffer.dtype == torch.float32 for buffer in step.discriminator.buffers())
    pairs = zip(step.discriminator.buffers(), exact.discriminator.buffers(), strict=True)
    assert all(torch.dot(one, other) > 0.999 for one, other in pairs)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_frozen_stage_keeps_its_estimate_too(precision: str) -> None:
    config = load_config(overrides=[*TINY, SPECTRAL, "freeze_d=2", "r1=1"])
    network = build_discriminator(config.network)
    initialize(network, 0, lane=1)
    found = trained(config, precision)[0].discriminator.state_dict()
    stayed = {name for name, tensor in network.state_dict().items() if torch.equal(tensor, found[name])}
    assert stayed == {name for name in found if name.startswith(("layers.0.", "layers.2."))} | {"head.u"}


class Lost(Exception):
    """The power is gone."""


@pytest.mark.usefixtures("one_thread")
def test_a_lost_run_ends_with_the_same_bits(faces32: Path, tmp_path: Path) -> None:
    """From a checkpoint before the one in which it was lost: u comes from there, as the weights do."""
    lengths = ["total_images=80", "log_every_images=16", "checkpoint_every_images=32", "evaluate_samples=64"]
    config = load_config(overrides=[*TINY, SPECTRAL, *PENALTY, *lengths, "overhead_share=1"])
    train(config, data=str(faces32), out=tmp_path / "whole")

    def lose(at: int, *_: object) -> None:
        if at == 48:
            raise Lost

    with pytest.raises(Lost):
        train(config, data=str(faces32), out=tmp_path / "run", on_batch=lose)
    saved = [folder.name for folder in sorted((tmp_path / "run" / "checkpoints").iterdir())]
    assert saved == [f"{32:012d}"], "two updates before it was lost"
    train(config, data=str(faces32), out=tmp_path / "run")
    assert hashes(tmp_path / "run", 80) == hashes(tmp_path / "whole", 80)
    lines = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("run", "whole")]
    assert lines[0] == lines[1]
    with pytest.raises(ConfigConflict, match=r"network\.discriminator_norm spectral -> batch"):
        train(load_config(overrides=[*TINY, *PENALTY, *lengths]), data=str(faces32), out=tmp_path / "run")
    other = load_config(overrides=[*TINY, *lengths])
    with pytest.raises(ConfigConflict, match=r"network\.discriminator_norm is spectral there, batch here"):
        train(other, data=str(faces32), out=tmp_path / "other", init_from=[str(tmp_path / "run")])
