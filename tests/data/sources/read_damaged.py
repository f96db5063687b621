"""Reads damaged files one after another, in a process of its own, and says of each what came of it.

A line of standard input names a file or a container; the answer is a line of standard output. What takes longer than
PATIENCE_SECONDS ends the process, with the stack on standard error.
"""

import faulthandler
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pipeline.common.imaging import BadImage
from pipeline.data.build.transform import Recipe
from pipeline.data.cli import main
from pipeline.data.dataset import open_dataset
from pipeline.data.sources.interface import Item

PATIENCE_SECONDS = 60
"""For one file: a generous multiple of the 5 seconds that it may take on a machine that does nothing else."""
RECIPE = Recipe(
    size=16, channels=3, encoding="packed", quality=100, min_side=1, all_frames=True, window="percentile:0,100"
)


def read_picture(path: str) -> dict[str, Any]:
    """Decode all images in a file."""
    try:
        return {"images": len(RECIPE.make(Item("a", (), None), Path(path).read_bytes())), "refused": 0}
    except BadImage as error:
        return {"images": 0, "refused": 1, "said": str(error)}


def build(words: list[str], out: str) -> dict[str, Any]:
    """Build a container; return the exit code, what was printed, and the counts."""
    sys.argv = ["dcgan-data", "build", *words]
    with tempfile.TemporaryFile() as printed:
        stderr = os.dup(2)
        os.dup2(printed.fileno(), 2)
        try:
            main()
            code: Any = 0
        except SystemExit as stop:
            code = stop.code or 0
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
        printed.seek(0)
        said = printed.read().decode("utf-8", "replace")
    if code:
        return {"code": code, "said": said, "left": os.path.exists(f"{out}/dataset.json")}
    dataset = open_dataset(out)
    shutil.rmtree(out)
    lost = any(reason.startswith("lost") for reason in dataset.refused.reasons)
    return {"code": 0, "said": said, "images": dataset.images, "refused": dataset.refused.count, "lost": lost}


def serve() -> None:
    """Answer until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for line in sys.stdin:
        task = json.loads(line)
        Path("/proc/self/clear_refs").write_text("5")  # the peak of memory begins anew
        faulthandler.dump_traceback_later(PATIENCE_SECONDS, exit=True)
        began = time.perf_counter()
        result = read_picture(task["path"]) if "path" in task else build(task["words"], task["out"])
        faulthandler.cancel_dump_traceback_later()
        peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        result |= {"seconds": time.perf_counter() - began, "peak": int(peak.split()[1]) << 10}
        print(json.dumps(result), file=answers)


if __name__ == "__main__":
    serve()
