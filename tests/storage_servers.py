"""Real stores for the tests, on the loopback, behind a proxy that fails on purpose."""

import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from ports import free_port

HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"}


def wait_for_port(port: int, patience_seconds: float = 200) -> None:
    """Return when somebody listens."""
    end = time.monotonic() + patience_seconds
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.02)


class FaultyProxy:
    """Passes requests on to `upstream`; the next ones meet `faults` first, one each: what a bad day brings.

    A fault is a status (503), a status with S3's code ("400 BadDigest"), or "cut" (half of the answer's body), "reset"
    (nothing at all), "hang", or None.
    """

    def __init__(self, upstream: int) -> None:
        self.faults: list[int | str | None] = []
        self.always: int | str | None = None
        self.only = ""
        self.requests: list[str] = []
        self.port = free_port()
        self._lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _pass_on(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                fault = proxy._next_fault(f"{self.command} {self.path}")
                if fault == "hang":
                    time.sleep(4)
                if fault in ("hang", "reset"):
                    self.close_connection = True
                    return
                if isinstance(fault, int):
                    self.send_error(fault)
                    return
                if fault is not None and fault[0].isdigit():
                    status, _, code = fault.partition(" ")
                    told = f"<Error><Code>{code}</Code><Message>{code} it is</Message></Error>".encode()
                    self.send_response(int(status))
                    self.send_header("Content-Length", str(len(told)))
                    self.end_headers()
                    if self.command != "HEAD":
                        self.wfile.write(told)
                    return
                connection = HTTPConnection("127.0.0.1", upstream, timeout=20)
                headers = {key: value for key, value in self.headers.items() if key.lower() != "connection"}
                connection.request(self.command, self.path, body or None, headers)
                answer = connection.getresponse()
                content = answer.read()
                connection.close()
                self.send_response(answer.status)
                for key, value in answer.getheaders():
                    if key.lower() not in HOP_BY_HOP:
                        self.send_header(key, value)
                length = answer.getheader("Content-Length") if self.command == "HEAD" else None
                self.send_header("Content-Length", length or str(len(content)))
                self.end_headers()
                if fault == "cut":
                    content = content[: len(content) // 2]
                    self.close_connection = True
                self.wfile.write(content)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on

            def log_message(self, *_: Any) -> None: ...

        self._handler = Handler
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen, again if it was stopped."""
        ThreadingHTTPServer.allow_reuse_address = True
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), self._handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Refuse connections."""
        self._server.shutdown()
        self._server.server_close()

    def _next_fault(self, request: str) -> int | str | None:
        with self._lock:
            self.requests.append(request)
            if self.only not in request:
                return None
            return self.faults.pop(0) if self.faults else self.always


@contextmanager
def nginx(root: Path, scratch: Path) -> Iterator[int]:
    """Serve `root` with nginx, listings on; yield its port."""
    port = free_port()
    scratch.mkdir(exist_ok=True)
    temporary = "".join(
        f"{kind}_temp_path {scratch}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (scratch / "nginx.conf").write_text(
        f"""
        daemon off; pid {scratch}/pid; error_log {scratch}/error.log; user root; worker_processes 1;
        events {{ worker_connections 64; }}
        http {{
            access_log off; {temporary} default_type application/octet-stream; types {{ }}
            server {{ listen 127.0.0.1:{port}; root {root}; autoindex on; }}
        }}
        """
    )
    process = subprocess.Popen([_nginx_binary(), "-c", f"{scratch}/nginx.conf", "-e", f"{scratch}/error.log"])
    try:
        wait_for_port(port)
        yield port
    finally:
        process.terminate()
        process.wait(200)


def _nginx_binary() -> str:
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin") or ""


NGINX = bool(_nginx_binary())


@contextmanager
def s3_server(log: Path) -> Iterator[int]:
    """Run an S3 server without buckets; yield its port."""
    port = free_port()
    command = [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", str(port)]
    with log.open("w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        wait_for_port(port)
        yield port
    finally:
        server.kill()
        server.wait()


@contextmanager
def gcs_server(bucket: str) -> Iterator[int]:
    """Run a server that is compatible with Google Cloud Storage and has one empty bucket; yield its port."""
    from gcp_storage_emulator.server import create_server

    port = free_port()
    with create_server("127.0.0.1", port, in_memory=True, default_bucket=bucket):
        wait_for_port(port)
        yield port


@contextmanager
def python_server(root: Path) -> Iterator[int]:
    """Serve `root` with `python -m http.server`, which knows no ranges; yield its port."""
    port = free_port()
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(root)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for_port(port)
        yield port
    finally:
        process.terminate()
        process.wait(200)
