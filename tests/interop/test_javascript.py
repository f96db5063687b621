"""An exported file in ONNX Runtime's JavaScript: in Node, and by the lines of docs/export.md in a browser.

`make test-interop` puts the packages into build/javascript.
"""

import json
import re
import shutil
import subprocess
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from browser import find_browser, open_page
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


@pytest.mark.skipif(find_browser() is None, reason="Chromium is not installed; `make system` installs it")
@pytest.mark.parametrize("network", [{}, {"channels": 1}, {"channels": 4}])
def test_the_lines_of_the_page_draw_a_sample_in_a_browser(network: dict[str, object], tmp_path: Path) -> None:
    (page,) = re.findall(r"```html\n(.*?)```", (ROOT / "docs" / "export.md").read_text(), re.DOTALL)
    assert len(page.splitlines()) <= 15
    config = write_model(tmp_path, **network)
    z = latents(0, Purpose.SAMPLE, 0, 1, config.latent_dim)
    drawn = json.dumps(((z[0].astype(float) + 1) / 2).tolist())
    given = f"<script>const drawn = {drawn}; Math.random = () => drawn.shift();</script>"
    (tmp_path / "index.html").write_text(f'<link rel="icon" href="data:,">{given}{page}')
    (tmp_path / "onnxruntime-web").symlink_to(PACKAGES / "onnxruntime-web")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    Thread(target=server.serve_forever, daemon=True).start()
    pixels = (
        "(c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data])(document.querySelector('canvas'))"
    )
    wait = f"new Promise(r => {{ let n = 0; const t = setInterval(() => {{ if ({pixels}.some(v => v) || ++n > 100) "
    wait += "{ clearInterval(t); r(n); } }, 100); })"
    try:
        scripts = {f"wait {turn}": wait for turn in range(12)} | {"pixels": pixels}
        url = f"http://127.0.0.1:{server.server_port}/index.html"
        seen = open_page(url, tmp_path / "profile", width=400, height=300, dark=False, scripts=scripts)
    finally:
        server.shutdown()
    assert [error for error in seen.errors if "read-frequently" not in error] == []  # advice; the test does the reading
    expected = ours(tmp_path, z)[0].astype(int)
    rgba = np.array(seen.values["pixels"]).reshape(*expected.shape[:2], 4)
    alpha = expected[..., 3:] if config.channels == 4 else np.full((*expected.shape[:2], 1), 255)
    assert np.abs(rgba[..., 3:] - alpha).max() <= 1
    lost = 255 / np.maximum(alpha, 1)  # a canvas multiplies by the alpha, and divides when it is read
    assert (np.abs(rgba[..., :3] - expected[..., :3]) <= 1 + lost * (alpha < 255)).all()
    assert rgba[..., :3].std() > 0


class Quiet(SimpleHTTPRequestHandler):
    """Serves a folder without a log."""

    def log_message(self, *_: object) -> None: ...
