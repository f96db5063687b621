"""Pictures and tars are read from an http server as from a disk, and its faults become one line each."""

import functools
import http.server
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import fsspec
import numpy as np
import pytest
from picture_files import make_folder, make_picture
from storage_servers import gcs_server

from pipeline.common.imaging import encode
from pipeline.common.storage import Store
from pipeline.data.dataset import open_dataset
from pipeline.data.loading.loader import Loader

SMALL = ("--size", 16, "--workers", 1)


@dataclass
class Server:
    """An http server over a folder, which can be told to fail."""

    url: str
    forbidden: set[str]
    cut: set[str]
    asked: list[str]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    forbidden: set[str] = set()
    cut: set[str] = set()
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        """Lists folders and sends whole files, whatever range is asked for."""

        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            asked.append(self.path)
            name = self.path.rpartition("/")[2]
            if name in forbidden:
                self.send_error(403, "Forbidden")
            elif name in cut:
                data = (Path(self.directory) / self.path.lstrip("/")).read_bytes()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2])
                self.close_connection = True
            else:
                super().do_GET()

        def log_message(self, *arguments: object) -> None:
            pass

    (tmp_path / "www").mkdir()
    listener = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(tmp_path / "www"))
    )
    thread = threading.Thread(target=listener.serve_forever, daemon=True)
    thread.start()
    yield Server(f"http://127.0.0.1:{listener.server_address[1]}", forbidden, cut, asked)
    listener.shutdown()
    listener.server_close()
    thread.join()


def test_a_remote_folder_gives_the_bytes_of_the_local_one(dcgan_data: Any, tmp_path: Path, server: Server) -> None:
    src = make_folder(tmp_path / "www" / "pictures", 12, classes=("cat", "dog"))
    remote = dcgan_data("build", "folder", f"{server.url}/pictures", tmp_path / "remote", "--size", 16, "--workers", 1)
    assert remote.code == 0, remote.err
    assert dcgan_data("build", "folder", src, tmp_path / "local", "--size", 16).code == 0
    assert open_dataset(tmp_path / "remote").fingerprint() == open_dataset(tmp_path / "local").fingerprint()
    assert open_dataset(tmp_path / "remote").labels == {"class": "str"}


AWKWARD = ("写真", "a b", "100%25", "c#d?e&f=g+h", "naïve;x")


def test_names_in_any_script_are_the_same_over_http(dcgan_data: Any, tmp_path: Path, server: Server) -> None:
    src = make_folder(tmp_path / "www" / "pictures", 5, classes=AWKWARD)
    for name in AWKWARD:
        (src / name / f"{name}.png").write_bytes(encode(make_picture(len(name), 32, 32), "png"))
    (tmp_path / "labels.csv").write_text("file,age\n" + "".join(f"{name}.png,{len(name)}\n" for name in AWKWARD))
    for number, labels in enumerate(("folders", "none", tmp_path / "labels.csv")):
        for place, where in (("far", f"{server.url}/pictures"), ("near", src)):
            out = tmp_path / f"{place}{number}"
            done = dcgan_data("build", "folder", where, out, *SMALL, "--labels", labels, "--max-bad", 0.6)
            assert done.code == 0, (place, done.err)
        far, near = open_dataset(tmp_path / f"far{number}"), open_dataset(tmp_path / f"near{number}")
        assert far.fingerprint() == near.fingerprint()
        assert far.labels == near.labels
        assert sorted(far.refused.examples) == sorted(near.refused.examples)


def test_tars_with_such_names_too(dcgan_data: Any, tmp_path: Path, server: Server) -> None:
    for name in AWKWARD:
        folder = make_folder(tmp_path / "pictures" / name, 3)
        (tmp_path / "www" / "tars").mkdir(exist_ok=True)
        with tarfile.open(tmp_path / "www" / "tars" / f"{name}.tar", "w") as tar:
            for path in sorted(folder.iterdir()):
                tar.add(path, path.name)
    for source in ("webdataset", "imagenet"):
        for place, where in (("far", f"{server.url}/tars"), ("near", tmp_path / "www" / "tars")):
            done = dcgan_data("build", source, where, tmp_path / f"{source}-{place}", *SMALL)
            assert done.code == 0, (place, done.err)
        far, near = (open_dataset(tmp_path / f"{source}-{place}") for place in ("far", "near"))
        assert far.fingerprint() == near.fingerprint()
    listed = [path for path in server.asked if path.rstrip("/").endswith("tars")]
    assert len(listed) <= 4, "the folder is listed once a build, not once a picture"


def test_a_file_url_is_a_path(dcgan_data: Any, tmp_path: Path) -> None:
    src = make_folder(tmp_path / "src", 6, classes=("cat", "dog"))
    assert dcgan_data("build", "folder", f"file://{src}", f"file://{tmp_path}/far", *SMALL).code == 0
    assert dcgan_data("build", "folder", src, tmp_path / "near", *SMALL).code == 0
    assert open_dataset(tmp_path / "far").fingerprint() == open_dataset(tmp_path / "near").fingerprint()


@pytest.mark.parametrize("encoding", ["packed", "png"])
def test_a_remote_data_set_is_verified_shown_and_built_from(
    dcgan_data: Any, tmp_path: Path, server: Server, encoding: str
) -> None:
    src = make_folder(tmp_path / "src", 10)
    options = ["--size", 16, "--encoding", encoding, "--workers", 1]
    assert dcgan_data("build", "folder", src, tmp_path / "www" / "set", *options).code == 0
    url = f"{server.url}/set"
    assert dcgan_data("verify", url).code == 0
    assert dcgan_data("show", url, "--sheet", tmp_path / "sheet.png").code == 0
    assert dcgan_data("build", "webdataset", url, tmp_path / "again", *options).code == 0
    again, first = open_dataset(tmp_path / "again"), open_dataset(tmp_path / "www" / "set")
    assert again.fingerprint() == first.fingerprint()


def test_faults_of_the_server_are_one_line(
    dcgan_data: Any, tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.common.storage.PAUSES_SECONDS", (0.02, 0.02))
    make_folder(tmp_path / "www" / "pictures", 6)
    command = ["build", "folder", f"{server.url}/pictures", tmp_path / "out", "--size", 16, "--workers", 1]
    server.forbidden.add("0003.png")
    done = dcgan_data(*command)
    assert done.code == 65
    assert "0003.png: the store refuses access (403" in done.err
    server.forbidden.clear()
    server.cut.add("0003.png")
    done = dcgan_data(*command)
    assert done.code == 75
    assert "0003.png: the store failed" in done.err
    assert not (tmp_path / "out" / "dataset.json").exists()
    server.cut.clear()
    assert dcgan_data(*command).code == 0
    assert open_dataset(tmp_path / "out").images == 6
    missing = dcgan_data("build", "folder", f"{server.url}/nothing-here", tmp_path / "other")
    assert missing.code == 65
    assert not missing.out


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket of an S3-compatible server."""
    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem

    store = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    store.start()
    url = "http://127.0.0.1:{1}".format(*store.get_host_and_port())
    urlopen(Request(f"{url}/moto-api/reset", method="POST")).close()  # what another test has left in this process
    for key, value in {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(key, value)
    S3FileSystem.clear_instance_cache()
    S3FileSystem().mkdir("bucket")
    yield "s3://bucket"
    S3FileSystem.clear_instance_cache()
    store.stop()


@pytest.fixture
def gs(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket of a GCS-compatible server."""
    with gcs_server("bucket") as port:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("NO_GCE_CHECK", "true")  # no looking for a cloud's own credentials
        yield "gs://bucket"
    fsspec.get_filesystem_class("gs").clear_instance_cache()


@pytest.fixture(params=["s3", "gs"])
def bucket(request: pytest.FixtureRequest) -> str:
    # An earlier test's fork server keeps that test's environment; a command of its own starts with the right one.
    forkserver._forkserver._stop()  # type: ignore[attr-defined]
    return str(request.getfixturevalue(request.param))


def test_parts_are_built_from_one_bucket_into_another_and_merged(dcgan_data: Any, tmp_path: Path, bucket: str) -> None:
    src = make_folder(tmp_path / "src", 24, classes=("cat", "dog"))
    for file in src.rglob("*.png"):
        Store(f"{bucket}/in").write(str(file.relative_to(src)), file.read_bytes())
    options = ["--size", 16, "--shard-images", 6, "--workers", 1]
    for part in (1, 0):
        done = dcgan_data("build", "folder", f"{bucket}/in", f"{bucket}/out", *options, "--part", f"{part}/2")
        assert done.code == 0, done.err
    again = dcgan_data("build", "folder", f"{bucket}/in", f"{bucket}/out", *options, "--part", "0/2")
    assert again.code == 0
    assert dcgan_data("merge", f"{bucket}/out").code == 0
    assert dcgan_data("verify", f"{bucket}/out").code == 0
    assert not Store(f"{bucket}/out").names(".build")
    assert dcgan_data("build", "folder", src, tmp_path / "local", *options).code == 0
    local = open_dataset(tmp_path / "local")
    assert open_dataset(f"{bucket}/out").fingerprint() == local.fingerprint()
    run: dict[str, Any] = {"seed": 1, "streams": 2, "batch": 8, "resident_limit": 0}
    with (
        Loader(open_dataset(f"{bucket}/out"), cache_dir=tmp_path / "cache", **run) as far,
        Loader(open_dataset(tmp_path / "local"), **run) as near,
    ):
        for _ in range(9):
            assert np.array_equal(far.next_batch(), near.next_batch())
    whole = dcgan_data("build", "folder", f"{bucket}/in", f"{bucket}/out", *options)
    assert (whole.code, "already built" in whole.out) == (0, True)
    other = dcgan_data("build", "folder", f"{bucket}/in", f"{bucket}/out", *options, "--seed", 1)
    assert other.code == 78
    assert (
        dcgan_data("build", "folder", f"{bucket}/in", f"{bucket}/out", *options, "--seed", 1, "--overwrite").code == 0
    )
    assert open_dataset(f"{bucket}/out").fingerprint() != local.fingerprint()
