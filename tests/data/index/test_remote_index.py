"""Tars in stores are indexed by ranges, or fetched where the store knows none; an index can lie in a store itself."""

import functools
import hashlib
import http.server
import os
import re
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from tar_making import PICTURES, make_tar, write_tars

from pipeline.common.errors import DataError
from pipeline.common.partition import Partition
from pipeline.common.storage import Store
from pipeline.data.dataset import Dataset, open_dataset
from pipeline.data.index import reader
from pipeline.data.index.indexer import make_index, merge
from pipeline.data.index.reader import Pace
from pipeline.data.shard_reader import iterate


@dataclass
class Server:
    """An http server over a folder."""

    url: str
    ranges: bool = True
    asked: list[str] = field(default_factory=list)
    sent: int = 0


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    state = Server("")

    class Handler(http.server.SimpleHTTPRequestHandler):
        """Sends files with ETags, and the ranges that are asked for unless told otherwise."""

        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            state.asked.append(self.path)
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            path = Path(self.directory) / self.path.lstrip("/")
            if not path.is_file():
                self.send_error(404)
                return
            data = path.read_bytes()
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            piece = data
            if wanted is not None and state.ranges:
                piece = data[int(wanted[1]) : int(wanted[2]) + 1]
            self.send_response(206 if piece is not data else 200)
            self.send_header("Content-Length", str(len(piece)))
            self.send_header("ETag", f'"{hashlib.md5(data).hexdigest()}"')
            self.end_headers()
            if body:
                state.sent += len(piece)
                self.wfile.write(piece)

        def log_message(self, *arguments: object) -> None:
            pass

    monkeypatch.setenv("DCGAN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "www").mkdir()
    handler = functools.partial(Handler, directory=str(tmp_path / "www"))
    listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    state.url = f"http://127.0.0.1:{listener.server_address[1]}"
    thread = threading.Thread(target=listener.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield state
    listener.shutdown()
    listener.server_close()
    thread.join()


def index(tars: list[str], out: Path | str) -> Dataset:
    dataset = make_index(tars, out, size=16, workers=1)
    assert dataset is not None
    return dataset


@pytest.mark.parametrize("ranges", [True, False])
def test_tars_behind_http_are_indexed_as_on_a_disk(tmp_path: Path, server: Server, ranges: bool) -> None:
    server.ranges = ranges
    tars = write_tars(tmp_path / "www", 3, 40)
    here = index(tars, tmp_path / "here")
    there = index([f"{server.url}/{Path(tar).name}" for tar in tars], tmp_path / "there")
    assert (there.images, there.labels, there.index) == (here.images, here.labels, here.index)
    assert there.fingerprint() == here.fingerprint()
    content = Path(tars[1]).read_bytes()
    assert there.shards[1].etag == f'"{hashlib.md5(content).hexdigest()}"'
    # One request for the first byte; then some for all headers, or one for the tar.
    assert len(server.asked) <= (5 if ranges else 2) * len(tars)
    ours, theirs = (np.concatenate(list(iterate(dataset))) for dataset in (here, there))
    np.testing.assert_array_equal(ours, theirs)


def test_only_headers_of_large_images_are_fetched(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader.StoreTar, "pace", Pace(block=32 << 10, window=4 << 10, sparse=64 << 10))
    members = [(f"{row:03d}.jpg", PICTURES[0] + bytes(200_000)) for row in range(30)]
    (tmp_path / "www" / "a.tar").write_bytes(make_tar(members))
    dataset = index([f"{server.url}/a.tar"], tmp_path / "out")
    assert dataset.images == 30
    assert server.sent < 30 * 200_000 // 4


def test_a_tar_that_is_not_there_is_named(tmp_path: Path, server: Server) -> None:
    with pytest.raises(DataError, match=rf"{server.url}/no\.tar: the store has no such file"):
        index([f"{server.url}/no.tar"], tmp_path / "out")


def test_a_stop_amid_a_request_is_no_fault_of_the_store(
    dcgan_data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tar,) = write_tars(tmp_path / "tars", 1, 4)

    def stop(store: Store, name: str, *_: object) -> None:
        store._retry(name, lambda: os.kill(os.getpid(), signal.SIGTERM))

    monkeypatch.setattr(Store, "write", stop)
    done = dcgan_data("index", tar, tmp_path / "out", "--size", 16, "--workers", 1)
    assert (done.code, "stopped: " in done.err, "retrying" in done.err) == (143, True, False), done.err


def test_an_index_in_a_store_is_made_in_parts_and_merged(tmp_path: Path) -> None:
    tars = write_tars(tmp_path / "tars", 3, 4)
    here = index(tars, tmp_path / "here")
    memory = fsspec.filesystem("memory")
    try:
        for part in range(2):
            assert make_index(tars, f"memory://parts/{part}", size=16, workers=1, part=Partition(part, 2)) is None
        there = merge("memory://parts/whole", ["memory://parts/0", "memory://parts/1"])
        assert there == here
        assert open_dataset("memory://parts/whole").columns.key.slice(0, 1) == here.columns.key.slice(0, 1)
        assert sorted(memory.ls("/parts/whole", detail=False)) == [
            "/parts/whole/dataset.json",
            "/parts/whole/index.npz",
        ]
    finally:
        memory.rm("/parts", recursive=True)


def test_paths_and_urls_beside_dataset_json(tmp_path: Path) -> None:
    """An index that travels with its tars names them from where it lies."""
    tars = write_tars(tmp_path / "set" / "tars", 1, 2)
    dataset = index(tars, tmp_path / "set" / "index")
    for location in ("../tars/00000.tar", str(tmp_path / "set" / "tars" / "00000.tar")):
        shard = dataset.shards[0].model_copy(update={"location": location})
        store, name = dataset.place(shard)
        assert Path(store.path(name)) == tmp_path / "set" / "tars" / "00000.tar"
    away = dataset.at(Store("memory://bucket/set/index"))
    store, name = away.place(shard.model_copy(update={"location": "../tars/00000.tar"}))
    assert store.path(name) == "memory://bucket/set/tars/00000.tar"
