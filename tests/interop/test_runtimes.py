"""An exported file opens in the oldest runtimes that docs/export.md names, and gives the same pixels there.

`make test-interop` puts them into build/runtimes.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support import ROOT

from export.builders.onnx_model import export_onnx
from export.samplers.open import open_sampler
from pipeline.checkpoints.weights import serialize
from pipeline.common.randomness import Purpose
from pipeline.config import NetworkConfig
from pipeline.model.latents import latents
from pipeline.model.networks import build_generator, initialize

pytestmark = pytest.mark.slow

RUNTIMES = ROOT / "build" / "runtimes"
RUN = {
    "onnxruntime": """
import onnxruntime
found = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"]).run(None, {"z": z})[0]
version = onnxruntime.__version__
""",
    "openvino": """
from openvino.runtime import Core, get_version
found = Core().compile_model(sys.argv[1], "CPU")({"z": z})[0]
version = get_version()
""",
}


@pytest.mark.parametrize("network", ["dcgan", "residual"])
@pytest.mark.parametrize(("runtime", "oldest"), [("onnxruntime", "1.16."), ("openvino", "2023.0.")])
def test_the_oldest_runtimes_give_the_same_pixels(runtime: str, oldest: str, network: str, tmp_path: Path) -> None:
    if not (RUNTIMES / runtime).is_dir():
        pytest.skip("make test-interop installs the oldest runtimes")
    config = NetworkConfig.model_validate({"architecture": network, "width": 8, "image_size": 32})
    generator = build_generator(config)
    initialize(generator, 0, lane=0)
    (tmp_path / "model.safetensors").write_bytes(serialize(generator.eval(), config, "ema", 0))
    export_onnx(str(tmp_path / "model.safetensors"), tmp_path, max_batch=16, parity_images=32)
    z = latents(0, Purpose.SAMPLE, 0, 16, config.latent_dim)
    np.save(tmp_path / "z.npy", z)
    code = "import sys, numpy as np; z = np.load('z.npy')\n" + RUN[runtime]
    code += "np.save('found.npy', found); print(version)"
    environment = {**os.environ, "PYTHONPATH": str(RUNTIMES / runtime), "HOME": str(tmp_path)}
    command = [sys.executable, "-c", code, str(tmp_path / "model.onnx")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1].startswith(oldest)
    found = np.load(tmp_path / "found.npy").astype(int)
    ours = open_sampler(str(tmp_path / "model.safetensors")).sample(z).astype(int)
    assert np.abs(found - ours).max() <= 1
