"""Conditional networks equal their formulas in float64; labels are pure functions of position."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.common.errors import ConfigConflict, UsageError
from pipeline.common.randomness import Purpose
from pipeline.config import NetworkConfig, load_config
from pipeline.model.conditional import OfClass
from pipeline.model.ema import estimate_batchnorm
from pipeline.model.labels import draw_classes, draw_labels, generator_inputs, label_values
from pipeline.model.networks import build_discriminator, build_generator, initialize
from pipeline.model.sampling import class_grid, images_of, sample


def network(**settings: Any) -> NetworkConfig:
    """Return a tiny conditional network with three classes, the second of them rare."""
    values = {"label": "digit", "classes": ["0", "1", "2"], "class_images": [500, 100, 400], **settings}
    return NetworkConfig.model_validate({"image_size": 32, "width": 4, "latent_dim": 6, "channels": 1, **values})


SEVERAL = {"label": ["male", "bald"], "classes": ["00", "10", "11"]}
FAMILY = [network(), network(conditioning="concat"), network(**SEVERAL), network(conditioning="concat", **SEVERAL)]


def with_map(maps: Tensor, label: Tensor) -> Tensor:
    return torch.cat([maps, label[:, :, None, None] * torch.ones_like(maps[:, :1])], 1)


def reference_generator(state: dict[str, Tensor], z: Tensor, label: Tensor, kind: str) -> Tensor:
    """The formulas, on the weights of an eval-mode generator of 32 pixels."""
    weights = [value for name, value in state.items() if name.startswith("layers.") and value.ndim == 4]
    scales = [value for name, value in state.items() if name.endswith("scale.weight")]
    shifts = [value for name, value in state.items() if name.endswith("shift.weight")]
    norms = [name.removesuffix(".running_mean") for name in state if name.endswith("running_mean")]
    maps = z[:, :, None, None]
    for index, weight in enumerate(weights):
        stride, padding = (1, 0) if index == 0 else (2, 1)
        maps = F.conv_transpose2d(with_map(maps, label) if kind == "concat" else maps, weight, None, stride, padding)
        if index < len(norms):
            norm = [state[f"{norms[index]}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
            mean, variance, gain, bias = (value[:, None, None] for value in norm)
            maps = (maps - mean) / (variance + 1e-5).sqrt() * gain + bias
            if kind == "projection":
                scale, shift = (label @ weight.T for weight in (scales[index], shifts[index]))
                maps = maps * (1 + scale)[:, :, None, None] + shift[:, :, None, None]
            maps = maps.relu()
    return maps.tanh()


def reference_discriminator(state: dict[str, Tensor], maps: Tensor, label: Tensor, kind: str) -> Tensor:
    weights = [value for name, value in state.items() if name.startswith("layers.") and value.ndim == 4]
    norms = [name.removesuffix(".running_mean") for name in state if name.endswith("running_mean")]
    for index, weight in enumerate(weights):
        maps = F.conv2d(with_map(maps, label) if kind == "concat" else maps, weight, None, 2, 1)
        if index > 0:
            norm = [state[f"{norms[index - 1]}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
            mean, variance, gain, bias = (value[:, None, None] for value in norm)
            maps = (maps - mean) / (variance + 1e-5).sqrt() * gain + bias
        maps = F.leaky_relu(maps, 0.2)
    head = next(value for name, value in state.items() if name.startswith("head."))
    if kind == "concat":
        return F.conv2d(with_map(maps, label), head).flatten()
    embedded = label @ state["embed.weight"].T
    return F.conv2d(maps, head).flatten() + torch.einsum("nc,nchw->n", embedded, maps)


@pytest.mark.parametrize("config", FAMILY)
def test_both_ways_of_conditioning_equal_their_formulas_in_float64(config: NetworkConfig) -> None:
    generator, discriminator = build_generator(config), build_discriminator(config)
    initialize(generator, 1, lane=0)
    initialize(discriminator, 1, lane=1)
    generator.double().eval()
    discriminator.double().eval()
    for module in [*generator.modules(), *discriminator.modules()]:  # nothing may be 0 or 1 by chance
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.Linear):
            for value in [*module.parameters(), *module.buffers()]:
                if value.is_floating_point():
                    torch.nn.init.uniform_(value, 0.2, 1.5)
    inputs = generator_inputs(config, 3, Purpose.TRAIN, 0, 12)
    z, label = (torch.from_numpy(values).double() for values in inputs)
    with torch.no_grad():
        images = generator(z, label)
        torch.testing.assert_close(
            images, reference_generator(generator.state_dict(), z, label, config.conditioning), rtol=0, atol=1e-12
        )
        logits = discriminator(images, label)
        expected = reference_discriminator(discriminator.state_dict(), images, label, config.conditioning)
        torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
        folded = generator.float().folded()
        torch.testing.assert_close(folded(z.float(), label.float()), images.float(), rtol=0, atol=1e-4)
        assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())


def test_the_label_decides_the_image_and_the_grid_has_a_row_for_each_class() -> None:
    config = FAMILY[0]
    generator = build_generator(config)
    initialize(generator, 1, lane=0)
    estimate_batchnorm(generator, 0, images=128)
    samples = sample(generator, 5, Purpose.EVALUATE, 4, 3)
    z, label = generator_inputs(config, 5, Purpose.EVALUATE, 4, 3)
    assert np.array_equal(samples, images_of(generator, z, label))
    assert not np.array_equal(samples, images_of(generator, z, np.roll(label, 1, axis=1)))
    rows = class_grid(generator, 0)
    assert [title for title, _ in rows] == ["0", "1", "2"]
    assert all(images.shape == (8, 32, 32, 1) for _, images in rows)
    assert not np.array_equal(rows[0][1], rows[1][1])


def test_a_generator_of_one_class_reads_z_alone() -> None:
    for config in FAMILY:
        generator = build_generator(config)
        initialize(generator, 1, lane=0)
        estimate_batchnorm(generator, 0, images=128)
        label = label_values(config, np.array([1]))
        one = OfClass(generator, torch.from_numpy(label[0])).eval()
        assert one.config.image_shape == config.image_shape
        assert not one.config.label
        (z,) = generator_inputs(one.config, 5, Purpose.EVALUATE, 4, 3)
        assert np.array_equal(images_of(one, z), images_of(generator, z, label.repeat(3, 0)))
        maps, last = one.feature_maps(torch.from_numpy(z)), generator.config.width
        assert maps.shape[1] == last
        dropped = one.without_maps(torch.from_numpy(z), torch.arange(last))
        assert not torch.equal(dropped, one(torch.from_numpy(z)))


def test_the_class_of_a_sample_is_a_pure_function_of_seed_purpose_and_position() -> None:
    config = FAMILY[0]
    whole = draw_classes(config, 7, Purpose.SAMPLE, 0, 4000)
    assert np.array_equal(whole[1234:1300], draw_classes(config, 7, Purpose.SAMPLE, 1234, 66))
    assert not np.array_equal(whole, draw_classes(config, 8, Purpose.SAMPLE, 0, 4000))
    assert not np.array_equal(whole, draw_classes(config, 7, Purpose.GRID, 0, 4000))
    assert np.bincount(whole) / 4000 == pytest.approx([0.5, 0.1, 0.4], abs=0.03)
    assert whole[:12].tolist() == [2, 0, 0, 2, 1, 2, 0, 1, 0, 1, 2, 2], "others would be another release's labels"
    assert draw_classes(config, 7, Purpose.SAMPLE, 5, 4, "balanced").tolist() == [2, 0, 1, 2]


def test_labels_are_one_hot_or_one_value_for_each_of_several() -> None:
    assert label_values(FAMILY[0], np.array([2, 0])).tolist() == [[0, 0, 1], [1, 0, 0]]
    assert label_values(FAMILY[2], np.array([2, 0, 1])).tolist() == [[1, 1], [0, 0], [1, 0]]
    assert draw_labels(FAMILY[2], 0, Purpose.TRAIN, 0, 5).shape == (5, 2)
    assert FAMILY[2].class_titles == ("none", "male", "male+bald")


def test_a_network_without_a_label_is_written_as_before() -> None:
    """Weights, cards and graphs hold it: their bytes are those of earlier versions."""
    assert not {"label", "conditioning", "classes", "class_images"} & NetworkConfig().model_dump().keys()
    config = FAMILY[1]
    assert NetworkConfig.model_validate_json(config.model_dump_json()) == config
    assert load_config(overrides=["label=male, bald"]).network.label == ("male", "bald")


@pytest.mark.parametrize(
    "overrides",
    [
        ["conditioning=concat"],
        ["label=male,male"],
        ["label=digit", "classes=['1','1']"],
        ["label=male,bald", "classes=['1']"],
        ["label=digit", "classes=['1']", "class_images=[0]"],
    ],
)
def test_labels_that_contradict_themselves_are_refused(overrides: list[str]) -> None:
    with pytest.raises(UsageError, match=r"network\.label|network\.class"):
        load_config(overrides=overrides)


def test_what_a_label_does_not_reach_is_refused() -> None:
    with pytest.raises(ConfigConflict, match="only dcgan can be conditioned"):
        build_generator(network(architecture="residual"))
    images = torch.zeros(2, 1, 32, 32)
    assert len(list(build_discriminator(FAMILY[0]).activations(images))) == 3
    with pytest.raises(ConfigConflict, match="need a label beside the images"):
        next(build_discriminator(FAMILY[1]).activations(images))
