#!/usr/bin/env python3
"""Try the pipeline on the cluster that kubectl speaks to: train, export, generate; then the same with lost pods.

    k8s/trial.py [CONTEXT] [--image REGISTRY/dcgan:TAG] [--minutes 90] [--keep]

It runs the steps of the overlay cpu-demo, with fewer images, in a namespace of their own, and checks the samples and
the metrics. Then it runs them once more into other folders, deletes a training and a generating pod in the middle, and
compares the samples: they must be the same, byte for byte. In the end the namespace is gone, with its volume; after a
failure the logs, events and objects are in a folder here. CONTEXT must be the current context of kubectl; it can be
left out where neither context, cluster nor server sound like production. Needs Python 3.11 and kubectl, nothing else.

Exit codes: 0 all is as it should be; 1 a step failed or a check found something; 2 wrong options; 69 no cluster
answers, or it is too old; 75 not done in time; 78 the cluster may be production, or holds the namespace; 130 and 143
stopped.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

HERE = Path(__file__).resolve().parent
STEPS = ("train", "export", "generate", "generate-merge")
METRICS = {"train": "dcgan_train_seen_images", "generate": "dcgan_generate_images_total"}
"""What a step's pods serve on their port of metrics, above 0 as soon as they work."""
PRODUCTION = re.compile(r"(?<![a-z])(prod|production|prd|live)(?![a-z])", re.IGNORECASE)
OLDEST = (1, 34)
COMPONENT = "app.kubernetes.io/component"
INDEX = "batch.kubernetes.io/job-completion-index"
FETCH = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:9400/metrics', timeout=9).read().decode())"


class Failure(Exception):
    """The end of the trial, in one line; `code` is its exit code."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


class Kubectl:
    """kubectl, bound to the context that was current when the trial began."""

    def __init__(self, context: str) -> None:
        self.command = ["kubectl", "--context", context]

    def __call__(self, *arguments: str, seconds: int = 60) -> str:
        """Return what kubectl prints. Raises Failure, with the last line of what it says, if it fails."""
        try:
            done = subprocess.run(
                [*self.command, *arguments], capture_output=True, text=True, check=False, timeout=seconds
            )
        except subprocess.TimeoutExpired:
            raise Failure(f"kubectl {' '.join(arguments)}: no answer in {seconds} s") from None
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise Failure(f"kubectl {arguments[0]}: {said[-1]}")
        return done.stdout


def current_context(wanted: str | None) -> str:
    """Return the current context, if the trial may run there. Raises Failure."""
    if shutil.which("kubectl") is None:
        raise Failure("kubectl is not on PATH; install it, with kustomize 5", 69)
    shown = subprocess.run(
        ["kubectl", "config", "view", "--minify", "-o", "json"], capture_output=True, text=True, check=False
    )
    if shown.returncode:
        last = (shown.stderr.strip().splitlines() or ["?"])[-1]
        raise Failure(f"no current context ({last}); let KUBECONFIG name a cluster, or kubectl config use-context", 69)
    config = json.loads(shown.stdout)
    context = str(config["current-context"])
    if wanted not in (None, context):
        raise Failure(f"the current context is {context}, not {wanted}; first: kubectl config use-context {wanted}", 2)
    cluster = (config["clusters"] or [{"name": "", "cluster": {}}])[0]
    names = {"context": context, "cluster": cluster["name"], "server": cluster["cluster"].get("server", "")}
    for kind, name in names.items():
        if wanted is None and PRODUCTION.search(name):
            raise Failure(
                f"the {kind} {name} sounds like production; to run there all the same: trial.py {context}", 78
            )
    return context


def check_cluster(kubectl: Kubectl, context: str, namespace: str) -> None:
    """Raise Failure unless the cluster answers, is new enough, and does not have the namespace."""
    try:
        version = json.loads(kubectl("get", "--raw", "/version", "--request-timeout=20s", seconds=30))
    except Failure as error:
        raise Failure(f"no cluster answers in context {context}: {error}", 69) from None
    found = tuple(int(re.sub(r"\D", "", version[part])) for part in ("major", "minor"))
    if found < OLDEST:
        raise Failure(
            f"the cluster in context {context} is Kubernetes {version['gitVersion']}; needs 1.34 or newer", 69
        )
    if kubectl("get", "namespace", namespace, "--ignore-not-found", "-o", "name"):
        raise Failure(
            f"the namespace {namespace} is there already; delete it (kubectl delete namespace {namespace}), or choose "
            "another: --namespace NAME",
            78,
        )


def image_line(image: str) -> str:
    """Return an image's reference as kustomize's list of images has it. Raises Failure for what is none."""
    found = re.fullmatch(r"([\w.\-/:]+?)(?::([\w.\-]{1,128})|@(sha256:[0-9a-f]{64}))", image)
    if found is None:
        raise Failure(f"--image {image}: expected REGISTRY/NAME:TAG or REGISTRY/NAME@sha256:DIGEST", 2)
    pin = f"newTag: {json.dumps(found[2])}" if found[2] else f"digest: {found[3]}"
    return f"  - {{name: dcgan, newName: {found[1]}, {pin}}}"


class Trial:
    """A copy of the manifests with an overlay `trial`, and what is done with it."""

    def __init__(self, folder: Path, kubectl: Kubectl, options: argparse.Namespace) -> None:
        self.kubectl, self.namespace = kubectl, str(options.namespace)
        self.seconds, self.began = 60 * options.minutes, time.monotonic()
        shutil.copytree(HERE, folder / "k8s")
        self.overlay = folder / "k8s/overlays/trial"
        shutil.copytree(HERE / "overlays/cpu-demo", self.overlay)
        with (self.overlay / "kustomization.yaml").open("a") as file:
            file.write(f"namespace: {self.namespace}\n")
        self.set(TOTAL_IMAGES=options.images, COUNT=options.count)
        if options.image:
            edit = self.overlay / "edit/kustomization.yaml"
            edit.write_text(re.sub(r"  - \{name: dcgan,.*", lambda _: image_line(options.image), edit.read_text()))
        # run.sh calls `kubectl`; what it leaves in its temporary folder goes with ours.
        program = folder / "bin/kubectl"
        program.parent.mkdir()
        program.write_text('#!/bin/sh\nexec "$TRIAL_KUBECTL" --context "$TRIAL_CONTEXT" "$@"\n')
        program.chmod(0o755)
        (folder / "tmp").mkdir()
        self.environment = {
            **os.environ,
            "PATH": f"{program.parent}:{os.environ['PATH']}",
            "TMPDIR": str(folder / "tmp"),
            "TRIAL_KUBECTL": str(shutil.which("kubectl")),
            "TRIAL_CONTEXT": kubectl.command[-1],
        }
        self.script = folder / "k8s/run.sh"

    def set(self, **settings: object) -> None:
        """Change settings of the overlay."""
        edit = self.overlay / "edit/kustomization.yaml"
        lines = [line for line in edit.read_text().splitlines() if line.strip(" -").partition("=")[0] not in settings]
        lines[lines.index("    literals:") + 1 : 0] = [f"      - {key}={value}" for key, value in settings.items()]
        edit.write_text("\n".join(lines) + "\n")

    def run(self, *words: str, during: Callable[[], bool] | None = None, seconds: float | None = None) -> None:
        """Run k8s/run.sh with these words, and call `during` every second until it returns True.

        Raises Failure when the script fails, when time is up, or when the script ends before `during` is True.
        """
        limit = self.began + self.seconds if seconds is None else time.monotonic() + seconds
        # In a session of its own: Ctrl-C is for this program, which then stops the script and cleans up.
        script = subprocess.Popen(
            [self.script, "trial", *words], env=self.environment, stdin=subprocess.DEVNULL, start_new_session=True
        )
        try:
            while script.poll() is None:
                if time.monotonic() > limit:
                    allowed = self.seconds if seconds is None else seconds
                    raise Failure(f"{words[0]} has not ended, and the {allowed / 60:g} minutes are over", 75)
                if during is not None and during():
                    during = None
                time.sleep(1)
        finally:
            if script.poll() is None:
                os.killpg(script.pid, signal.SIGTERM)
                script.wait()
        if script.returncode:
            raise Failure(f"{words[0]} failed; what it said last is above")
        if during is not None:
            raise Failure(f"{words[0]} ended before this was seen: {during.__doc__}; give more --images or --count")

    def pod(self, step: str, index: int) -> str:
        """Return the name of the pod of an index that runs, or ""."""
        labels = f"{COMPONENT}={step},{INDEX}={index}"
        found: dict[str, Any] = json.loads(
            self.kubectl("-n", self.namespace, "get", "pods", "-l", labels, "-o", "json")
        )
        running = (pod["metadata"] for pod in found["items"] if pod["status"].get("phase") == "Running")
        return next((str(pod["name"]) for pod in running if "deletionTimestamp" not in pod), "")

    def works(self, step: str, index: int) -> bool:
        """Whether the metrics of an index say that it has made images."""
        try:
            pod = self.pod(step, index)
            text = pod and self.kubectl("-n", self.namespace, "exec", pod, "--", "python", "-c", FETCH, seconds=20)
        except Failure:
            return False  # it is about to start or to end, or the API server hiccups: the next look tells
        found = re.search(rf"^{METRICS[step]}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)
        if found is None or float(found[1]) == 0:
            return False
        print(f"{step}: {pod} serves metrics: {METRICS[step]} is {float(found[1]):,.0f}", flush=True)
        return True

    def round(self, name: str, *, lose: bool) -> dict[str, str]:
        """Run all steps into folders named after the round; return the SHA-256 of each shard of samples, by name."""
        work = f"/work/{name}"
        images = self.setting("TOTAL_IMAGES")
        self.set(
            RUN=f"{work}/run",
            CKPT=f"{work}/run/checkpoints/{images:012}",  # the best one depends on when there was time to evaluate
            MODEL=f"{work}/model/model.onnx",
            PUBLISH=f"{work}/published",
            REPOSITORY=f"{work}/repository",
            SAMPLES=f"{work}/samples",
        )

        def seen(step: str) -> Callable[[], bool]:
            def look() -> bool:
                if not self.works(step, 0 if step == "train" else 1):  # rank 0 has the numbers of a run
                    return False
                if not lose:
                    return True
                if pod := self.pod(step, 1):
                    self.kubectl("-n", self.namespace, "delete", "pod", pod, "--grace-period=1", "--wait=false")
                    print(f"{step}: {pod} is deleted, with a second to end", flush=True)
                return bool(pod)

            look.__doc__ = "a pod at work" + (", to be deleted" if lose else ", with its metrics")
            return look

        for step in STEPS:
            self.run(step, during=seen(step) if step in METRICS else None)
        self.run("files")
        text = self.kubectl("-n", self.namespace, "exec", "files", "--", "cat", f"{work}/samples/manifest.json")
        shards = json.loads(text)["shards"]
        found, count = sum(shard["images"] for shard in shards), self.setting("COUNT")
        if found != count:
            raise Failure(f"the samples are {found:,}, and should be {count:,}")
        print(f"{name}: {found:,} samples in {len(shards)} shards, each read again by generate-merge", flush=True)
        return {shard["name"]: shard["sha256"] for shard in shards}

    def setting(self, key: str) -> int:
        """Return a number among the overlay's settings."""
        found = re.search(rf"^ *- {key}=(\d+)", (self.overlay / "edit/kustomization.yaml").read_text(), re.MULTILINE)
        assert found is not None, key
        return int(found[1])

    def collect(self, folder: Path) -> None:
        """Write logs, events and objects of the namespace to `folder`. What cannot be had is told in its file."""
        folder.mkdir(parents=True, exist_ok=True)
        own = ("-n", self.namespace)

        def keep(name: str, *arguments: str) -> None:
            try:
                text = self.kubectl(*own, *arguments)
            except Failure as error:
                text = f"{error}\n"
            (folder / name).write_text(text)

        keep("pods.txt", "get", "pods", "-o", "wide")
        keep("events.txt", "get", "events", "--sort-by", ".metadata.creationTimestamp")
        keep("objects.yaml", "get", "jobs,pods,persistentvolumeclaims,services,configmaps", "-o", "yaml")
        keep("describe.txt", "describe", "jobs,pods,persistentvolumeclaims")
        try:
            pods = self.kubectl(*own, "get", "pods", "-o", "name").split()
        except Failure:
            return
        for pod in pods:
            keep(f"{pod[4:]}.log", "logs", pod, "--all-containers", "--prefix", "--tail=5000")

    def clean(self) -> None:
        """Delete the namespace, with all that is in it, and wait until it is gone. Raises Failure if it stays."""
        try:
            self.run("down", "--volume", seconds=600)
        except Failure as error:
            n, command = self.namespace, " ".join(self.kubectl.command)
            raise Failure(
                f"the namespace {n} may be left ({error}); delete it: {command} -n {n} delete job --all; "
                f"{command} delete namespace {n}"
            ) from None


def rounds(trial: Trial) -> None:
    """Run both rounds and compare them. Raises Failure."""
    print("== once, undisturbed", flush=True)
    first = trial.round("undisturbed", lose=False)
    print("== once more, with a lost pod in training and in generation", flush=True)
    second = trial.round("disturbed", lose=True)
    if differ := sorted({name for name, _ in first.items() ^ second.items()}):
        raise Failure(f"the samples differ from the undisturbed ones: {len(differ)} shards, the first is {differ[0]}")
    minutes = (time.monotonic() - trial.began) / 60
    print(f"the samples are the same with lost pods as without: {len(first)} shards; {minutes:.0f} minutes", flush=True)


def run_trial(trial: Trial, logs: Path, *, keep: bool) -> int:
    """Run it, collect what tells of a failure, clean up; return the exit code."""
    code = 0
    try:
        try:
            rounds(trial)
        except Failure as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            code = error.code
            trial.collect(logs)
            print(f"logs, events and objects: {logs}", file=sys.stderr, flush=True)
        except Stopped as stopped:
            print("stopped; cleaning up", file=sys.stderr, flush=True)
            code = stopped.code
        if keep:
            name = trial.namespace
            print(f"left, as told: the namespace {name}. To delete it: kubectl delete namespace {name}")
        else:
            trial.clean()
    except Failure as error:
        print(f"error: {error}", file=sys.stderr)
        return code or 1
    except Stopped as stopped:
        print(f"error: stopped; the namespace {trial.namespace} may be left", file=sys.stderr)
        return stopped.code
    return code


class Stopped(BaseException):
    """SIGINT or SIGTERM came; `code` is 128 and its number."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.code = 128 + number


def stop(number: int, _: object) -> NoReturn:
    raise Stopped(number)


def main() -> int:
    """Read the options, check the cluster, run the trial."""
    about, _, more = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="trial.py", description=about, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("context", nargs="?", help="the current context, to say that the trial may run there")
    parser.add_argument("--image", help="the image that the nodes pull; default: that of overlays/cpu-demo/edit")
    parser.add_argument("--namespace", default="dcgan-trial", help="a namespace that is not there yet (%(default)s)")
    parser.add_argument("--minutes", type=float, default=90, help="for all of it (%(default)s)")
    parser.add_argument("--images", type=int, default=12_800, help="to train with, a multiple of BATCH (%(default)s)")
    parser.add_argument("--count", type=int, default=30_000, help="samples to generate (%(default)s)")
    parser.add_argument("--logs", type=Path, help="folder for what tells of a failure (NAMESPACE-logs)")
    parser.add_argument("--keep", action="store_true", help="leave the namespace as it is in the end")
    options = parser.parse_args()
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", options.namespace):
        parser.error(f"--namespace {options.namespace}: expected lower-case letters, digits and hyphens")
    if min(options.minutes, options.images, options.count) <= 0:
        parser.error("--minutes, --images and --count must be above 0")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        if options.image:
            image_line(options.image)
        context = current_context(options.context)
        kubectl = Kubectl(context)
        check_cluster(kubectl, context, options.namespace)
        print(f"context {context}, namespace {options.namespace}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            trial = Trial(Path(folder), kubectl, options)
            return run_trial(trial, options.logs or Path(f"{options.namespace}-logs"), keep=options.keep)
    except Failure as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except Stopped as stopped:
        return stopped.code


if __name__ == "__main__":
    sys.exit(main())
