"""Run the pods of rendered Jobs with podman, as a cluster's controllers and kubelet would, as far as the tests need it.

`podman kube play` knows no Jobs. So this expands a Job's template as Kubernetes does: index, host name, $(VAR),
volumes, users and groups, read-only root, dropped capabilities, and names of the headless Service.
"""

import os
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
# Of this run alone: another may be running, and an address of a killed one stays taken.
NETWORK = f"dcgan-test-{os.getpid()}"
SUBNET = f"10.231.{os.getpid() % 250}"
ENVIRONMENT = {**os.environ, "CONTAINERS_CONF": str(ROOT / "tests/containers/containers.conf")}


def podman(*arguments: str, check: bool = True) -> str:
    """Run podman and return what it prints."""
    done = subprocess.run(["podman", *arguments], capture_output=True, text=True, env=ENVIRONMENT, check=False)
    if check and done.returncode:
        raise AssertionError(f"podman {' '.join(arguments)}: {done.stderr}")
    return (done.stdout + done.stderr).strip()


def wait_until(true: Callable[[], object], seconds: float, what: str) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.1)


@dataclass
class Pod:
    """A running or ended container of a Job's pod."""

    name: str

    def logs(self) -> str:
        return podman("logs", self.name)

    def running(self) -> bool:
        return podman("inspect", "--format", "{{.State.Running}}", self.name) == "true"

    def kill(self, signal: str) -> None:
        podman("kill", "--signal", signal, self.name)

    def wait(self, seconds: float) -> int:
        """Return the exit code."""
        wait_until(lambda: not self.running(), seconds, f"{self.name} ends:\n{self.logs()[-3000:]}")
        return int(podman("inspect", "--format", "{{.State.ExitCode}}", self.name))


@dataclass
class Cluster:
    """The objects of an overlay, a directory for the work volume, and the pods started so far."""

    overlay: str
    work: Path
    changes: dict[str, str] = field(default_factory=dict)
    """Settings to change: shorter runs."""

    def __post_init__(self) -> None:
        rendered = subprocess.run(
            ["kubectl", "kustomize", str(ROOT / "k8s/overlays" / self.overlay)], capture_output=True, check=True
        ).stdout
        self.objects = list(yaml.safe_load_all(rendered))
        self.settings = self.find_settings() | self.changes
        self.started: dict[str, Pod] = {}
        podman("network", "rm", "--force", NETWORK, check=False)
        podman("network", "create", "--internal", "--subnet", f"{SUBNET}.0/24", NETWORK)

    def close(self) -> None:
        """Remove everything that was started."""
        for pod in self.started.values():
            podman("rm", "--force", "--time", "0", pod.name)
        podman("network", "rm", "--force", NETWORK)

    def find(self, kind: str, name: str) -> dict[str, Any]:
        """Return a rendered object."""
        return next(t for t in self.objects if (t["kind"], t["metadata"]["name"]) == (kind, name))

    def find_settings(self) -> dict[str, str]:
        """Return the settings, whose name ends in their hash."""
        maps = [t for t in self.objects if t["kind"] == "ConfigMap" and t["metadata"]["name"].startswith("settings-")]
        return dict(maps[0]["data"])

    def run_job(self, name: str) -> list[Pod]:
        """Start a pod for every index of a Job."""
        return [self.start(name, index) for index in range(self.find("Job", name)["spec"]["completions"])]

    def start(self, job: str, index: int = 0) -> Pod:
        """Start the pod of one index, in place of an earlier one; its init containers first, each to its end."""
        spec = self.find("Job", job)["spec"]["template"]["spec"]
        for number, container in enumerate(spec.get("initContainers", [])):
            before = self._run(job, index, spec, container, f"{job}-init{number}")
            code = before.wait(300)
            assert code == 0, before.logs()
        (container,) = spec["containers"]
        return self._run(job, index, spec, container, f"{job}-{index}")

    def _run(self, job: str, index: int, spec: dict[str, Any], container: dict[str, Any], name: str) -> Pod:
        name = f"{NETWORK}-{name}"
        podman("rm", "--force", "--ignore", "--time", "0", name)
        environment = {**self.settings, "JOB_COMPLETION_INDEX": str(index)}
        arguments = [
            re.sub(r"\$\((\w+)\)", lambda match: environment.get(match[1], match[0]), argument)
            for argument in container["args"]
        ]
        user, security = spec["securityContext"], container["securityContext"]
        options = [
            *("--name", name, "--hostname", f"{job}-{index}", "--network", NETWORK, "--ip", f"{SUBNET}.{10 + index}"),
            *("--no-hosts", "--volume", f"{self._hosts(job, index, spec)}:/etc/hosts:ro"),
            *("--cpus", str(container["resources"]["limits"]["cpu"])),
            *("--user", f"{user['runAsUser']}:{user['runAsGroup']}", "--group-add", str(user["fsGroup"])),
            *(f"--env={key}={value}" for key, value in environment.items()),
            *(f"--cap-drop={capability}" for capability in security["capabilities"]["drop"]),
        ]
        if security["readOnlyRootFilesystem"]:
            options += ["--read-only", "--read-only-tmpfs=false"]
        if security["allowPrivilegeEscalation"] is False:
            options += ["--security-opt", "no-new-privileges"]
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        for mount in container["volumeMounts"]:
            volume = volumes[mount["name"]]
            if "persistentVolumeClaim" in volume:
                options += ["--volume", f"{self.work}:{mount['mountPath']}"]
            elif mount["mountPath"] == "/dev/shm":
                options += ["--shm-size", volume["emptyDir"]["sizeLimit"].replace("Gi", "g")]
            else:
                options += ["--tmpfs", f"{mount['mountPath']}:rw,mode=1777,size=1g"]
        podman("run", "--detach", *options, container["image"], *arguments)
        self.started[name] = Pod(name)
        return self.started[name]

    def _hosts(self, job: str, index: int, spec: dict[str, Any]) -> Path:
        """Write /etc/hosts as the kubelet does, with the headless Service's names, which DNS would know, added."""
        lines = ["127.0.0.1 localhost"]
        domain = f"{spec['subdomain']}.dcgan.svc.cluster.local" if "subdomain" in spec else ""
        for other in range(self.find("Job", job)["spec"]["completions"]):
            names = f"{job}-{other}.{domain} " if domain else ""
            if domain or other == index:
                lines.append(f"{SUBNET}.{10 + other} {names}{job}-{other if other == index else 'elsewhere'}")
        path = self.work.parent / f"hosts-{job}-{index}"
        path.write_text("\n".join(lines) + "\n")
        path.chmod(0o644)
        return path
