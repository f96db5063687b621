"""What MosaicML's streaming writes is read by `dcgan-data build mds`. `make test-interop` installs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from picture_files import make_picture
from support import ROOT

from pipeline.common.imaging import encode
from pipeline.data.dataset import open_dataset
from pipeline.data.shard_reader import iterate

pytestmark = pytest.mark.slow

STREAMING = ROOT / "build" / "streaming"
WRITE = """
import importlib.util, json, sys, types
from pathlib import Path
import numpy as np
from PIL import Image
for name in ("streaming", "streaming.base"):  # whose own __init__ wants transformers and torchvision, for its readers
    module = types.ModuleType(name)
    module.__path__ = [f"{sys.argv[1]}/{name.replace('.', '/')}"]
    sys.modules[name] = module
from streaming.base.format.mds.writer import MDSWriter
src, out, encoding, compression = sys.argv[2:6]
columns = {"image": encoding, "number": "int", "text": "str", "score": "float64", "small": "uint8", "digits": "str_int"}
with MDSWriter(out=out, columns=columns, compression=compression or None, size_limit=1 << 14) as writer:
    for index, path in enumerate(sorted(Path(src).iterdir())):
        picture = Image.open(path)
        picture.load()
        pixels = np.asarray(picture)
        kind = encoding.partition(":")[0]
        image = {"ndarray": pixels, "bytes": path.read_bytes(), "jpeg": picture}.get(kind, picture.copy())
        row = {"number": index, "text": f"t{index}", "score": np.float64(index / 2), "small": np.uint8(index)}
        writer.write({"image": image, "digits": index * 10**12, **row})
"""


@pytest.mark.parametrize(
    ("encoding", "compression"),
    [
        ("png", ""),
        ("pil", ""),
        ("jpeg", ""),
        ("bytes", ""),
        ("ndarray", ""),
        ("ndarray:uint8", "gz"),
        ("ndarray:uint8:32,32,3", "zstd"),
    ],
)
def test_what_streaming_wrote_keeps_pixels_and_labels(tmp_path: Path, encoding: str, compression: str) -> None:
    if not STREAMING.is_dir():
        pytest.skip("make test-interop installs mosaicml-streaming")
    (tmp_path / "pictures").mkdir()
    form = "jpg" if encoding == "jpeg" else "png"
    for index in range(20):
        data = encode(make_picture(index, 32, 32), "jpg" if form == "jpg" else "png", 100)
        (tmp_path / "pictures" / f"{index:03d}.{form}").write_bytes(data)
    path = os.pathsep.join([str(STREAMING), os.environ.get("PYTHONPATH", "")])
    words = [str(STREAMING), str(tmp_path / "pictures"), str(tmp_path / "src"), encoding, compression]
    written = subprocess.run(
        [sys.executable, "-c", WRITE, *words],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert written.returncode == 0, written.stderr
    assert len(json.loads((tmp_path / "src" / "index.json").read_text())["shards"]) > 1
    code = "from pipeline.data.cli import main; main()"
    build = ["build", "mds", str(tmp_path / "src"), str(tmp_path / "out"), "--size", "32", "--workers", "1"]
    done = subprocess.run([sys.executable, "-c", code, *build], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seen = set()
    for images, columns in iterate(open_dataset(tmp_path / "out"), labels=True):
        for position, number in enumerate(columns["number"]):
            seen.add(number)
            difference = images[position].astype(int) - make_picture(number, 32, 32)
            assert np.abs(difference).max() <= (6 if form == "jpg" else 0)
            row = [columns[name][position] for name in ("text", "score", "small", "digits")]
            assert row == [f"t{number}", number / 2, number, number * 10**12]
    assert seen == set(range(20))
