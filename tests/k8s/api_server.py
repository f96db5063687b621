"""The part of an API server that `kubectl get pods` and `kubectl get events` need: real kubectl, invented pods."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Object = dict[str, Any]

KINDS = {"pods": "Pod", "events": "Event"}
DISCOVERY: dict[str, Object] = {
    "/api": {"kind": "APIVersions", "versions": ["v1"]},
    "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": []},
    "/api/v1": {
        "kind": "APIResourceList",
        "groupVersion": "v1",
        "resources": [
            {"name": name, "singularName": "", "namespaced": True, "kind": kind, "verbs": ["get", "list"]}
            for name, kind in KINDS.items()
        ],
    },
}


def pod(name: str, phase: str, *, message: str | None = None, terminated: Object | None = None) -> Object:
    """Return a pod; `terminated` says how its container ended, `message` what the kubelet says of it as a whole."""
    states = [{"name": "x", "state": {"terminated": terminated} if terminated else {"running": {}}}]
    status = {"phase": phase, "containerStatuses": states} | ({"message": message} if message else {})
    return {"kind": "Pod", "apiVersion": "v1", "metadata": {"name": name, "namespace": "dcgan"}, "status": status}


def warning(name: str, reason: str, message: str, minute: int = 0) -> Object:
    """Return an event of the type Warning about the object `name`."""
    return {
        "kind": "Event",
        "apiVersion": "v1",
        "metadata": {"name": f"{name}.{minute}", "creationTimestamp": f"2026-01-01T00:{minute:02}:00Z"},
        "involvedObject": {"name": name},
        "type": "Warning",
        "reason": reason,
        "message": message,
    }


class ApiServer(ThreadingHTTPServer):
    """Answers with `pods` and `events`, whatever selector is asked for. A context manager."""

    def __init__(self) -> None:
        self.objects: dict[str, list[Object]] = {"pods": [pod("train-0-a", "Running")], "events": []}
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    server: ApiServer

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        what = path.rpartition("/")[2]
        answer = DISCOVERY.get(path)
        if path == f"/api/v1/namespaces/dcgan/{what}" and what in KINDS:
            answer = {"kind": f"{KINDS[what]}List", "apiVersion": "v1", "items": self.server.objects[what]}
        content = json.dumps(answer or {"kind": "Status", "status": "Failure"}).encode()
        self.send_response(404 if answer is None else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        pass
