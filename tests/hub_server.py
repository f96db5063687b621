"""A server that speaks as much of the Hub's protocol as reading a data set takes, over a folder, on the loopback."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

API = re.compile(
    r"/api/datasets/(?P<name>[^/]+/[^/]+)(?:/(?P<what>revision|tree|paths-info)/(?P<revision>[^/]+)(?P<path>.*))?"
)
RESOLVE = re.compile(r"/datasets/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


@contextmanager
def hub_server(root: Path, token: str | None = None) -> Iterator[tuple[str, list[str]]]:
    """Serve the data sets OWNER/NAME of the folders `root`/OWNER/NAME; yield the endpoint and a log of requests.

    With `token`, other requests are refused. Every revision is the same.
    """
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer()

        def do_HEAD(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self._answer()

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            asked.append(f"{self.command} {self.path}")
            path = unquote(urlsplit(self.path).path)
            if token is not None and self.headers.get("Authorization") != f"Bearer {token}":
                return self._send(401, b'{"error": "no token"}')
            if (file := RESOLVE.fullmatch(path)) and (root / file["name"] / file["path"]).is_file():
                return self._send_file((root / file["name"] / file["path"]).read_bytes())
            if (api := API.fullmatch(path)) is None or not (folder := root / api["name"]).is_dir():
                return self._send(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
            answer: Any = {"id": api["name"], "sha": "0" * 40, "siblings": [], "private": False}
            if api["what"] == "tree":
                inside = folder / api["path"].lstrip("/")
                entries = inside.rglob("*") if "recursive=true" in self.path.lower() else inside.glob("*")
                answer = [_entry(folder, entry) for entry in sorted(entries)]
            elif api["what"] == "paths-info":
                asked_for = (
                    json.loads(body)["paths"] if body[:1] == b"{" else re.findall(r"paths=([^&]+)", body.decode())
                )
                wanted = [folder / unquote(path) for path in asked_for]
                answer = [_entry(folder, entry) for entry in wanted if entry.exists()]
            return self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

        def _send_file(self, data: bytes) -> None:
            headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "Accept-Ranges": "bytes"}
            span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            if span is None:
                return self._send(200, data, headers)
            first, last = int(span[1]), min(int(span[2] or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            return self._send(206, data[first : last + 1], headers)

        def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _entry(root: Path, path: Path) -> dict[str, Any]:
    kind = "directory" if path.is_dir() else "file"
    size = path.stat().st_size if path.is_file() else 0
    return {"type": kind, "path": str(path.relative_to(root)), "size": size, "oid": "0" * 40}
