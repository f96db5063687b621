"""What Lightning's litdata writes is read by `dcgan-data build litdata`. `make test-interop` installs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from picture_files import make_picture
from support import ROOT

from pipeline.common.imaging import encode
from pipeline.data.dataset import open_dataset
from pipeline.data.shard_reader import iterate

pytestmark = pytest.mark.slow

LITDATA = ROOT / "build" / "litdata"
WRITE = """
import io, sys
from pathlib import Path
import numpy as np
import torch
from PIL import Image
from litdata.streaming.writer import BinaryWriter
writer = BinaryWriter(sys.argv[2], chunk_size=7)
for index, path in enumerate(sorted(Path(sys.argv[1]).iterdir())):
    picture = Image.open(path)
    picture.load()
    data = path.read_bytes()
    pixels = np.asarray(picture)
    image = {
        "pil": picture.copy(),
        "jpeg": picture,
        "bytes": data,
        "numpy": pixels,
        "tensor": torch.from_numpy(pixels.transpose(2, 0, 1).copy()),
    }[sys.argv[3]]
    writer[index] = {"image": image, "number": index, "text": f"t{index}", "good": index % 2 == 0, "score": index / 2}
writer.done()
writer.merge()
"""


@pytest.mark.parametrize("form", ["pil", "jpeg", "bytes", "numpy", "tensor"])
def test_what_litdata_wrote_keeps_pixels_and_labels(tmp_path: Path, form: str) -> None:
    if not LITDATA.is_dir():
        pytest.skip("make test-interop installs litdata")
    (tmp_path / "pictures").mkdir()
    suffix = {"bytes": ".bin", "jpeg": ".jpg"}.get(form, ".png")
    for index in range(20):
        data = encode(make_picture(index, 32, 32), "jpg" if form == "jpeg" else "png", 100)
        (tmp_path / "pictures" / f"{index:03d}{suffix}").write_bytes(data)
    path = os.pathsep.join([str(LITDATA), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", WRITE, str(tmp_path / "pictures"), str(tmp_path / "src"), form]
    written = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert written.returncode == 0, written.stderr
    index_file = json.loads((tmp_path / "src" / "index.json").read_text())
    assert len(index_file["chunks"]) == 3
    code = "from pipeline.data.cli import main; main()"
    words = ["build", "litdata", str(tmp_path / "src"), str(tmp_path / "out"), "--size", "32", "--workers", "1"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seen = set()
    for images, columns in iterate(open_dataset(tmp_path / "out"), labels=True):
        for position, number in enumerate(columns["number"]):
            seen.add(number)
            difference = images[position].astype(int) - make_picture(number, 32, 32)
            assert abs(difference).max() <= (0 if form != "jpeg" else 6)
            row = [columns[name][position] for name in ("text", "good", "score")]
            assert row == [f"t{number}", number % 2 == 0, number / 2]
    assert seen == set(range(20))
