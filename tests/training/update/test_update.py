"""An update is a fixed list of operations on fixed memory, and equals fifty of its predecessor's in float64."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from test_step import BEYOND, SPECTRAL, TINY
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from pipeline.common.errors import ConfigConflict
from pipeline.common.randomness import Purpose
from pipeline.config import RunConfig, load_config
from pipeline.model.latents import latents
from pipeline.model.networks import build_discriminator, build_generator, initialize
from pipeline.training.step import STATISTICS, AdversarialStep
from pipeline.training.update.chances import draw_chances

FORBIDDEN = {"_local_scalar_dense", "item", "nonzero", "masked_select", "_unique2", "lift_fresh"}
"""Operations that read the device, or whose result's size depends on its values, or that copy a host's number to it."""


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operation, with its numbers, and which of the memory that stays it works on."""

    def __init__(self, staying: dict[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = {tensor.untyped_storage().data_ptr(): name for name, tensor in staying.items()}
        self.operations: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def described(value: Any) -> Any:
            if isinstance(value, Tensor):
                place = (value.storage_offset(), tuple(value.shape), value.stride(), value.dtype)
                return (self.names.get(value.untyped_storage().data_ptr(), "temporary"), *place)
            return value

        if func.namespace != "profiler":
            self.operations.append((func.name(), str(tree_map(described, (args, kwargs or {})))))
        return func(*args, **(kwargs or {}))


def memory_of(step: AdversarialStep) -> dict[str, Tensor]:
    """Return all that one update leaves for the next."""
    staying = {"reals": step.inputs.reals, "z": step.inputs.z, "statistics": step.statistics}
    staying["images_seen"] = step.ema.images_seen
    networks: dict[str, nn.Module] = {"g": step.generator, "d": step.discriminator, "ema": step.ema.generator}
    networks |= {"passes_g": step._pass_g, "passes_d": step._pass_d}
    for name, network in networks.items():
        staying |= {f"{name}.{key}": value for key, value in network.state_dict().items()}
    for name, optimizer in (("g", step.optimizer_g), ("d", step.optimizer_d)):
        for index, values in optimizer.state_dict()["state"].items():
            staying |= {f"{name}.{index}.{key}": value for key, value in values.items()}
    return staying


def batches(config: RunConfig, count: int) -> Iterator[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """Yield `count` batches of different images and z, all of another batch's."""
    network, batch = config.network, config.recipe.batch
    random = np.random.Generator(np.random.Philox(2))
    for index in range(count):
        reals = random.integers(0, 256, (batch, network.image_size, network.image_size, network.channels), np.uint8)
        yield reals, latents(0, Purpose.TRAIN, index * batch, batch, network.latent_dim)


@pytest.fixture
def bf16() -> Iterator[Accelerator]:
    """Accelerate keeps one precision in a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)


KINDS = [[], ["accumulate=2"], ["loss=hinge", "architecture=residual"], BEYOND, [SPECTRAL, *BEYOND]]


@pytest.mark.parametrize("overrides", KINDS, ids=str)
def test_two_updates_are_the_same_operations_on_the_same_memory(overrides: list[str]) -> None:
    """With other images, other z, another weight of the average and another step of Adam: what a CUDA graph needs."""
    config = load_config(overrides=[*TINY, *overrides])
    same_each_time(config, Accelerator(cpu=True))


@pytest.mark.parametrize("overrides", [[], [SPECTRAL]], ids=str)
def test_and_so_they_are_in_bf16(bf16: Accelerator, overrides: list[str]) -> None:
    same_each_time(load_config(overrides=[*TINY, *overrides]), bf16)


def same_each_time(config: RunConfig, accelerator: Accelerator) -> None:
    step = AdversarialStep(config, accelerator)
    recorded = []
    for index, (reals, z) in enumerate(batches(config, 13)):
        if index < 11:
            step.update(reals, z, 0)
            continue
        before = {name: tensor.clone() for name, tensor in memory_of(step).items()}
        chances = draw_chances(config.recipe, index * len(z), 0, 1) if step.inputs.chances.numel() else None
        step.inputs.feed(reals, z, chances)  # by copies, before what a graph holds
        with Recorder(memory_of(step)) as recorder:
            (step._run_penalized if config.recipe.r1 else step._run)()
        recorded.append(recorder.operations)
        still = [name for name, tensor in memory_of(step).items() if torch.equal(before[name], tensor)]
        constant = ("num_batches_tracked", "head.u")  # of one row, u is 1 or -1
        assert all(name.endswith(constant) or name.startswith("ema.") for name in still), "else nothing is shown"
    first, second = recorded
    for one, other in zip(first, second, strict=True):
        assert one == other
    assert not FORBIDDEN & {name.removeprefix("aten::").split(".")[0] for name, _ in first}
    used = " ".join(arguments for _, arguments in first)
    assert all(
        f"'{name}'" in used for name in recorder.names.values() if "num_batches" not in name and "ema" not in name
    )


VIEWS = ("alias", "detach", "expand", "permute", "slice", "split", "split_with_sizes", "t", "unsqueeze", "view")


def test_an_update_has_few_operations(bf16: Accelerator) -> None:
    """Each is a launch of a kernel, or most are: 275 before weights and their gradients were cast together."""
    config = load_config(overrides=["width=4", "batch=4", "streams=4"])
    step = AdversarialStep(config, bf16)
    (batch,) = batches(config, 1)
    step.update(*batch, 0)
    with Recorder({}) as recorder:
        step.update(*batch, 0)
    assert sum(name.removeprefix("aten::").split(".")[0] not in VIEWS for name, _ in recorder.operations) <= 180


def test_weights_that_are_cast_together_give_what_autocast_gives(bf16: Accelerator) -> None:
    """To the bit in the passes; the two gradients of D's weights are added before they become float32."""
    config = load_config(overrides=TINY)
    found = []
    for casts in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not casts:
                patch.setattr("pipeline.training.step.lowered", lambda network, dtype: network)
            step = AdversarialStep(config, bf16)
        (batch,) = batches(config, 1)
        step.update(*batch, 0)
        found.append(step)
    ours, plain = found
    index = STATISTICS.index("loss_d")
    assert ours.statistics[index] == plain.statistics[index]
    torch.testing.assert_close(ours.statistics, plain.statistics, rtol=2e-2, atol=0)
    for one, other in zip(ours.generator.parameters(), plain.generator.parameters(), strict=True):
        assert one.dtype == torch.float32
        assert (one - other).abs().max() <= 4.1e-4, "a step of Adam in the other direction at most"
        assert (one - other).abs().mean() <= 2e-5
    assert torch.equal(*(next(step.generator.buffers()) for step in found)), "statistics of BatchNorm are shared"


def former_updates(config: RunConfig, count: int) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Do what an update was before it ran on fixed memory, written plainly; return the weights and the means."""
    recipe = config.recipe
    generator, discriminator = build_generator(config.network), build_discriminator(config.network)
    initialize(generator, recipe.seed, lane=0)
    initialize(discriminator, recipe.seed, lane=1)
    average = [weight.detach().clone() for weight in generator.parameters()]
    adam_g, adam_d = (
        torch.optim.Adam(network.parameters(), 2e-4, (0.5, 0.999), foreach=False)
        for network in (generator, discriminator)
    )
    sums = dict.fromkeys(STATISTICS, 0.0)

    def norm(network: nn.Module) -> float:
        return float(
            torch.cat([weight.grad.flatten() for weight in network.parameters() if weight.grad is not None]).norm()
        )

    for index, (reals, z) in enumerate(batches(config, count)):
        real = torch.from_numpy(reals).permute(0, 3, 1, 2).to(torch.get_default_dtype()) / 127.5 - 1
        fake = generator(torch.from_numpy(z).to(torch.get_default_dtype()))
        real_logits, fake_logits = discriminator(real), discriminator(fake.detach())
        loss_d = (1 + (-real_logits).exp()).log().mean() + (1 + fake_logits.exp()).log().mean()
        adam_d.zero_grad()
        loss_d.backward()
        sums["grad_norm_d"] += norm(discriminator)
        adam_d.step()
        loss_g = (1 + (-discriminator(fake)).exp()).log().mean()
        adam_g.zero_grad()
        loss_g.backward()
        sums["grad_norm_g"] += norm(generator)
        adam_g.step()
        half_life = min(recipe.ema_half_life_images, (index + 1) * recipe.batch * recipe.ema_ramp_up)
        kept = 0.5 ** (recipe.batch / half_life)
        with torch.no_grad():
            for mine, weight in zip(average, generator.parameters(), strict=True):
                mine.copy_(kept * mine + (1 - kept) * weight)
        sums["loss_d"] += loss_d.item()
        sums["loss_g"] += loss_g.item()
        sums["d_real"] += (1 / (1 + (-real_logits).exp())).mean().item()
        sums["d_fake"] += (1 / (1 + (-fake_logits).exp())).mean().item()
        sums |= {"deviation_real": real.std(0, correction=0).mean().item()}
        sums |= {"deviation_fake": fake.std(0, correction=0).mean().item()}
    found = {**generator.state_dict(prefix="g."), **discriminator.state_dict(prefix="d.")}
    return found | {f"e.{index}": weight for index, weight in enumerate(average)}, sums


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("float64")
def test_fifty_updates_equal_the_former_ones() -> None:
    config = load_config(overrides=[*TINY, "ema_half_life_images=30"])  # reached inside
    step = AdversarialStep(config, Accelerator(cpu=True))
    for reals, z in batches(config, 50):
        step.update(reals, z, 0)
    assert step.examine(images=True) == 1
    expected, sums = former_updates(config, 50)
    found = {**step.generator.state_dict(prefix="g."), **step.discriminator.state_dict(prefix="d.")}
    found |= {f"e.{index}": weight for index, weight in enumerate(step.ema.generator.parameters())}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if "num_batches" not in name:
            torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-8, msg=f"{name}: {{}}".format)
    assert dict(zip(STATISTICS, step.statistics.tolist(), strict=True)) == pytest.approx(sums, rel=1e-5)


def test_images_may_be_an_array_or_a_tensor() -> None:
    config = load_config(overrides=TINY)
    found = []
    for convert in (np.asarray, torch.from_numpy):
        step = AdversarialStep(config, Accelerator(cpu=True))
        for reals, z in batches(config, 2):
            step.update(convert(reals), z, 0)
        found.append(step.statistics)
    assert torch.equal(*found)
    with pytest.raises(AssertionError, match="does not fit"):
        step.update(reals[:1], z, 0)


def test_a_graph_is_refused_where_there_is_none() -> None:
    for graph in ("auto", "off"):
        assert not AdversarialStep(load_config(overrides=[*TINY, f"graph={graph}"]), Accelerator(cpu=True)).graphed
    with pytest.raises(ConfigConflict, match=r"runtime\.graph=on: .* this run is on the CPU .*runtime\.graph=auto"):
        AdversarialStep(load_config(overrides=[*TINY, "graph=on"]), Accelerator(cpu=True))
