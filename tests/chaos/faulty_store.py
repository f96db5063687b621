"""S3 on a bad day: a server on the loopback, behind a proxy that fails in every way that passes when it is tried again.

What a request meets follows from the seed, the request, and how often it was made, so that the order in which processes
ask decides nothing. The access key expires again and again; the next one is written to the credentials file first, as
what renews credentials does.
"""

import hashlib
import threading
from collections import Counter
from contextlib import suppress
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from storage_servers import HOP_BY_HOP

from pipeline.common.storage import write_atomic

ANSWERS = ("503 SlowDown", "500 InternalError", "400 RequestTimeout", "400 KMS.ThrottlingException")
FAULTS = {
    "GET": (*ANSWERS, "reset", "cut", "short"),
    "PUT": (*ANSWERS, "reset", "lost", "cut upload", "400 BadDigest", "400 IncompleteBody"),
    "POST": (*ANSWERS, "reset", "lost"),
    "DELETE": (*ANSWERS, "reset", "lost"),
    "HEAD": ("503 SlowDown", "500 InternalError", "reset"),  # the answer to a HEAD has no code
}
"""What each method can meet. reset: no answer. lost: it is done, but the answer is lost. cut: half of the body that
was announced. short: half of the body, announced as all of it. cut upload: the connection ends in the request's body.
"""
EXPIRED = "400 ExpiredToken"
KINDS = {kind for kinds in FAULTS.values() for kind in kinds} | {EXPIRED}


class FaultyStore:
    """Passes requests on to `upstream`. Each kind of fault meets the share `share` of the requests that can meet it.

    A key is good for `lifetime` requests. `credentials` is the file from which programs read it.
    """

    def __init__(self, upstream: int, credentials: Path, *, seed: int, share: float, lifetime: int) -> None:
        self.injected: Counter[str] = Counter()
        self.passed = 0
        self._upstream, self._credentials = upstream, credentials
        self._seed, self._share, self._lifetime = seed, share, lifetime
        self._asked: Counter[str] = Counter()
        self._key = 0
        self._lock = threading.Lock()
        self._renew()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def requests(self) -> int:
        """Requests so far, those that failed among them."""
        return self._asked.total()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _renew(self) -> None:
        self._key += 1
        text = f"[default]\naws_access_key_id = KEY{self._key}\naws_secret_access_key = secret\n"
        write_atomic(self._credentials, text)

    def _next(self, method: str, path: str, authorization: str) -> str | None:
        """Return the fault that this request meets, or None."""
        with self._lock:
            request = f"{method} {path}"
            self._asked[request] += 1
            if self.requests % self._lifetime == 0:
                self._renew()
            fault = None
            if f"Credential=KEY{self._key}/" not in authorization:
                fault = EXPIRED
            else:
                digest = hashlib.sha256(f"{self._seed} {request} {self._asked[request]}".encode()).digest()
                place = int(int.from_bytes(digest[:6]) / 2**48 / self._share)
                if place < len(FAULTS[method]):
                    fault = FAULTS[method][place]
            if fault is not None:
                self.injected[fault] += 1
            else:
                self.passed += 1
            return fault

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        store = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _meet(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                fault = store._next(self.command, self.path, self.headers.get("Authorization", ""))
                body = self.rfile.read(length // 2 if fault == "cut upload" else length)
                if fault in ("reset", "cut upload"):
                    self.close_connection = True
                    return
                if fault is not None and fault[0].isdigit():
                    number, _, code = fault.partition(" ")
                    told = f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
                    self._answer(int(number), {}, len(told), told)
                    return
                status, headers, content = store._pass_on(self.command, self.path, body, dict(self.headers.items()))
                if fault == "lost":
                    self.close_connection = True
                    return
                announced = int(headers["Content-Length"]) if self.command == "HEAD" else len(content)
                if fault in ("cut", "short"):
                    content = content[: len(content) // 2]
                    announced = len(content) if fault == "short" else announced
                    self.close_connection = fault == "cut"
                self._answer(status, headers, announced, content)

            def _answer(self, status: int, headers: dict[str, str], length: int, content: bytes) -> None:
                self.send_response(status)
                for key, value in headers.items():
                    if key.lower() not in HOP_BY_HOP:
                        self.send_header(key, value)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _meet

            def log_message(self, *_: Any) -> None: ...

            def handle(self) -> None:
                with suppress(ConnectionError):  # the client was killed
                    super().handle()

        return Handler

    def _pass_on(
        self, method: str, path: str, body: bytes, headers: dict[str, str]
    ) -> tuple[int, dict[str, str], bytes]:
        connection = HTTPConnection("127.0.0.1", self._upstream, timeout=60)
        kept = {key: value for key, value in headers.items() if key.lower() not in ("connection", "expect")}
        connection.request(method, path, body or None, kept)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, dict(answer.getheaders()), content
