"""Reading from and writing to stores must survive what passes, name what does not, and never accept half a file."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.request import Request, urlopen

import fsspec
import pytest
from storage_servers import NGINX, FaultyProxy, gcs_server, nginx, python_server

from pipeline.common import storage
from pipeline.common.errors import DataError, TryAgainError, UnavailableError, UsageError
from pipeline.common.storage import Store

CONTENT = bytes(range(256)) * 4000  # a megabyte


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PAUSES_SECONDS", (0.05, 0.1, 0.2, 0.4))
    monkeypatch.setattr(storage, "TIMEOUT_SECONDS", 1.0)


@pytest.fixture(
    params=[
        pytest.param(
            "nginx", marks=pytest.mark.skipif(not NGINX, reason="nginx is not installed; `make system` installs it")
        ),
        "no ranges",
    ]
)
def web(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FaultyProxy]:
    root = tmp_path / "root"
    (root / "set").mkdir(parents=True)
    (root / "set" / "a.tar").write_bytes(CONTENT)
    (root / "set" / "empty").touch()
    server = nginx(root, tmp_path / "nginx") if request.param == "nginx" else python_server(root)
    with server as port:
        proxy = FaultyProxy(port)
        yield proxy
        proxy.stop()


@pytest.fixture(scope="module")
def moto() -> Iterator[int]:
    """The port of an S3-compatible server."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


@pytest.fixture
def s3(moto: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """An S3-compatible server with one empty bucket, behind the proxy."""
    from s3fs import S3FileSystem

    proxy = FaultyProxy(moto)
    urlopen(Request(f"{proxy.url}/moto-api/reset", method="POST")).close()
    for key, value in {
        "AWS_ENDPOINT_URL": proxy.url,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(key, value)
    with ExitStack() as stack:
        stack.callback(proxy.stop)
        stack.callback(S3FileSystem.clear_instance_cache)
        S3FileSystem.clear_instance_cache()
        S3FileSystem().mkdir("bucket")
        proxy.requests.clear()
        yield proxy


@pytest.fixture
def gs(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """A GCS-compatible server with one empty bucket, behind the proxy."""
    with gcs_server("bucket") as port:
        proxy = FaultyProxy(port)
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        monkeypatch.setenv("NO_GCE_CHECK", "true")  # no looking for a cloud's own credentials
        Store("gs://bucket")
        clear: Callable[[], None] = fsspec.get_filesystem_class("gs").clear_instance_cache
        clear()
        yield proxy
        clear()
        proxy.stop()


def test_http_reads_ranges_and_lists(web: FaultyProxy) -> None:
    store = Store(f"{web.url}/set")
    assert store.read("a.tar") == CONTENT
    assert store.read_range("a.tar", 1000, 5000) == CONTENT[1000:6000]
    assert store.read("empty") == b""
    assert store.exists("a.tar")
    assert store.exists("empty")
    assert not store.exists("b.tar")
    assert store.names() == ["a.tar", "empty"]
    with pytest.raises(DataError, match="ends before"):
        store.read_range("a.tar", len(CONTENT) - 10, 20)


def test_http_passing_faults_are_outlasted(web: FaultyProxy, tmp_path: Path) -> None:
    store = Store(f"{web.url}/set")
    sequences: list[list[int | str | None]] = [[503, 429], [500, "cut"], ["reset", "cut"], ["hang"]]
    for faults in sequences:
        web.faults = list(faults)
        assert store.read("a.tar") == CONTENT
        assert not web.faults
    for fault in (503, "cut", "reset"):
        web.faults = [fault]
        store.fetch("a.tar", tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == CONTENT
        web.faults = [fault]
        assert store.read_range("a.tar", 7, 70_000) == CONTENT[7:70_007]
        web.faults = [fault]
        assert store.exists("a.tar"), "a store that is away must not look like a missing file"


@pytest.mark.parametrize("fault", [503, "cut", "reset"])
def test_http_faults_that_stay_become_one_line(web: FaultyProxy, fault: int | str) -> None:
    store = Store(f"{web.url}/set")
    web.always = fault
    for call in (store.read, store.exists) if fault != "cut" else (store.read,):
        with pytest.raises(TryAgainError, match=r"set/a\.tar: the store failed 5 times.*again"):
            call("a.tar")
    assert len(web.requests) >= 5


@pytest.mark.parametrize(
    ("status", "told"),
    [(401, "401.*credentials"), (403, "403.*credentials"), (404, "no such file"), (410, "answers 410")],
)
def test_http_refusals_are_not_asked_for_twice(web: FaultyProxy, status: int, told: str) -> None:
    web.always = status
    with pytest.raises(DataError, match=told):
        Store(f"{web.url}/set").read("a.tar")
    assert len(web.requests) == 1


def test_http_store_that_disappears_and_comes_back(web: FaultyProxy) -> None:
    store = Store(f"{web.url}/set")
    assert store.exists("a.tar")
    web.stop()
    threading.Timer(0.3, web.start).start()
    assert store.read("a.tar") == CONTENT


def test_nobody_listens(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(TryAgainError, match=r"127\.0\.0\.1"):
        Store("http://127.0.0.1:9/set").read("a.tar")
    assert time.monotonic() - began < 120


def test_writing_over_plain_http_is_refused(web: FaultyProxy) -> None:
    with pytest.raises(DataError, match=r"set/b\.tar: the store answers (405|501)"):
        Store(f"{web.url}/set").write("b.tar", b"x")


@pytest.mark.parametrize("location", ["pipe:cat /etc/passwd", "pipe://cat", "ftp://host/x", "ssh://host/x"])
def test_other_kinds_of_url_are_refused(location: str) -> None:
    with pytest.raises(UsageError, match="refused"):
        Store(location)


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_object_stores_write_read_list_and_delete(request: pytest.FixtureRequest, scheme: str, tmp_path: Path) -> None:
    request.getfixturevalue(scheme)
    store = Store(f"{scheme}://bucket/run")
    assert store.names() == []
    assert not store.exists("a/state.json")
    store.write("a/state.json", b"{}")
    store.write("a/weights", CONTENT)
    store.write("b", b"")
    assert store.read("a/weights") == CONTENT
    assert store.read("b") == b""
    assert store.exists("b")
    assert store.read_range("a/weights", 256, 512) == CONTENT[256:768]
    assert store.names() == ["a", "b"]
    assert store.names("a") == ["state.json", "weights"]
    assert store.find("a") == [("a/state.json", 2), ("a/weights", len(CONTENT))]
    store.fetch("a/weights", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == CONTENT
    store.delete("a")
    store.delete("a")
    assert store.names() == ["b"]
    store.write("写真 #1%.png", b"x")
    assert store.find() == [("b", 0), ("写真 #1%.png", 1)]
    assert store.read(store.names()[-1]) == b"x"
    with pytest.raises(DataError, match=rf"{scheme}://bucket/run/a/weights: the store has no such file"):
        store.read("a/weights")


def test_s3_files_written_by_another_process_are_seen(s3: FaultyProxy) -> None:
    """fsspec keeps listings for ever unless told otherwise."""
    from s3fs import S3FileSystem

    store = Store("s3://bucket/run")
    assert store.names() == []
    S3FileSystem(skip_instance_cache=True).pipe_file("bucket/run/new", b"x")
    assert store.names() == ["new"]
    assert store.exists("new")


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_passing_faults_of_object_stores_are_outlasted(
    request: pytest.FixtureRequest, scheme: str, tmp_path: Path
) -> None:
    proxy: FaultyProxy = request.getfixturevalue(scheme)
    store = Store(f"{scheme}://bucket/run")
    for faults in ([503, 500], ["cut", "reset"], ["hang"]):
        proxy.faults = list(faults)
        store.write("a", CONTENT)
        proxy.faults = list(faults)
        assert store.read("a") == CONTENT
        proxy.faults = list(faults)
        store.fetch("a", tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == CONTENT
        assert not proxy.faults
    for fault in (503, "reset"):
        proxy.faults = [fault]
        assert store.exists("a"), "a store that is away must not look like a missing file"
        proxy.faults = [fault]
        assert store.names() == ["a"]
    proxy.faults = [503]
    store.delete("a")
    assert store.names() == []


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_faults_of_object_stores_that_stay_become_one_line(request: pytest.FixtureRequest, scheme: str) -> None:
    proxy: FaultyProxy = request.getfixturevalue(scheme)
    store = Store(f"{scheme}://bucket/run")
    proxy.always = 503
    for call in (lambda: store.read("a"), lambda: store.write("a", b"x"), lambda: store.exists("a"), store.names):
        began = len(proxy.requests)
        with pytest.raises(TryAgainError, match=rf"{scheme}://bucket/run/a?: the store failed 5 times"):
            call()
        tries = len(proxy.requests) - began
        assert tries == 5, "tries are counted in one place"


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_refusals_of_object_stores_are_not_asked_for_twice(request: pytest.FixtureRequest, scheme: str) -> None:
    proxy: FaultyProxy = request.getfixturevalue(scheme)
    store = Store(f"{scheme}://bucket/run")
    for proxy.always in (401, 403):
        for call in (lambda: store.read("a"), lambda: store.write("a", b"x"), lambda: store.exists("a")):
            began = len(proxy.requests)
            with pytest.raises(DataError, match=rf"(?s)refuses access \({proxy.always}.*credentials"):
                call()
            assert len(proxy.requests) - began == 1


def test_s3_answers_that_pass_are_outlasted(s3: FaultyProxy) -> None:
    store = Store("s3://bucket/run")
    s3.faults = ["400 BadDigest", "400 IncompleteBody", "400 RequestTimeout", "400 KMS.ThrottlingException"]
    store.write("a", b"x")
    assert not s3.faults
    s3.faults = ["400 RequestTimeout"]
    assert store.read("a") == b"x"
    assert not any(request.startswith("HEAD") for request in s3.requests), "the answer to a HEAD has no code"


def test_expired_credentials_are_read_anew_where_they_can_be(
    s3: FaultyProxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from fsspec.asyn import sync
    from s3fs import S3FileSystem

    store = Store("s3://bucket/run")
    s3.faults = ["400 ExpiredToken"]
    with pytest.raises(DataError, match=r"refuses access \(400: ExpiredToken it is\)"):  # those of the environment stay
        store.write("a", b"x")
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(key)
    profile = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(profile))
    profile.write_text("[default]\naws_access_key_id = old\naws_secret_access_key = secret\n")
    S3FileSystem.clear_instance_cache()
    store = Store("s3://bucket/run")
    store.write("a", b"x")
    profile.write_text(profile.read_text().replace("old", "new"))
    s3.faults = ["400 ExpiredToken"]
    assert store.read("a") == b"x"
    assert sync(store._fs.loop, store._fs.session.get_credentials).access_key == "new"
    s3.faults = [503, 503, 503, 503, "400 ExpiredToken"]
    with pytest.raises(TryAgainError, match="ExpiredToken it is"):  # they have just expired: the next start has others
        store.read("a")
    s3.always = "400 ExpiredToken"
    with pytest.raises(DataError, match="ExpiredToken it is"):  # nobody renews them
        store.read("a")


def test_s3_without_credentials(s3: FaultyProxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from s3fs import S3FileSystem

    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(key)
    monkeypatch.setenv("HOME", str(tmp_path))
    S3FileSystem.clear_instance_cache()
    with pytest.raises(DataError, match="credentials"):
        Store("s3://bucket/run").write("a", b"x")


def test_s3_bucket_that_is_not_there(s3: FaultyProxy) -> None:
    with pytest.raises(DataError, match="no such"):
        Store("s3://nobucket/run").read("a")
    with pytest.raises(DataError, match=r"s3://nobucket/run/a: .*no such"):
        Store("s3://nobucket/run").write("a", b"x")


def test_a_store_whose_package_is_missing_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "gs", raising=False)
    with pytest.raises(UnavailableError, match=r"gs://.*gcsfs"):
        Store("gs://bucket/run")
