"""An API server of the test's own: real kubectl, invented pods, and the rules by which Kubernetes keeps Jobs.

These are the rules that a changed manifest meets, as a Kubernetes 1.36 was seen to follow them:

- A Job's pod template cannot change; its completions only together with its parallelism. That of a finished Job, too.
- A finished Job stays, and is not run again. A failed Job keeps its condition.
- A ConfigMap that is immutable cannot change.
- A pod reads its ConfigMap when it starts: whoever replaces a pod makes it read again (`start_pod`).
- A TrainJob is refused when its runtime is not there.
- Deleting a Job deletes its pods. A namespace that is deleted before its unfinished Jobs stays for ever.
"""

import json
import re
import threading
from collections.abc import Callable
from copy import deepcopy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs

Object = dict[str, Any]

COMPONENT = "app.kubernetes.io/component"
INDEX = "batch.kubernetes.io/job-completion-index"

KINDS = {
    "v1": "pods Pod, events Event, configmaps ConfigMap, namespaces Namespace, services Service, secrets Secret, "
    "serviceaccounts ServiceAccount, persistentvolumeclaims PersistentVolumeClaim",
    "batch/v1": "jobs Job",
    "apps/v1": "deployments Deployment",
    "networking.k8s.io/v1": "networkpolicies NetworkPolicy",
    "policy/v1": "poddisruptionbudgets PodDisruptionBudget",
    "trainer.kubeflow.org/v1alpha1": "trainjobs TrainJob, trainingruntimes TrainingRuntime",
}
RESOURCES = {version: dict(pair.split() for pair in text.split(", ")) for version, text in KINDS.items()}


def discovery() -> dict[str, Object]:
    """Return the documents by which kubectl learns what there is, and that the server checks fields itself."""
    groups = [
        {
            "name": version.partition("/")[0],
            "versions": [{"groupVersion": version, "version": version.rpartition("/")[2]}],
            "preferredVersion": {"groupVersion": version, "version": version.rpartition("/")[2]},
        }
        for version in RESOURCES
        if "/" in version
    ]
    found: dict[str, Object] = {
        "/api": {"kind": "APIVersions", "versions": ["v1"]},
        "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups},
        "/openapi/v3": {"paths": {root(v)[1:]: {"serverRelativeURL": f"/openapi/v3{root(v)}"} for v in RESOURCES}},
    }
    for version, resources in RESOURCES.items():
        group, _, number = version.rpartition("/")
        verbs = ["get", "list", "create", "patch", "delete", "watch", "deletecollection"]
        found[root(version)] = {
            "kind": "APIResourceList",
            "groupVersion": version,
            "resources": [
                {
                    "name": name,
                    "singularName": kind.lower(),
                    "namespaced": name != "namespaces",
                    "kind": kind,
                    "verbs": verbs,
                }
                for name, kind in resources.items()
            ],
        }
        patch = [
            (kind, {"group": group, "version": number, "kind": kind}, [{"name": "fieldValidation", "in": "query"}])
            for kind in resources.values()
        ]
        found[f"/openapi/v3{root(version)}"] = {
            "openapi": "3.0.0",
            "info": {"title": "x", "version": "x"},
            "paths": {
                f"/{kind}": {"patch": {"x-kubernetes-group-version-kind": names, "parameters": parameters}}
                for kind, names, parameters in patch
            },
        }
    return found


def root(version: str) -> str:
    return f"/apis/{version}" if "/" in version else f"/api/{version}"


def pod(
    name: str, phase: str, *, message: str | None = None, terminated: Object | None = None, waits: str | None = None
) -> Object:
    """Return a pod; `terminated` says how its container ended, `message` what the kubelet says of it as a whole."""
    state: Object = {"terminated": terminated} if terminated else {"waiting": {"reason": waits}} if waits else {}
    states = [{"name": "x", "state": state or {"running": {}}}]
    status = {"phase": phase, "containerStatuses": states} | ({"message": message} if message else {})
    labels = {COMPONENT: re.sub(r"-\d.*", "", name)}
    metadata = {"name": name, "namespace": "dcgan", "labels": labels}
    return {"kind": "Pod", "apiVersion": "v1", "metadata": metadata, "status": status}


def selected(thing: Object, query: dict[str, list[str]]) -> bool:
    """Whether a list with these parameters shows the thing: by name, and by labels if it is a pod."""
    metadata = thing["metadata"]
    fields = [pair.split("=") for text in query.get("fieldSelector", []) for pair in text.split(",")]
    labels = [pair.split("=") for text in query.get("labelSelector", []) for pair in text.split(",")]
    return all(metadata["name"] == value for key, value in fields if key == "metadata.name") and all(
        metadata["labels"].get(key) == value for key, value in labels if thing["kind"] == "Pod"
    )


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


def ended(job: Object) -> bool:
    """Whether a Job is complete or failed."""
    return any(condition["type"] in ("Complete", "Failed") for condition in job["status"].get("conditions", []))


class Refused(Exception):
    """What a real server answers with 422: (the field, what is wrong with it)."""


class ApiServer(ThreadingHTTPServer):
    """Keeps what it is told to keep. It answers with all events, whatever is asked for.

    A Job is done, or fails if it is in `fails`, when it is asked about for the `looks`-th time, but not while `holds`
    is true of it. With `makes_pods`, a Job has a pod for each index, and one that is deleted is replaced. A context
    manager.
    """

    def __init__(self) -> None:
        self.objects: dict[str, list[Object]] = {name: [] for names in RESOURCES.values() for name in names}
        self.objects["pods"] = [pod("train-0-a", "Running")]
        self.looks = 2
        self.fails: set[str] = set()
        self.suspended: set[str] = set()  # Jobs that a queue holds back until they are asked about for the last time
        self.holds: Callable[[str], bool] = lambda job: False
        self.makes_pods = False
        self.lost: list[str] = []  # pods that were deleted before their Job had ended
        self.version = {"major": "1", "minor": "36", "gitVersion": "v1.36.0"}
        self.lock = threading.Lock()
        self._clock = 0
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def now(self) -> str:
        self._clock += 1
        return f"2026-01-01T{self._clock // 60:02}:{self._clock % 60:02}:00Z"

    def find(self, what: str, name: str) -> Object | None:
        return next((thing for thing in self.objects[what] if thing["metadata"]["name"] == name), None)

    def job(self, name: str) -> Object:
        found = self.find("jobs", name)
        assert found is not None, f"no job {name}"
        return found

    def start_pod(self, job: str) -> dict[str, str]:
        """Return the settings that a pod of a Job reads when it starts, now."""
        (source, *_) = self.job(job)["spec"]["template"]["spec"]["containers"][0]["envFrom"]
        settings = self.find("configmaps", source["configMapRef"]["name"])
        assert settings is not None, "CreateContainerConfigError"
        return dict(settings["data"])

    def create(self, what: str, thing: Object) -> Object:
        if what == "trainjobs":
            runtime = thing["spec"]["runtimeRef"]["name"]
            if self.find("trainingruntimes", runtime) is None:
                raise Refused("spec.runtimeRef", f"Invalid value: {runtime}: the runtime must be created first")
        thing["metadata"]["creationTimestamp"] = self.now()
        thing["metadata"]["uid"] = str(self._clock)
        if what in ("jobs", "trainjobs"):
            thing["status"] = {"asked": 0}
        self.objects[what].append(thing)
        if what == "jobs" and self.makes_pods:
            for index in range(thing["spec"]["completions"]):
                self.make_pod(thing["metadata"]["name"], index)
        return thing

    def make_pod(self, job: str, index: int) -> None:
        made = pod(f"{job}-{index}-{self.now()[11:16].replace(':', '')}", "Running")
        labels = {COMPONENT: job, INDEX: str(index)}
        made["metadata"] |= {"labels": labels, "namespace": self.job(job)["metadata"]["namespace"]}
        made["spec"] = {"containers": [{"name": "x"}]}
        self.objects["pods"].append(made)

    def ask_about(self, thing: Object) -> None:
        """Let a Job go on, up to its end; a Deployment and a Pod start at once."""
        name, kind, status = thing["metadata"]["name"], thing["kind"], thing.setdefault("status", {})
        if kind in ("Job", "TrainJob") and not ended(thing):
            status["asked"] += 1
            if name in self.suspended:
                status["conditions"] = [{"type": "Suspended", "status": "True", "lastTransitionTime": self.now()}]
            if status["asked"] > self.looks and not self.holds(name):
                failed = {"type": "Failed", "reason": "BackoffLimitExceeded", "message": "too often"}
                end = failed if name in self.fails else {"type": "Complete"}
                status["conditions"] = [{"status": "True", "lastTransitionTime": self.now(), **end}]
                for one in self.objects["pods"]:
                    if self.makes_pods and one["metadata"]["labels"].get(COMPONENT) == name:
                        one["status"]["phase"] = "Failed" if name in self.fails else "Succeeded"
        if kind == "Deployment" and name not in self.fails:
            replicas = dict.fromkeys(("replicas", "updatedReplicas", "availableReplicas", "readyReplicas"), 1)
            thing["metadata"]["generation"] = 1
            thing["status"] = {"observedGeneration": 1, **replicas}
        if kind == "Pod" and "containers" in thing.get("spec", {}) and INDEX not in thing["metadata"]["labels"]:
            thing["status"] = {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}

    def patch(self, thing: Object, patch: Object) -> Object:
        """Merge `patch`, as far as the rules of the thing's kind let it."""
        changed = merged(thing, patch)
        kind = thing["kind"]
        if kind == "Job":
            if changed["spec"]["template"] != thing["spec"]["template"]:
                value = json.dumps(changed["spec"]["template"])
                raise Refused("spec.template", f"Invalid value: {value}: field is immutable")
            if changed["spec"].get("completions") != changed["spec"].get("parallelism"):
                raise Refused("spec.completions", "Invalid value: field is immutable")
        if kind == "ConfigMap" and thing.get("immutable") and changed.get("data") != thing["data"]:
            raise Refused("data", "Forbidden: field is immutable when `immutable` is set")
        thing.update(changed)
        return thing

    def delete(self, what: str, thing: Object) -> None:
        name = thing["metadata"]["name"]
        if what == "namespaces" and not all(map(ended, self.objects["jobs"])):
            return  # Terminating, for ever
        self.objects[what].remove(thing)
        labels = thing["metadata"].get("labels", {})
        if what == "pods" and INDEX in labels and not ended(self.job(labels[COMPONENT])):
            self.lost.append(name)
            self.make_pod(labels[COMPONENT], int(labels[INDEX]))
        if what == "jobs":
            self.objects["pods"] = [p for p in self.objects["pods"] if p["metadata"]["labels"][COMPONENT] != name]


def merged(old: Any, patch: Any) -> Any:
    """Merge as JSON merge patches do: lists are replaced. kubectl leaves out of a patch what has not changed."""
    if not isinstance(patch, dict) or not isinstance(old, dict):
        return deepcopy(patch)
    result = deepcopy(old)
    for key, value in patch.items():
        if key.startswith("$"):
            continue
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merged(old.get(key), value)
    return result


class Handler(BaseHTTPRequestHandler):
    server: ApiServer
    protocol_version = "HTTP/1.1"
    discovery = discovery()

    def place(self) -> tuple[str, str]:
        """Return what the path names: (resource, name or "")."""
        path = self.path.partition("?")[0]
        for version, resources in RESOURCES.items():
            found = re.fullmatch(rf"{re.escape(root(version))}(?:/namespaces/[^/]+(?=/))?/([a-z]+)(?:/([^/]+))?", path)
            if found and found[1] in resources:
                return found[1], found[2] or ""
        return "", ""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path in self.discovery:
            return self.answer(200, self.discovery[path])
        if path == "/version":
            return self.answer(200, self.server.version)
        if path.endswith("/log"):
            return self.answer(200, f"the last words of {path.split('/')[-2]}")
        what, name = self.place()
        with self.server.lock:
            if not what:
                return self.refuse(404, "NotFound", path)
            if not name:
                kinds = {kind for kinds in RESOURCES.values() for key, kind in kinds.items() if key == what}
                query = parse_qs(self.path.partition("?")[2])
                items = [thing for thing in self.server.objects[what] if selected(thing, query)]
                return self.answer(200, {"kind": f"{kinds.pop()}List", "apiVersion": "v1", "items": items})
            thing = self.server.find(what, name)
            if thing is None:
                return self.refuse(404, "NotFound", f'{what} "{name}" not found')
            self.server.ask_about(thing)
            self.answer(200, thing)

    def do_POST(self) -> None:
        thing = self.body()
        with self.server.lock:
            self.answer_unless_refused(thing, 201, lambda: self.server.create(self.place()[0], thing))

    def do_PATCH(self) -> None:
        what, name = self.place()
        patch = self.body()
        with self.server.lock:
            thing = self.server.find(what, name)
            assert thing is not None
            self.answer_unless_refused(thing, 200, lambda: self.server.patch(thing, patch))

    def answer_unless_refused(self, thing: Object, code: int, change: Callable[[], Object]) -> None:
        try:
            self.answer(code, change())
        except Refused as error:
            field, wrong = error.args
            causes = [{"reason": "FieldValueInvalid", "field": field, "message": wrong}]
            details = {"name": thing["metadata"]["name"], "kind": thing["kind"], "causes": causes}
            self.refuse(422, "Invalid", f"{field}: {wrong}", details)

    def do_DELETE(self) -> None:
        what, name = self.place()
        self.body()
        with self.server.lock:
            things = [t for t in self.server.objects[what] if name in ("", t["metadata"]["name"])]
            if name and not things:
                return self.refuse(404, "NotFound", f'{what} "{name}" not found')
            for thing in things:
                self.server.delete(what, thing)
            self.answer(200, {"kind": "Status", "apiVersion": "v1", "status": "Success"})

    def body(self) -> Any:
        return json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")

    def refuse(self, code: int, reason: str, message: str, details: Object | None = None) -> None:
        status = {"status": "Failure", "reason": reason, "message": message, "details": details, "code": code}
        self.answer(code, {"kind": "Status", "apiVersion": "v1", **status})

    def answer(self, code: int, content: Object | str) -> None:
        data = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *arguments: object) -> None:
        pass
