"""Images of any shape go all the way: pictures, shards, training, resume, export, samples."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from picture_files import make_picture
from PIL import Image
from support import ROOT, TINY, Trainer, kill_after_its_first_checkpoint, write_dataset
from typer.testing import CliRunner

from deploy.generate import main as generate
from export.builders.onnx_model import export_onnx
from pipeline.common.errors import ConfigConflict, UsageError
from pipeline.common.imaging import Pixels, decode
from pipeline.config import load_config
from pipeline.data.cli import main as dcgan_data
from pipeline.data.dataset import open_dataset
from pipeline.data.shard_reader import iterate
from pipeline.evaluation.cli import main as dcgan_eval
from pipeline.model.footprint import footprint
from pipeline.train import app, resolve
from pipeline.training import preflight
from pipeline.training.loop import train

Command = Callable[..., str]

LENGTH = ("log_every_images=16", "checkpoint_every_images=32", "evaluate_every_images=32", "evaluate_samples=64")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Run a command in this process and return what it said."""

    def run(main: Callable[[], None], *arguments: object, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        found = 0
        try:
            main()
        except SystemExit as end:
            found = int(end.code or 0)
        said = "".join(capfd.readouterr())
        assert found == code, said
        return said

    return run


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pictures(folder: Path, channels: int) -> Path:
    """Write 70 pictures of 60 x 40, of RGBA with transparent corners and hidden colors."""
    folder.mkdir()
    for index in range(70):
        pixels = make_picture(index, 60, 40)
        if channels == 4:
            down, across = np.mgrid[:40, :60]
            alpha = np.clip(400 - 12 * np.hypot(down - 20, across - 30), 0, 255).astype(np.uint8)
            pixels = np.dstack([pixels, alpha])
        Image.fromarray(pixels).save(folder / f"{index:03d}.png")
    return folder


def samples(folder: Path) -> Pixels:
    return np.concatenate(list(iterate(open_dataset(str(folder)))))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("size", "channels", "shape", "fit"),
    [("28", 1, (28, 28, 1), "crop"), ("96x64", 3, (64, 96, 3), "stretch"), ("64x96", 4, (96, 64, 4), "pad")],
)
def test_a_shape_goes_all_the_way(
    size: str, channels: int, shape: tuple[int, int, int], fit: str, tmp_path: Path, command: Command
) -> None:
    source, data, run, again = (tmp_path / name for name in ("pictures", "data", "run", "again"))
    options = ["--size", size, "--channels", channels, "--fit", fit, "--workers", 1]
    command(dcgan_data, "build", "folder", pictures(source, channels), data, *options)
    dataset = open_dataset(str(data))
    assert dataset.image_shape == shape
    assert dataset.aspect == (1.5 if fit == "stretch" else None)

    overrides = [*TINY[1:], *LENGTH]
    config, _, _ = resolve(run, str(data), None, None, [*overrides, "total_images=32"])
    assert config.network.image_shape == shape, "as the data have it"
    train(config, data=str(data), out=run)
    for images in (16, 32):  # stops half-way
        train(
            resolve(again, str(data), None, None, [*overrides, f"total_images={images}"])[0], data=str(data), out=again
        )
    one, two = (json.loads((out / f"checkpoints/{32:012d}/state.json").read_text())["files"] for out in (run, again))
    assert all(one[name] == two[name] for name in one if name != "metrics.jsonl"), "which says where it was evaluated"
    grid = decode(sorted((run / "samples").iterdir())[-1].read_bytes())
    assert grid.shape == (8 * shape[0], 8 * shape[1], 3)

    card = export_onnx(str(run), tmp_path / "model", max_batch=16, parity_images=16)
    assert card.output.shape[1:] == list(shape)
    model = ["--model", tmp_path / "model" / "model.onnx", "--batch", 16, "--backend", "onnxruntime"]
    asked = [*model, "--count", 40, "--format", "packed", "--shard-images", 16]
    command(generate, *asked, "--out", tmp_path / "one")
    made = samples(tmp_path / "one")
    assert made.shape == (40, *shape)
    files = [*model, "--count", 3, "--layout", "folder", "--format", "png", "--out"]
    command(generate, *files, tmp_path / "files")
    found = [decode(path.read_bytes(), channels) for path in sorted((tmp_path / "files").glob("0*.png"))]
    assert np.array_equal(np.stack(found), made[:3])

    if channels == 4:
        for part in ("0/2", "1/2"):
            command(generate, *asked, "--out", tmp_path / "two", "--part", part)
        assert np.array_equal(made, samples(tmp_path / "two")), "cut in two"
        assert (made[..., :3] <= made[..., 3:]).all(), "no color is larger than its alpha"
        said = command(generate, *model, "--count", 3, "--format", "jpg", "--out", tmp_path / "jpg", code=2)
        assert "a JPEG has none" in said
    if fit == "stretch":
        assert card.network.aspect == 1.5
        command(generate, *files, tmp_path / "restored", "--restore-aspect")
        with Image.open(tmp_path / "restored" / "000000.png") as image:
            assert image.size == (96, 64)
    else:
        said = command(generate, *files, tmp_path / "restored", "--restore-aspect", code=2)
        assert "does not say that its images were stretched" in said


def on_the_cpu(*command: object) -> str:
    """Run a command that trains, and return what it printed."""
    done = subprocess.run(
        [*map(str, command)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("size", "channels"), [("28", 1), ("96x64", 3), ("64x96", 4), ("256", 3)])
def test_a_shape_is_killed_resumed_and_trained_by_two_processes(
    size: str, channels: int, tmp_path: Path, command: Command, trainer: Trainer
) -> None:
    """From a folder of true files to a report, by processes of their own."""
    source, data, run = (tmp_path / name for name in ("pictures", "data", "run"))
    options = ["--size", size, "--channels", channels, "--fit", "pad", "--workers", 1]
    command(dcgan_data, "build", "folder", pictures(source, channels), data, *options)
    settings = [f"network.image_size={size}", f"network.channels={channels}", *LENGTH]
    total = 48 + kill_after_its_first_checkpoint(data, run, *settings)
    for place in (run, tmp_path / "whole"):
        done = trainer(data, place, *settings, f"schedule.total_images={total}")
        assert done.returncode == 0, done.stderr
    name = f"checkpoints/{total:012d}/state.json"
    files, undisturbed = (json.loads((place / name).read_text())["files"] for place in (run, tmp_path / "whole"))
    assert files == undisturbed

    launch = [Path(sys.executable).with_name("dcgan-launch"), "--processes", 2, "train", "--data", data]
    overrides = [*TINY, *settings, "schedule.total_images=32"]
    on_the_cpu(*launch, "--out", tmp_path / "two", *overrides)
    assert (tmp_path / "two" / f"checkpoints/{32:012d}/state.json").exists()

    card = export_onnx(str(run), tmp_path / "model", max_batch=8, parity_images=8)
    assert all(proven.max_uint8_error <= 1 for proven in card.parity)
    asked = ["--model", tmp_path / "model" / "model.onnx", "--batch", 8, "--backend", "onnxruntime", "--count", 20]
    asked += ["--format", "packed", "--shard-images", 8]
    command(generate, *asked, "--out", tmp_path / "one")
    for part in ("1/2", "0/2"):
        command(generate, *asked, "--out", tmp_path / "cut", "--part", part)
    assert np.array_equal(samples(tmp_path / "one"), samples(tmp_path / "cut"))
    command(dcgan_eval, "report", run, "--out", tmp_path / "report.html")
    width, _, height = size.partition("x")
    assert f"{width}×{height or width} pixels" in (tmp_path / "report.html").read_text()


MEMORY = """
import resource, sys
from pathlib import Path
from pipeline.config import load_config
from pipeline.training.loop import train
data, out, *overrides = sys.argv[1:]
peaks = []
note = lambda *_: peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10)
train(load_config(overrides=overrides), data=data, out=Path(out), on_batch=note)
print(peaks[0], peaks[-1])
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_updates_at_512_pixels_take_the_memory_that_the_table_says(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", images=16, size=512)
    sizes = ["network.image_size=512", "network.width=16", "network.latent_dim=8", "recipe.batch=4", "recipe.streams=4"]
    schedule = ["schedule.total_images=40", "schedule.evaluate_samples=64", "schedule.grid_every_images=4000000"]
    said = on_the_cpu(sys.executable, "-c", MEMORY, data, tmp_path / "run", *sizes, *schedule)
    before, peak = map(int, said.split())
    expected = footprint(load_config(overrides=sizes).network).update_bytes(4)
    assert peak - before < 2 * expected, "the convolutions' own memory comes on top"


def test_a_restored_image_has_no_side_shorter_than_the_networks() -> None:
    from pipeline.common.shapes.size import with_aspect

    assert with_aspect(64, 64, 1.5) == "96x64"
    assert with_aspect(64, 64, 0.5) == "64x128"
    assert with_aspect(96, 64, 1.5) == "96x64"
    assert with_aspect(96, 64, 1.0) == 96


def test_size_and_channels_are_those_of_the_data_unless_they_are_named(tmp_path: Path) -> None:
    data = str(write_dataset(tmp_path / "data", images=64, size=28, channels=1))
    config, _, taken = resolve(tmp_path / "run", data, "paper64", None, [])
    assert config.network.image_shape == (28, 28, 1)
    assert taken == {"image_size": 28, "channels": 1}
    assert resolve(tmp_path / "run", data, None, None, ["network.image_size=32"])[0].network.image_size == 32
    written = tmp_path / "settings.yaml"
    written.write_text("network: {image_size: 64}\n")
    assert resolve(tmp_path / "run", data, "paper64", written, [])[0].network.image_size == 64
    paper = load_config("paper64")
    assert resolve(tmp_path / "run", None, "paper64", None, [])[0] == paper, "nothing to look at"
    assert resolve(tmp_path / "run", str(tmp_path / "missing"), "paper64", None, [])[0] == paper


def test_data_of_a_size_that_no_network_makes_are_refused_with_the_two_nearest(
    tmp_path: Path, command: Command
) -> None:
    data = str(write_dataset(tmp_path / "data", images=64, size=100))
    with pytest.raises(ConfigConflict, match=r"100x100.*96x96, 112x112; build the shards again"):
        resolve(tmp_path / "run", data, None, None, [])
    with pytest.raises(UsageError, match=r"network\.image_size=.100x64.: no network makes.*96x64, 112x64"):
        load_config(overrides=["image_size=100x64"])
    for option, value in (("--channels", "2"), ("--size", "96*64"), ("--fill", "nocolor"), ("--size", "3")):
        said = command(dcgan_data, "build", "folder", tmp_path, tmp_path / "out", option, value, code=2)
        assert f"{value}: expected" in said
    assert not (tmp_path / "out").exists()


def test_what_the_networks_cost_is_said_before_they_run(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["--out", str(tmp_path / "run"), "--show-config", "image_size=96x64", "width=64"])
    assert done.exit_code == 0
    assert "# generator: 3,986,304 parameters, 0.314 GFLOP an image" in done.output
    (tmp_path / "again.yaml").write_text(done.output)
    assert load_config(None, tmp_path / "again.yaml").network.image_size == "96x64"


def test_an_update_that_cannot_fit_is_refused_before_the_first_step(
    tmp_path: Path, faces32: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pipeline")
    config = load_config(overrides=[*TINY, *LENGTH])
    need = footprint(config.network)
    free = need.update_bytes(8, apart=True)
    monkeypatch.setattr(preflight, "free_bytes", lambda _: free)
    with pytest.raises(ConfigConflict, match=r"image_size=32 .* at least .* GB free .*; use runtime\.accumulate=2"):
        train(config, data=str(faces32), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(preflight, "free_bytes", lambda _: 0)
    with pytest.raises(ConfigConflict, match=r"lower network\.width"):
        train(config, data=str(faces32), out=tmp_path / "run")
