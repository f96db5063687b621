"""A run on the tars of others, where they lie: named on the command line, indexed by the run, killed and resumed."""

import json
import logging
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
import psutil
import pytest
import webdataset as wds
from accelerate import Accelerator
from picture_files import make_picture
from storage_servers import NGINX, FaultyProxy, nginx
from support import ROOT, TINY, Trainer
from training_cases import ENVIRONMENT, SCHEDULE, hashes, wait_for_lines

from pipeline.common.imaging import encode
from pipeline.common.storage import Store
from pipeline.config import load_config
from pipeline.data.dataset import open_dataset
from pipeline.data.index.indexer import make_index
from pipeline.data.loading.loader import MIX_INDEXED, run_loader
from pipeline.data.loading.shuffle import image_ids
from pipeline.data.shard_reader import iterate
from pipeline.training.evaluator import Evaluator
from pipeline.training.run_log import RunLog

PROGRAMS = Path(sys.executable).parent


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 pictures of many sizes in four tars, as webdataset writes them."""
    folder = tmp_path_factory.mktemp("tars")
    for tar in range(4):
        with (folder / f"lsun-{tar:06d}.tar").open("wb") as file, wds.TarWriter(file) as writer:
            for number in range(50 * tar, 50 * tar + 50):
                picture = make_picture(number, 40 + number % 60, 33 + number % 41)
                form = "png" if number % 3 else "jpg"
                writer.write({"__key__": f"{number:06d}", form: encode(picture, form), "cls": tar})  # type: ignore[arg-type]
    return folder


def test_a_run_indexes_the_tars_that_it_is_given(tars: Path, tmp_path: Path, trainer: Trainer) -> None:
    out, spec = tmp_path / "run", f"{tars}/lsun-{{000000..000003}}.tar"
    short = ("schedule.total_images=32", "schedule.evaluate_samples=64")
    done = trainer(spec, out, *short)
    assert done.returncode == 0, done.stderr
    dataset = open_dataset(out / "index")
    assert (dataset.encoding, dataset.images, dataset.image_size) == ("tar", 200, 32)
    stored = json.loads((out / "config.json").read_text())["dataset"]
    assert stored["fingerprint"] == dataset.fingerprint()
    assert stored["location"] == "index"
    assert (out / ".data").read_text().strip() == str((out / "index").resolve())
    assert f"indexing 4 tars into {out}/index, about 0 s" in done.stderr


def test_the_order_is_mixed_and_the_evaluation_draws_from_all_of_it(tars: Path, tmp_path: Path) -> None:
    """The tars are sorted by class: the set's first images would be of one class."""
    config = load_config(overrides=[*TINY, "schedule.evaluate_samples=64"])
    paths = sorted(map(str, tars.glob("*.tar")))
    dataset = make_index(paths, str(tmp_path / "index"), size=32, channels=3, workers=1)
    assert dataset is not None
    ids = image_ids(dataset, 0, 8, 0, 64, mix=MIX_INDEXED)
    with run_loader(config, dataset, start=0, rank=0, world_size=1) as loader:
        assert loader.ids().tolist() == ids[:16].tolist()
    images = np.concatenate(list(iterate(dataset)))
    reals = Evaluator(config, dataset, tmp_path, Accelerator(cpu=True))._reals()
    assert np.array_equal(reals, images[ids])
    assert np.bincount(ids // 50, minlength=4).min() > 8


def test_a_run_that_waits_for_decoding_says_so_once_with_the_way_out(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    for encoding in ("tar", "packed"):
        run_log = RunLog(load_config(), None, None)
        data = {"encoding": encoding, "source": {"spec": "tars/lsun-{000000..000003}.tar"}}
        run_log.begin({"config": load_config().model_dump(), "dataset": data}, 0, Accelerator(cpu=True))
        for wait in (0.5, 0.1, 0.3, 0.6, 0.9, 0.9):  # a share of the window; the first may be a download
            run_log._say_if_held_back(100.0, wait)
    (said,) = (record.getMessage() for record in caplog.records)
    assert "100 images/s" in said
    assert "reach 250" in said
    assert "dcgan-data build webdataset 'tars/lsun-{000000..000003}.tar' OUT --size 64 --channels 3" in said


# Below: minutes. What follows runs with `make test-long`.


@pytest.fixture
def served(tars: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[str, dict[str, str]]]:
    """A specification of the tars in one of the places where they may lie, and the environment that reads it."""
    with ExitStack() as stack:
        cache = {"DCGAN_CACHE": str(tmp_path / "cache")}
        if request.param == "braces":
            yield f"{tars}/lsun-{{000000..000003}}.tar", {}
        elif request.param == "folder":
            yield str(tars), {}
        elif request.param == "http":
            if not NGINX:
                pytest.skip("nginx is not installed; `make system` installs it")
            port = stack.enter_context(nginx(tars, tmp_path / "nginx"))
            proxy = FaultyProxy(port)
            stack.callback(proxy.stop)
            yield f"{proxy.url}/lsun-{{000000..000003}}.tar", cache
            assert not [request for request in proxy.requests if "dataset.json" in request and "GET" not in request]
        else:
            from moto.server import ThreadedMotoServer

            server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
            server.start()
            stack.callback(server.stop)
            url = "http://127.0.0.1:{1}".format(*server.get_host_and_port())
            urlopen(Request(f"{url}/moto-api/reset", method="POST")).close()
            access = {
                "AWS_ENDPOINT_URL": url,
                "AWS_ACCESS_KEY_ID": "key",
                "AWS_SECRET_ACCESS_KEY": "secret",
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_EC2_METADATA_DISABLED": "true",
            }
            with pytest.MonkeyPatch.context() as patch:
                for name, value in access.items():
                    patch.setenv(name, value)
                from s3fs import S3FileSystem

                S3FileSystem.clear_instance_cache()
                S3FileSystem().mkdir("bucket")
                for path in tars.glob("*.tar"):
                    Store("s3://bucket/tars").write(path.name, path.read_bytes())
                S3FileSystem.clear_instance_cache()
            yield "s3://bucket/tars/lsun-{000000..000003}.tar", {**access, **cache}


def start(spec: str, out: Path, processes: int, environment: dict[str, str]) -> subprocess.Popen[str]:
    """Begin a run in a process group of its own."""
    command = [str(PROGRAMS / "dcgan-launch"), "--processes", str(processes), "train"]
    return subprocess.Popen(
        [*command, "--data", spec, "--out", str(out), *TINY, *SCHEDULE],
        cwd=ROOT,
        env={**ENVIRONMENT, **environment},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def kill_all(process: subprocess.Popen[str]) -> None:
    """Kill a launcher and its ranks at once. A rank that outlived it would save, and its averages are not those."""
    launcher = psutil.Process(process.pid)
    ranks = launcher.children(recursive=True)
    launcher.suspend()
    for one in (*ranks, launcher):
        one.kill()
    process.communicate()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("served", ["braces", "folder", "http", "s3"], indirect=True)
def test_killed_and_resumed_equals_uninterrupted(
    served: tuple[str, dict[str, str]], tmp_path: Path, processes: int
) -> None:
    spec, environment = served
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start(spec, whole, processes, environment)
    said = process.communicate(timeout=240)[1]
    assert process.returncode == 0, said
    process = start(spec, killed, processes, environment)
    wait_for_lines(killed, 3)
    kill_all(process)
    before = (killed / "index" / "dataset.json").stat()
    process = start(spec, killed, processes, environment)
    said = process.communicate(timeout=240)[1]
    assert process.returncode == 0, said
    assert "resuming at image" in said
    assert (killed / "index" / "dataset.json").stat() == before, "the index is used again"
    assert hashes(killed, 256) == hashes(whole, 256)
    assert (killed / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


@pytest.mark.slow
def test_the_images_are_those_of_the_set_that_a_build_makes(tars: Path, tmp_path: Path, trainer: Trainer) -> None:
    spec = f"{tars}/lsun-{{000000..000003}}.tar"
    done = trainer(spec, tmp_path / "run", "schedule.total_images=16")
    assert done.returncode == 0, done.stderr
    command = shlex.split(f"{PROGRAMS}/dcgan-data build webdataset '{spec}' {tmp_path}/built --size 32")
    subprocess.run(command, check=True, cwd=ROOT, env=ENVIRONMENT)

    def images(folder: Path) -> list[bytes]:
        return sorted(image.tobytes() for image in np.concatenate(list(iterate(open_dataset(folder)))))

    assert images(tmp_path / "run" / "index") == images(tmp_path / "built")


@pytest.mark.slow
def test_a_tar_that_changed_under_a_run_is_refused_by_name(tars: Path, tmp_path: Path, trainer: Trainer) -> None:
    folder = tmp_path / "tars"
    folder.mkdir()
    for path in tars.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    done = trainer(str(folder), tmp_path / "run", "schedule.total_images=32")
    assert done.returncode == 0, done.stderr
    with (folder / "lsun-000002.tar").open("ab") as file:
        file.write(bytes(10240))
    done = trainer(str(folder), tmp_path / "run", "schedule.total_images=512")
    assert done.returncode == 65, done.stderr
    assert "lsun-000002.tar" in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
    (folder / "lsun-000002.tar").unlink()
    done = trainer(str(folder), tmp_path / "run", "schedule.total_images=512")
    assert done.returncode == 78, done.stderr
