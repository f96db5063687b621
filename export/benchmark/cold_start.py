"""Time and peak memory of a fresh process until its first images.

python -m export.benchmark.cold_start '{"model": "model.onnx", "backend": "openvino", "batch": 64}' cpu
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SECONDS_AT_MOST = 300


def measure(
    model: str, backend: str, batch: int, threads: int | None, precision: str, on_gpu: bool
) -> dict[str, float] | None:
    """Return "cold_start_seconds", "peak_bytes" and, on a GPU, "device_bytes" of a fresh process; None on failure."""
    options = {"model": model, "backend": backend, "batch": batch, "threads": threads, "precision": precision}
    command = [sys.executable, "-m", "export.benchmark.cold_start", json.dumps(options), "gpu" if on_gpu else "cpu"]
    began = time.perf_counter()
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_AT_MOST, check=True)
    except subprocess.SubprocessError:
        return None
    seconds = time.perf_counter() - began
    return {"cold_start_seconds": seconds, **json.loads(result.stdout.splitlines()[-1])}


def main(options: dict[str, Any], device: str) -> None:
    """Open a sampler, make one block, and print the peak memory of this process, on the host and on the GPU.

    GPU memory is the difference to before the sampler was opened. So it excludes other processes and the CUDA context
    of this one, some hundred MB that every backend needs.
    """
    import numpy as np

    from export.samplers.open import open_sampler

    free = _free_on_gpu() if device == "gpu" else 0
    with open_sampler(**options) as sampler:
        sampler.sample(np.zeros((sampler.batch, sampler.row_dim), np.float32))
        used = {"peak_bytes": _peak_bytes()}
        if device == "gpu":
            used["device_bytes"] = free - _free_on_gpu()
    print(json.dumps(used))


def _free_on_gpu() -> int:
    import torch

    free, _ = torch.cuda.mem_get_info()
    return free


def _peak_bytes() -> int:
    """Return the peak memory of this program. `getrusage` would include the process that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2])
