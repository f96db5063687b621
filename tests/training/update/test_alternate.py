"""`recipe.alternate`: G and D in turn, each on images and z of its own, as the code of the paper's authors does it."""

import json
import os
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from test_step import TINY
from test_update import Recorder, batches, float64, memory_of  # noqa: F401  # float64 is a fixture
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from training_cases import hashes

from pipeline.common.errors import Stopped
from pipeline.config import RunConfig, load_config
from pipeline.model.networks import build_discriminator, build_generator, initialize
from pipeline.training import schedule
from pipeline.training.loop import train
from pipeline.training.step import STATISTICS, AdversarialStep, turns

ALTERNATE = [*TINY, "alternate=true"]
UPDATES = 6


def plain_updates(config: RunConfig) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Do the updates as the authors' loop; return the weights, and what each update says of itself."""
    recipe = config.recipe
    generator, discriminator = build_generator(config.network), build_discriminator(config.network)
    initialize(generator, recipe.seed, lane=0)
    initialize(discriminator, recipe.seed, lane=1)
    adam = partial(torch.optim.Adam, lr=2e-4, betas=(0.5, 0.999), weight_decay=recipe.weight_decay, foreach=False)
    adam_g, adam_d = adam(generator.parameters()), adam(discriminator.parameters())
    said: list[dict[str, float]] = []
    for n_updates, (pixels, z) in enumerate(batches(config, UPDATES)):
        real = torch.from_numpy(pixels).permute(0, 3, 1, 2).double() / 127.5 - 1
        network, optimizer = (generator, adam_g) if n_updates % 2 == 0 else (discriminator, adam_d)
        network.zero_grad()
        fake = generator(torch.from_numpy(z).double())
        on_fake = discriminator(fake)
        ones, zeros = torch.ones_like(on_fake), torch.zeros_like(on_fake)
        if n_updates % 2 == 0:
            loss = bce(on_fake, ones)
            found = {"loss_g": loss.item()}
        else:
            on_real = discriminator(real)
            loss = bce(on_real, ones) + bce(on_fake, zeros)
            outputs = {"d_real": on_real.sigmoid().mean().item(), "d_fake": on_fake.sigmoid().mean().item()}
            found = {"loss_d": loss.item(), **outputs}
            if n_updates // 2 % recipe.penalty_interval == 0 and recipe.r1:
                images = real.clone().requires_grad_()
                (gradient,) = torch.autograd.grad(discriminator(images).sum(), images, create_graph=True)
                loss = loss + recipe.penalty_interval * recipe.r1 / 2 * gradient.square().flatten(1).sum(1).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = [weight.grad.flatten() for weight in network.parameters() if weight.grad is not None]
        found[f"grad_norm_{'gd'[n_updates % 2]}"] = torch.cat(gradients).norm().item()
        optimizer.step()
        said.append(found)
    return {**generator.state_dict(prefix="g."), **discriminator.state_dict(prefix="d.")}, said


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("options", [[], ["weight_decay=0.01"], ["r1=2", "penalty_interval=2"]], ids=str)
def test_updates_equal_the_authors_loop(options: list[str]) -> None:
    config = load_config(overrides=[*ALTERNATE, *options])
    step = AdversarialStep(config, Accelerator(cpu=True))
    expected, said = plain_updates(config)
    for index, (reals, z) in enumerate(batches(config, UPDATES)):
        step.statistics.zero_()
        step.update(reals, z, index * config.recipe.batch)
        found = {name: value for name, value in zip(STATISTICS, step.statistics.tolist(), strict=True) if value}
        assert found == pytest.approx(said[index], rel=1e-4)
    found_weights = {**step.generator.state_dict(prefix="g."), **step.discriminator.state_dict(prefix="d.")}
    for name, weight in expected.items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(found_weights[name], weight, rtol=0, atol=1e-9, msg=f"{name}: {{}}".format)
    assert step.ema.images_seen == UPDATES * config.recipe.batch, "the average counts images, whose turn it may be"


def test_whose_turn_it_is_follows_from_the_position() -> None:
    recipe = load_config(overrides=ALTERNATE).recipe
    assert [turns(recipe, position) for position in (0, 16, 32, 48)] == [(False, True), (True, False)] * 2
    assert turns(load_config(overrides=TINY).recipe, 16) == (True, True), "off by default"


def test_an_update_of_one_network_is_always_the_same_operations() -> None:
    """What a CUDA graph needs; and it leaves the other network's weights as they are."""
    config = load_config(overrides=ALTERNATE)
    step = AdversarialStep(config, Accelerator(cpu=True))
    recorded = []
    for index, (reals, z) in enumerate(batches(config, 6)):
        step.inputs.feed(reals, z)
        before = [[weight.clone() for weight in net.parameters()] for net in (step.discriminator, step.generator)]
        with Recorder(memory_of(step)) as recorder:
            (step._run if index % 2 else step._run_generator)()
        recorded.append(recorder.operations)
        after = [list(net.parameters()) for net in (step.discriminator, step.generator)]
        assert not any(map(torch.equal, before[index % 2 == 0], after[index % 2 == 0]))
        assert all(map(torch.equal, before[index % 2], after[index % 2]))
    assert recorded[2] == recorded[4]
    assert recorded[3] == recorded[5]


@pytest.mark.usefixtures("one_thread")
def test_a_stopped_run_ends_with_the_same_bits(faces32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In windows of three updates, of which one network has two, stopped in the middle; the last has one update."""
    monkeypatch.setattr(schedule, "AGREEMENT_SECONDS", 0.0)  # at every step
    lengths = ["total_images=112", "log_every_images=48", "evaluate_samples=64", "overhead_share=1"]
    config = load_config(overrides=[*ALTERNATE, *lengths])
    train(config, data=str(faces32), out=tmp_path / "whole")

    def stop(at: int, *_: object) -> None:
        if at == 16:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped, match="at image 32, "):
        train(config, data=str(faces32), out=tmp_path / "run", on_batch=stop)
    train(config, data=str(faces32), out=tmp_path / "run")
    assert hashes(tmp_path / "run", 112) == hashes(tmp_path / "whole", 112)
    lines = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert lines == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    first, *_, last = [entry for entry in map(json.loads, lines.splitlines()) if "diversity" in entry]
    assert {"loss_d", "loss_g", "d_real", "grad_norm_g"} <= first.keys()
    assert "loss_g" in last
    assert not {"loss_d", "d_real", "d_fake", "grad_norm_d"} & last.keys(), "D had no update in it"
