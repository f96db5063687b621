"""A demo of the metrics on one machine: `python -m deploy.prometheus.demo` (make metrics-demo). Ctrl-C stops it.

Starts Prometheus, builds a data set from the bundled faces, trains a small GAN in two processes, generates samples
from its checkpoints again and again, and draws the dashboards at http://127.0.0.1:8900.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated

import typer

from pipeline.common.command_line import plain_app, run_command
from pipeline.common.errors import UnavailableError, UsageError

app = plain_app(completion=False)

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[2]
SCRAPE_SECONDS = 2
TRAINING = {
    "network.width": 16,
    "schedule.log_every_images": 320,
    "schedule.checkpoint_every_images": 3200,
    "schedule.evaluate_every_images": 6400,
    "schedule.evaluate_samples": 256,
}
PORTS = {"train": 9105, "generate": 9106, "build": 9107}


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for all files; emptied first.")] = Path("build/metrics-demo"),
    data: Annotated[str, typer.Option(help="Data set to build shards from and train on.")] = "data/faces",
    port: Annotated[int, typer.Option(help="Port of the page with the dashboards.")] = 8900,
    prometheus_port: Annotated[int, typer.Option(help="Port of Prometheus; 0 lets the system choose.")] = 9190,
) -> None:
    """Watch a build, a training run and generations with the real Prometheus, until Ctrl-C."""
    from deploy.prometheus.servers import Monitoring

    if out.exists() and not (out / "prometheus").is_dir() and any(out.iterdir()):
        raise UsageError(f"--out {out}: not empty, and not the folder of an earlier demo; choose another")
    shutil.rmtree(out, ignore_errors=True)
    folder = out / "prometheus"
    folder.mkdir(parents=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    with ExitStack() as stack:
        monitoring = stack.enter_context(
            Monitoring(folder.resolve(), port=prometheus_port, scrape=f"{SCRAPE_SECONDS}s")
        )
        for name, its_port in PORTS.items():
            monitoring.watch(name, its_port)
        server = stack.enter_context(_page(monitoring, port))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        stack.callback(server.shutdown)
        print(f"dashboards   http://127.0.0.1:{port}\nPrometheus   http://{monitoring.address}\nstop         Ctrl-C")
        try:
            _work(out, data, monitoring.gateway)
        except KeyboardInterrupt:
            print("\nstopping")


def _page(monitoring: object, port: int) -> ThreadingHTTPServer:
    from deploy.grafana.dashboards import DASHBOARDS
    from deploy.grafana.page import render

    began = time.time()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.lstrip("/") or next(iter(DASHBOARDS))
            if name not in DASHBOARDS:
                self.send_error(404)
                return
            window = min(max(time.time() - began, 60), 3600)
            page = render(name, monitoring, scrape_seconds=SCRAPE_SECONDS, window_seconds=window)  # type: ignore[arg-type]
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(page.encode())

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    try:
        return ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise UsageError(f"--port {port}: cannot listen there ({error.strerror}); choose another") from None


def _work(out: Path, data: str, gateway: str) -> None:
    """Build, then train, and generate again and again until training ends; then wait for Ctrl-C."""

    def metrics(program: str) -> list[str]:
        return ["--metrics-port", str(PORTS[program]), "--push-gateway", gateway]

    shards, run = str(out / "data"), out / "run"
    if code := _run("dcgan-data", "build", "webdataset", data, shards, *metrics("build")):
        raise UnavailableError(f"dcgan-data exited with code {code}; its message is above")
    settings = [f"{key}={value}" for key, value in TRAINING.items()]
    command = [str(BIN / "dcgan-launch"), "--processes", "2", "train", "--data", shards, "--out", str(run)]
    trainer = subprocess.Popen(
        [*command, "--preset", "demo", *settings, *metrics("train")],
        cwd=ROOT,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        samples = out / "samples"
        while True:
            if any(run.glob("checkpoints/*/state.json")) and trainer.poll() is None:
                shutil.rmtree(samples, ignore_errors=True)
                size = ["--count", "6000", "--shard-images", "500", "--out", str(samples)]
                _run("dcgan-generate", "--model", str(run), *size, *metrics("generate"))
            time.sleep(10)
    finally:
        if trainer.poll() is None:
            trainer.terminate()
            trainer.wait()


def _run(program: str, *options: str) -> int:
    return subprocess.run([str(BIN / program), *options], cwd=ROOT, check=False).returncode


def main() -> None:
    """Entry point of the demo."""
    run_command(app)


if __name__ == "__main__":
    main()
