"""A command that refuses, is stopped, or meets a full disk leaves no folder, lock, temporary file or half a download.

Every command of every program runs here, in this process, with input that cannot work. What is allowed to stay is
finished work that the same command takes up again.
"""

import contextlib
import errno
import json
import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import import_module
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import typer
from picture_files import make_folder, make_picture
from support import TINY, write_dataset

from export.format.card import Card, Source, ports, write_model
from pipeline.checkpoints.store import CheckpointStore
from pipeline.common import storage
from pipeline.common.command_line import run_command
from pipeline.common.storage import Store, sha256_bytes
from pipeline.config import NetworkConfig

PROGRAMS = {
    "data": ("pipeline.data.cli", "main"),
    "eval": ("pipeline.evaluation.cli", "main"),
    "export": ("export.cli", "main"),
    "generate": ("deploy.generate", "main"),
    "launch": ("deploy.launch", "main"),
    "train": ("pipeline.train", "run"),
}
SMALL = "--size 16 --shard-images 5 --workers 1"

# The program and its arguments, and the exit code. Names in braces are in the folder of `inputs`; OUT is new there.
REFUSED: list[tuple[str, int]] = [
    ("data build nosuch {pictures} OUT", 2),
    ("data build folder {nosuch} OUT", 2),
    ("data build folder {texts} OUT", 65),
    ("data build folder {pictures} OUT --channels 2", 2),
    ("data build folder {pictures} OUT --window 9,1", 2),
    ("data build folder {pictures} OUT --crop none", 2),
    ("data build folder {pictures} OUT --crop 900,0,9,9", 65),
    ("data build folder {broken} OUT --all-frames", 65),
    ("data build {texts} OUT", 2),
    ("data build folder OUT", 2),
    ("data build folder {pictures} OUT --where color=red", 2),
    ("data build folder {pictures} OUT --val-fraction 0.000001", 2),
    ("data build folder {pictures} OUT --category x", 2),
    ("data build folder {pictures} OUT --margin 0.1", 2),
    ("data build folder {pictures} OUT --labels {texts}/notes.txt", 65),
    ("data build folder {pictures} OUT --part 2/2", 2),
    ("data build folder {pictures} OUT --part 0/2 --overwrite", 2),
    ("data build folder {pictures} OUT --metrics-port PORT", 2),
    ("data build folder {broken} OUT", 65),
    ("data build folder {broken} OUT --max-bad 1", 65),
    ("data build folder {pictures} {texts}", 2),
    ("data build folder {pictures} {texts} --overwrite", 2),
    ("data build folder {pictures} {texts}/notes.txt/x", 2),
    ("data build folder {pictures} {pictures}", 2),
    ("data build faces {pictures} OUT --model {nosuch}", 2),
    ("data build webdataset {texts} OUT", 65),
    ("data build webdataset {nosuch} OUT", 65),
    ("data build webdataset {damaged} OUT", 65),
    ("data build lsun {texts} OUT", 65),
    ("data build celeba {texts} OUT", 65),
    ("data build cifar10 {texts} OUT", 65),
    ("data build svhn {texts} OUT", 2),
    ("data build imagenet {texts} OUT", 65),
    ("data build ffhq {texts} OUT", 65),
    ("data build parquet {texts} OUT", 65),
    ("data build parquet {pictures} OUT --split train", 2),
    ("data build huggingface {nosuch} OUT", 2),
    ("data build auto {texts} OUT", 2),
    ("data build auto {nosuch} OUT", 2),
    ("data build arrays {texts}/notes.txt OUT", 65),
    ("data build tfrecord {texts} OUT", 65),
    ("data build mds {texts} OUT", 2),
    ("data build litdata {nosuch} OUT", 2),
    ("data index {nosuch} OUT", 65),
    ("data index {texts} OUT", 65),
    ("data index {shards} {texts}/notes.txt/x", 2),
    ("data index pipe:ls OUT", 2),
    ("data merge OUT", 65),
    ("data merge OUT {pictures}", 65),
    ("data merge OUT {part0}", 65),
    ("data merge OUT {part0} {part0}", 65),
    ("data merge OUT {part0} {alien}", 78),
    ("data merge {texts} {part0}", 2),
    ("data convert {nosuch} OUT --to zip", 65),
    ("data convert {damaged} OUT --to folder", 65),
    ("data convert {shards} {texts}", 2),
    ("data convert {shards} {shards}", 2),
    ("data clear {texts}", 2),
    ("data clear {shards} --yes", 2),
    ("data clear {part0}", 2),
    ("data dedup {nosuch} OUT", 65),
    ("data dedup {shards} {shards}", 2),
    ("data dedup {shards} {texts}", 2),
    ("data dedup {shards} {built}", 78),
    ("data dedup {shards} {part0}", 78),
    ("data dedup {damaged} OUT", 65),
    ("data verify {nosuch}", 65),
    ("data verify {damaged}", 65),
    ("data show {nosuch} --out OUT/sheet.png", 65),
    ("data show {damaged} --out OUT/sheet.png", 65),
    ("data show {shards} --out OUT/sheet.png --source {pictures}", 2),
    ("data show {damaged} --out OUT/sheet.png --html OUT/page.html", 65),
    ("eval swd --ckpt {nosuch} --data {shards} --out OUT", 65),
    ("eval swd --samples {damaged} --data {shards} --out OUT", 65),
    ("eval swd --samples {shards} --data {shards} --out {texts}/notes.txt/x", 2),
    ("eval ms-ssim --samples {nosuch} --out OUT", 65),
    ("eval ms-ssim --samples {texts}/notes.txt --out OUT", 2),
    ("eval fid --samples {shards} --out OUT", 2),
    ("eval kid --samples {shards} --data {nosuch} --out OUT", 65),
    ("eval is --samples {shards} --out OUT", 2),
    ("eval precision-recall --samples {shards} --data {shards} --extractor {nosuch}.pt --out OUT --cache OUT/c", 65),
    ("eval classifier --data {shards} --out OUT", 65),
    ("eval labels --ckpt {nosuch} --data {shards} --out OUT", 65),
    ("eval probe --ckpt {nosuch} --data {shards} --label x --out OUT", 65),
    ("eval nearest-class --ckpt {nosuch} --data {shards} --out OUT", 65),
    ("eval interpolate --ckpt {nosuch} --out OUT", 65),
    ("eval walk --ckpt {nosuch} --out OUT", 65),
    ("eval progress {texts} --out OUT", 65),
    ("eval arithmetic --ckpt {nosuch} --out OUT", 65),
    ("eval turn --ckpt {nosuch} --out OUT", 65),
    ("eval neighbors --ckpt {nosuch} --data {shards} --out OUT", 65),
    ("eval memorization --ckpt {nosuch} --data {shards} --out OUT", 65),
    ("eval memorization --ckpt {nosuch} --data {shards} --extractor nosuch --out OUT", 2),
    ("eval features --ckpt {nosuch} --data {shards} --out OUT", 65),
    ("eval forget --ckpt {nosuch} --out OUT", 65),
    ("eval report {texts} --out OUT/report.html", 65),
    ("export onnx --ckpt {nosuch} --out OUT", 65),
    ("export onnx --ckpt {nosuch} --out OUT --max-batch 1", 2),
    ("export trt --ckpt {nosuch} --out OUT --runtime tensorrt-rtx --timing-cache OUT/cache", 2),
    ("export trt --ckpt {nosuch} --out OUT --name x", 2),
    ("export triton --model {nosuch}.onnx --out OUT", 65),
    ("export triton --model {model}/model.onnx --out OUT", 65),
    ("export verify {nosuch}.onnx", 65),
    ("export verify {model}/model.onnx", 65),
    ("export publish --model {nosuch}.onnx --to OUT", 65),
    ("export inspect {nosuch}.onnx", 65),
    ("export explore --model {nosuch}", 65),
    ("export explore --model {nosuch} --port 70000", 2),
    ("export hub --ckpt {nosuch} --out OUT", 65),
    ("export hub --ckpt {nosuch} --out {texts}", 2),
    ("export hub --ckpt {nosuch} --out OUT --license My/own", 2),
    ("export bench --out OUT", 2),
    ("export bench --out OUT --ckpt {nosuch} --quick", 65),
    ("export bench --out OUT --model {nosuch}.onnx --quick", 65),
    ("generate --model {nosuch}.onnx --count 5 --out OUT", 65),
    ("generate --model {model}/model.onnx --count 5 --out OUT", 65),
    ("generate --model {nosuch} --count 5 --out OUT --part 3/3", 2),
    ("generate --model {nosuch} --count 5 --out OUT --metrics-port PORT", 2),
    ("generate --model {nosuch} --count 5 --out {texts}/notes.txt/x", 2),
    ("generate --model {nosuch}.onnx --count 5 --out OUT --rebuild", 2),
    ("generate merge OUT", 65),
    ("launch {nosuch}", 2),
    ("launch --mixed-precision fp8 true", 2),
    ("train --data {shards} --out OUT --preset nosuch", 2),
    ("train --out OUT", 2),
    ("train --data {shards} --out OUT recipe.bach=1", 2),
    ("train --data {nosuch} --out OUT TINY", 65),
    ("train --data {shards} --out OUT TINY network.channels=1", 78),
    ("train --data {shards} --out OUT TINY --metrics-port PORT", 2),
    ("train --data {shards} --out OUT TINY --resume never --mirror {mirror}", 78),
    ("train --data {shards} --out OUT TINY --mirror {mirror}", 65),
    ("train --data {damaged} --out OUT TINY", 65),
    ("train --data {shards} --out {texts}/notes.txt/x TINY", 2),
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the commands are pointed at."""
    forkserver.ensure_running()  # it is this process's, and has files until this process ends
    root = tmp_path_factory.mktemp("inputs")
    make_folder(root / "pictures", 12)
    (root / "texts").mkdir()
    (root / "texts" / "notes.txt").write_text("years of work")
    (root / "broken").mkdir()
    (root / "broken" / "a.png").write_bytes(b"x")
    write_dataset(root / "shards", images=32)
    for path in write_dataset(root / "damaged", images=32).glob("*.tar"):
        path.write_bytes(path.read_bytes()[:-5000])
    network = NetworkConfig(width=4, image_size=32)
    z, image = ports(network, "uint8")
    source = Source(reference="x", sha256="0" * 64, kind="ema")
    card = {"precision": "fp32", "max_batch": 4, "input": z, "output": image, "network": network, "source": source}
    hashed = {"sha256": sha256_bytes(b"no graph"), "bytes": 8}
    write_model(str(root / "model"), Card(file="model.onnx", **hashed, **card, versions={}), b"no graph")
    engine: dict[str, Any] = {
        "runtime": "tensorrt",
        "version": "10",
        "gpu": "x",
        "compute_capability": "9.0",
        "driver": "12.0",
    }
    engine |= {"system": "Linux-x86_64", "profiles": [[1, 1, 1], [1, 4, 4]], "optimization_level": 3}
    engine |= {"onnx": "model.onnx", "onnx_sha256": "0" * 64}
    write_model(
        str(root / "engine"), Card(file="engine.plan", **hashed, **card, versions={}, engine=engine), b"no graph"
    )
    CheckpointStore(Store(root / "mirror")).save(64, {"metrics.jsonl": b""}, {"data": {"fingerprint": "another"}})
    for name, options in (("part0", "--part 0/2"), ("alien", "--seed 1 --part 0/2"), ("built", "")):
        assert run(f"data build folder {root}/pictures {root}/{name} {SMALL} {options}") == 0
    return root


@pytest.fixture(autouse=True)
def outside(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep temporary files and caches in sight, and put back what a command changes in its process."""
    (inputs / "temporary").mkdir(exist_ok=True)
    monkeypatch.setattr(tempfile, "tempdir", str(inputs / "temporary"))
    monkeypatch.setenv("DCGAN_CACHE", str(inputs / "temporary" / "cache"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(inputs.with_name("torch")))  # torch's own, kept from run to run
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    signals = {number: signal.getsignal(number) for number in numbers}
    blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
    logger = logging.getLogger("pipeline")
    handlers, level = list(logger.handlers), logger.level
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)
    for number, handler in signals.items():
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def run(line: str) -> int:
    """Run a command line in this process and return its exit code."""
    program, *arguments = line.split()
    module, entry = PROGRAMS[program]
    before = sys.argv
    sys.argv = [f"dcgan-{program}", *arguments]
    try:
        getattr(import_module(module), entry)()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before
    return 0


def paths(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


@pytest.mark.parametrize(("line", "code"), REFUSED)
def test_a_refusal_leaves_nothing(inputs: Path, line: str, code: int, capfd: pytest.CaptureFixture[str]) -> None:
    names = ("nosuch", *(path.name for path in inputs.iterdir()))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        line = line.replace("PORT", str(taken.getsockname()[1])).replace("TINY", " ".join(TINY))
        line = line.replace("OUT", str(inputs / "new" / "out")).format(**{name: inputs / name for name in names})
        before = paths(inputs)
        found = run(line)
    assert found == code, capfd.readouterr().err
    assert paths(inputs) == before


def test_every_command_is_in_the_table() -> None:
    def commands(program: str, app: typer.Typer) -> Iterator[str]:
        for group in app.registered_groups:
            assert group.typer_instance is not None
            yield from commands(program, group.typer_instance)
        for command in app.registered_commands:
            assert command.callback is not None
            yield f"{program} {command.name or command.callback.__name__.replace('_', '-')}"

    several = [program for program in PROGRAMS if program not in ("launch", "train")]  # those have only one command
    apps = {program: import_module(PROGRAMS[program][0]).app for program in several}
    named = {name for program, app in apps.items() for name in commands(program, app)}
    assert len(named) > 25
    assert [name for name in named if not any(f"{line} ".startswith(f"{name} ") for line, _ in REFUSED)] == []


# What writes, and how many times it gets to sync a file or folder before the blow.
WRITERS = [
    f"data build folder {{pictures}} OUT {SMALL}",
    "data merge OUT {part0} {part1}",
    "data show {shards} --out OUT/sheet.png",
    "export publish --model {model}/model.onnx --to OUT",
]


@pytest.mark.parametrize("blow", ["ENOSPC", "SIGTERM", "SIGINT"])
@pytest.mark.parametrize("line", WRITERS)
def test_a_blow_in_any_write_leaves_nothing_half_written(
    inputs: Path, tmp_path: Path, line: str, blow: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "{part1}" in line and not (inputs / "part1").exists():
        assert run(f"data build folder {inputs}/pictures {inputs}/part1 {SMALL} --part 1/2") == 0
    names = {path.name: path for path in inputs.iterdir()}
    before = paths(inputs)
    fsync: Callable[[int], None] = os.fsync
    for survived in range(6):
        out = tmp_path / str(survived) / "new" / "out"
        left = [survived]

        def sync(handle: int, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == -1:
                if blow == "ENOSPC":
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.kill(os.getpid(), signal.Signals[blow])
            fsync(handle)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", sync)
            code = run(line.replace("OUT", str(out)).format(**names))
        assert code == (0 if left[0] >= 0 else {"ENOSPC": 75, "SIGTERM": 143, "SIGINT": 130}[blow])
        left_over = {path.name for path in tmp_path.rglob("*") if path.name.startswith(".") and path.name != ".build"}
        assert left_over == set()
        if survived < 4:  # the folders, and the first file in them
            assert not (tmp_path / str(survived)).exists()
    assert paths(inputs) == before


def test_ctrl_c_says_what_to_do(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    app = typer.Typer()

    @app.command()
    def command() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises(SystemExit) as end:
        run_command(app)
    assert end.value.code == 130
    assert capfd.readouterr().err == "interrupted: run the same command again to resume\n"


def test_sigterm_is_never_taken_for_a_bad_picture(capfd: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        for _ in range(2):
            with contextlib.suppress(Exception):  # as the decoder and the workers handle bad pictures
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as end:
        run_command(command)
    assert end.value.code == 143
    assert capfd.readouterr().err.startswith("stopped: ")


def test_a_failing_download_leaves_no_lock_and_no_folder(tmp_path: Path) -> None:
    from pipeline.common.errors import DataError
    from pipeline.data.dataset import open_dataset
    from pipeline.data.loading.shard_cache import ShardCache

    dataset = open_dataset(write_dataset(tmp_path / "shards", images=8))
    cache = ShardCache(tmp_path / "new" / "cache", 1 << 20)
    with pytest.raises(DataError, match="no such file"):
        cache.open(dataset.at(Store("memory://nowhere")), dataset.shards[0])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("what", ["model", "checkpoint", "result", "model repository"])
def test_files_that_belong_together_do_not_stay_without_their_last(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """On a full disk, the room that half of them took is free again; what was there before stays."""
    from export.builders.triton import export_repository
    from export.format.card import copy_model
    from pipeline.evaluation.results import Result

    def make() -> None:
        if what == "model":
            copy_model(f"{inputs}/model/model.onnx", f"{tmp_path}/new/folder")
        elif what == "checkpoint":
            CheckpointStore(Store(tmp_path / "new")).save(64, {"first": b"1", "second": b"2"}, {})
        elif what == "result":
            result = Result("swd", tmp_path / "new" / "out", {})
            there = paths(tmp_path)
            result.picture(make_picture(0), "a picture")
            assert paths(tmp_path) == there
            result.write({})
        else:
            export_repository(f"{inputs}/engine/engine.plan", tmp_path / "new")

    write = Store.write

    def full(store: Store, name: str, data: Any) -> None:
        if name.endswith((".json", ".pbtxt")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
        write(store, name, data)

    before = paths(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "write", full)
        with pytest.raises(OSError, match="No space left"):
            make()
    assert paths(tmp_path) == before
    make()
    made = paths(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "write", full)
        with pytest.raises(OSError, match="No space left"):
            make()
    assert paths(tmp_path) == (made - {"new/checkpoints/000000000064/state.json"})


def test_a_run_directory_is_withdrawn_until_a_run_comes_of_it(tmp_path: Path) -> None:
    from pipeline.training.run_directory import RunDirectory

    (tmp_path / "mine").mkdir()
    for out in (tmp_path / "new" / "run", tmp_path / "mine"):
        before = paths(tmp_path)
        with RunDirectory(out) as run:
            run.restore_metrics([])
            run.write_config({})
            storage.write_atomic(out / "samples" / "0.png", b"")
            logging.getLogger("pipeline").warning("refused")
            assert {"log.txt", ".lock", "metrics.jsonl", "config.json", "samples"} < paths(out)
        assert paths(tmp_path) == before
    with RunDirectory(tmp_path / "saved") as run:
        run.write_config({})
        CheckpointStore(Store(tmp_path / "saved")).save(64, {}, {})
    assert {".lock", "config.json", "checkpoints"} <= paths(tmp_path / "saved")
    with RunDirectory(tmp_path / "run") as run:
        run.write_config({})
        run.record(64, {"loss_d": 1.0})
    assert {".lock", "config.json"} <= paths(tmp_path / "run")
    with RunDirectory(tmp_path / "run"):
        pass
    assert json.loads((tmp_path / "run" / "config.json").read_text())["starts"] == 1
    assert (tmp_path / "run" / ".lock").exists()
