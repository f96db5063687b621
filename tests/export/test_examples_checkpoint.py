"""A netG_epoch_N.pth of pytorch/examples exports like our own checkpoints, and is its own network's equal."""

import subprocess
import sys
from pathlib import Path

import examples_dcgan
import numpy as np
import torch
from export_cases import Cli

from export.format.card import read_card
from export.samplers.open import open_sampler
from pipeline.common.randomness import Purpose
from pipeline.model.latents import latents


def test_a_netg_file_becomes_a_model(cli: Cli, tmp_path: Path) -> None:
    script = Path(examples_dcgan.__file__)
    subprocess.run([sys.executable, script, tmp_path, "8"], check=True)
    weights = tmp_path / "netG_epoch_0.pth"
    code, output, error = cli(
        "onnx", "--ckpt", weights, "--out", tmp_path / "model", "--max-batch", 16, "--parity-images", 32
    )
    assert code == 0, error
    assert "netG_epoch_0.pth" in output
    card = read_card(str(tmp_path / "model" / "model.onnx"))
    assert (card.source.kind, card.network.width, card.input.values) == ("netG", 8, "N(0, 1)")

    theirs = examples_dcgan.Generator(8)
    theirs.load_state_dict(torch.load(weights, weights_only=True))
    z = latents(0, Purpose.SAMPLE, 0, 9, 100, "normal")
    with torch.no_grad():
        floats = theirs.eval()(torch.from_numpy(z)[:, :, None, None]).numpy()
    pixels = np.clip(floats.transpose(0, 2, 3, 1) * 127.5 + 128, 0, 255).astype(np.uint8)
    assert pixels.std() > 20
    with open_sampler(str(tmp_path / "model" / "model.onnx")) as sampler:
        assert sampler.latent_distribution == "normal"
        assert np.abs(sampler.sample(z).astype(int) - pixels).max() <= 1
