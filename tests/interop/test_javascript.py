"""An exported file in ONNX Runtime's JavaScript, native and WebAssembly, by Node.

`make test-interop` puts the packages into build/javascript.
"""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from support import ROOT

from export.builders.onnx_model import export_onnx
from export.samplers.open import open_sampler
from pipeline.checkpoints.weights import serialize
from pipeline.common.randomness import Purpose
from pipeline.config import NetworkConfig
from pipeline.model.latents import latents
from pipeline.model.networks import build_generator, initialize

PACKAGES = ROOT / "build" / "javascript" / "node_modules"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PACKAGES.is_dir(), reason="make test-interop installs the packages, where npm is"),
]

IN_NODE = """
const [runtime, dim] = process.argv.slice(2);
const fs = await import("node:fs");
const ort = await import(runtime);
const z = new Float32Array(new Uint8Array(fs.readFileSync("z.bin")).buffer);
const session = await ort.InferenceSession.create(fs.readFileSync("model.onnx"));
const { image } = await session.run({ z: new ort.Tensor("float32", z, [z.length / dim, Number(dim)]) });
fs.writeFileSync("image.bin", image.data);
console.log(image.type, ...image.dims);
"""


def write_model(folder: Path, **network: object) -> NetworkConfig:
    """Write the model.onnx of a small network."""
    config = NetworkConfig.model_validate({"width": 8, "image_size": 32, **network})
    generator = build_generator(config)
    initialize(generator, 0, lane=0)
    (folder / "model.safetensors").write_bytes(serialize(generator.eval(), config, "ema", 0))
    export_onnx(str(folder / "model.safetensors"), folder, max_batch=16, parity_images=32)
    return config


def ours(folder: Path, z: NDArray[np.float32]) -> NDArray[np.uint8]:
    with open_sampler(str(folder / "model.onnx"), backend="onnxruntime", batch=len(z), threads=1) as sampler:
        return sampler.sample(z)


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed; `make system-slow` installs it")
@pytest.mark.parametrize(
    ("runtime", "same"), [("onnxruntime-node/dist/index.js", True), ("onnxruntime-web/dist/ort.node.min.mjs", False)]
)
@pytest.mark.parametrize("network", [{}, {"architecture": "residual"}, {"channels": 1, "image_size": "48x32"}])
def test_node_makes_the_images_of_python(runtime: str, same: bool, network: dict[str, object], tmp_path: Path) -> None:
    """Native code makes the same bytes. WebAssembly adds in another order: a few values are a gray level off."""
    config = write_model(tmp_path, **network)
    z = latents(0, Purpose.SAMPLE, 0, 16, config.latent_dim)
    z.tofile(tmp_path / "z.bin")
    (tmp_path / "run.mjs").write_text(IN_NODE)
    command = ["node", "run.mjs", str(PACKAGES / runtime), str(config.latent_dim)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = ours(tmp_path, z)
    assert done.stdout.split() == ["uint8", *map(str, expected.shape)]
    found = np.fromfile(tmp_path / "image.bin", np.uint8).reshape(expected.shape)
    off = np.abs(found.astype(int) - expected)
    assert off.max() <= (0 if same else 1)
    assert (off > 0).mean() <= 0.005
