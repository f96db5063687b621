"""A folder for the Hub where others open it: its example in an environment without us, its files by the Hub's client.

`make test-interop` makes the environment, with onnxruntime, numpy and pillow alone.
"""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from PIL import Image
from support import ROOT

from export.hub.folder import write_hub_folder
from pipeline.checkpoints.weights import serialize
from pipeline.common.storage import sha256_bytes
from pipeline.config import NetworkConfig
from pipeline.model.networks import build_generator, initialize

pytestmark = pytest.mark.slow

EXAMPLE = ROOT / "build" / "example"
BIN = Path(sys.executable).parent


def write_folder(folder: Path, **network: object) -> Path:
    """Write a folder for the Hub of a small network, and return it."""
    config = NetworkConfig.model_validate({"width": 8, "image_size": 32, **network})
    generator = build_generator(config)
    initialize(generator, 0, lane=0)
    weights = folder / "weights.safetensors"
    weights.write_bytes(serialize(generator.eval(), config, "ema", 5))
    write_hub_folder(str(weights), folder / "hub", parity_images=64)
    return folder / "hub"


@pytest.mark.parametrize("network", [{}, {"latent_distribution": "normal"}, {"channels": 1, "latent_dim": 30}])
def test_the_example_makes_the_bytes_of_dcgan_generate(network: dict[str, object], tmp_path: Path) -> None:
    if not EXAMPLE.is_dir():
        pytest.skip("make test-interop makes the environment of the example")
    hub = write_folder(tmp_path, **network)
    (code,) = re.findall(r"```python\n(.*?)```", (hub / "README.md").read_text(), re.DOTALL)
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "ORT_DISABLE_TELEMETRY": "1"}
    python = str(EXAMPLE / "bin" / "python")
    listed = subprocess.run([python, "-m", "pip", "list", "--format=json"], capture_output=True, check=True)
    assert not {"torch", "dcgan-pipeline", "scipy"} & {package["name"] for package in json.loads(listed.stdout)}
    done = subprocess.run(
        [python, "-I", "-c", code], cwd=hub, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr

    ours = tmp_path / "ours"
    options = ["--count", "64", "--format", "png", "--layout", "folder", "--backend", "onnxruntime"]
    command = [str(BIN / "dcgan-generate"), "--model", str(hub / "model.onnx"), "--out", str(ours), *options]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    for index in range(64):
        name = f"{index:06d}.png"
        assert np.array_equal(np.asarray(Image.open(hub / name)), np.asarray(Image.open(ours / name))), name


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """A server that answers the Hub's client as the Hub does for one repository; its address, and what it was asked."""
    hub, asked = write_folder(tmp_path), list[str]()
    commit = "0" * 40

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer()

        def do_HEAD(self) -> None:
            self.answer()

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.answer()

        def answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            asked.append(f"{self.command} {path}")
            files = [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "1"} for file in hub.iterdir()
            ]
            content: bytes | None = None
            if re.fullmatch(r"/api/models/me/faces(/revision/main)?", path):
                content = json.dumps({"id": "me/faces", "modelId": "me/faces", "sha": commit, "siblings": []}).encode()
            elif path == "/api/models/me/faces/tree/main" or path.startswith("/api/models/me/faces/paths-info/"):
                content = json.dumps(files).encode()
            elif (match := re.fullmatch(r"/me/faces/resolve/main/([\w.]+)", path)) and (hub / match[1]).is_file():
                content = (hub / match[1]).read_bytes()
            code = 404 if content is None else 200
            body = content or b'{"error": "Entry not found"}'
            if content is not None and (span := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))):
                code, body = 206, content[int(span[1]) : int(span[2]) + 1]
            self.send_response(code)
            if content is None:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("X-Repo-Commit", commit)
            self.send_header("ETag", f'"{sha256_bytes(content or b"")}"')
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()


def test_it_opens_by_the_hubs_client(endpoint: tuple[str, list[str]], tmp_path: Path) -> None:
    address, asked = endpoint
    code = (
        "import sys; from pipeline.checkpoints.reference import load_generator\n"
        "loaded = load_generator(sys.argv[1]); print(loaded.sha256, loaded.images_seen, loaded.reference)"
    )
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, "hf://me/faces"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + "\n".join(asked)
    weights = (tmp_path / "hub" / "generator.safetensors").read_bytes()
    assert done.stdout.split() == [sha256_bytes(weights), "5", "hf://me/faces/generator.safetensors"]
