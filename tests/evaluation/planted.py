"""A labeled data set whose labels can be seen in its pictures, and a run whose networks fit it."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

from pipeline.checkpoints.store import CheckpointStore
from pipeline.checkpoints.weights import FILE_OF_KIND, serialize
from pipeline.common.imaging import Pixels
from pipeline.common.storage import Store
from pipeline.config import NetworkConfig, RunConfig
from pipeline.data.dataset import Dataset
from pipeline.data.shard_writer import ShardWriter, write_shard
from pipeline.model import dcgan
from pipeline.model.networks import build_discriminator, build_generator, initialize

SIZE = 32
NETWORK = NetworkConfig(image_size=SIZE, width=8, latent_dim=16)


def planted(count: int, seed: int) -> tuple[Pixels, dict[str, list[object]]]:
    """Pictures of a square (or a disc) left or right of the middle on a bright or dark ground."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[:SIZE, :SIZE]
    bright, disc = draw.random(count) < 0.5, draw.random(count) < 0.5
    place = draw.uniform(-1, 1, count)
    images = np.empty((count, SIZE, SIZE, 3))
    for image, is_bright, is_disc, shift in zip(images, bright, disc, place, strict=True):
        away_x, away_y = np.abs(x - 15.5 - 8 * shift), np.abs(y - 15.5)
        inside = away_x**2 + away_y**2 < 49 if is_disc else (away_x < 6) & (away_y < 6)
        image[:] = np.where(inside, 120, 200 if is_bright else 40)[..., None]
    noisy = (images + draw.normal(0, 8, images.shape)).clip(0, 255).astype(np.uint8)
    columns: dict[str, list[object]] = {
        "bright": [bool(v) for v in bright],
        "disc": [bool(v) for v in disc],
        "place": [float(v) for v in place],
        "coin": [bool(v) for v in draw.random(count) < 0.5],
        "kind": ["disc" if v else "square" for v in disc],
    }
    return noisy, columns


def write_planted(folder: Path, count: int = 480, seed: int = 0, *, labels: bool = True, gaps: int = 0) -> Path:
    """Write such pictures as two packed shards; of every `gaps` images, the first lacks all labels but `coin`."""
    images, columns = planted(count, seed)
    for name, values in columns.items():
        if gaps and name != "coin":
            values[::gaps] = [None] * len(values[::gaps])
    if not labels:
        columns = {}
    store = Store(folder)
    shards = []
    for number, rows in enumerate(np.array_split(np.arange(count), 2)):
        writer = ShardWriter(f"{number:06d}", "packed", list(columns))
        for row in rows:
            writer.add(images[row], f"{row:06d}.png", [values[row] for values in columns.values()])
        shards.append(write_shard(store, f"{number:06d}.tar", writer))
    types = {"bright": "bool", "disc": "bool", "place": "float", "coin": "bool", "kind": "str"}
    dataset = Dataset(
        image_size=SIZE,
        channels=3,
        encoding="packed",
        labels={name: types[name] for name in columns},
        source={"kind": "planted"},
        images=count,
        bytes=sum(shard.bytes for shard in shards),
        shards=shards,
    )
    store.write("dataset.json", dataset.model_dump_json().encode())
    return folder


def write_run(run: Path, seed: int = 0, network: NetworkConfig = NETWORK) -> Path:
    """Write a run directory with one checkpoint of untrained networks."""
    generator, discriminator = build_generator(network), build_discriminator(network)
    initialize(generator, seed, lane=1)
    initialize(discriminator, seed, lane=2)
    files = {
        FILE_OF_KIND["ema"]: serialize(generator, network, "ema", 640),
        FILE_OF_KIND["raw"]: serialize(generator, network, "raw", 640),
        FILE_OF_KIND["discriminator"]: serialize(discriminator, network, "discriminator", 640),
    }
    CheckpointStore(Store(run)).save(640, files, {"metrics": {}})
    config = RunConfig().model_copy(update={"network": network})
    (run / "config.json").write_text(json.dumps({"config": config.model_dump(), "dataset": {}}))
    return run


def legible_generator() -> dcgan.Generator:
    """A generator whose z can be read off its images: z[0] is the ground's brightness, z[1] > 0 a square amid it.

    Channels 0 and 1 carry the positive and negative part of z[0] over the whole map, channel 2 the positive part
    of z[1] in the middle only; every layer hands them on, the last one adds them up.
    """
    generator = dcgan.Generator(NETWORK)
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.zero_()
        first, *others = (layer for layer in generator.modules() if isinstance(layer, nn.ConvTranspose2d))
        first.weight[0, 0], first.weight[0, 1] = 1, -1
        first.weight[1, 2, 1:3, 1:3] = 1
        for layer in others:
            for channel in range(3):
                if layer.out_channels > 3:
                    layer.weight[channel, channel] = 0.25  # four taps reach a pixel: their sum is kept
        last = others[-1].weight
        last[0], last[1], last[2] = 0.25 * 0.7, -0.25 * 0.7, 0.25 * 2.0
        for module in generator.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.fill_(1)
    return generator.eval()


def conditional(conditioning: str) -> NetworkConfig:
    """Return a network of two labels for such pictures."""
    label = {"label": ["bright", "disc"], "classes": ["00", "01", "10", "11"], "class_images": [1, 1, 1, 1]}
    return NetworkConfig.model_validate({**NETWORK.model_dump(), **label, "conditioning": conditioning})


def write_legible_conditional(path: Path) -> Path:
    """Write a generator whose label alone decides its images: `bright` the ground, `disc` a square amid it."""
    config = conditional("concat")
    generator, plain = build_generator(config).eval(), legible_generator()
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.zero_()
        ours, theirs = ([m for m in g.modules() if isinstance(m, nn.ConvTranspose2d)] for g in (generator, plain))
        for convolution, legible in zip(ours, theirs, strict=True):
            convolution.weight[: len(legible.weight)] = legible.weight
        ours[0].weight[-2:] = ours[0].weight[:2]  # the label's two maps do what z[0] and z[1] did
        ours[0].weight[:-2] = 0
        for module in generator.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.fill_(1)
    path.write_bytes(serialize(generator, config, "ema", 0))
    return path


def write_legible_run(run: Path) -> Path:
    """Write a run directory with that generator."""
    write_run(run)
    files = {FILE_OF_KIND["ema"]: serialize(legible_generator(), NETWORK, "ema", 1280)}
    CheckpointStore(Store(run)).save(1280, files, {"metrics": {}})
    return run
