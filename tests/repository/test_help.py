"""--help of every command and subcommand is quick: it imports nothing heavy."""

import subprocess
import sys

import pytest
from support import ROOT

HEAVY = ("torch", "scipy", "sklearn", "onnx", "onnxruntime", "matplotlib", "cv2", "tensorrt", "accelerate", "lmdb")
PROGRAMS = {
    "train.py": "import runpy; runpy.run_path('pipeline/train.py', run_name='__main__')",
    "dcgan-data": "from pipeline.data.cli import main; main()",
    "dcgan-eval": "from pipeline.evaluation.cli import main; main()",
    "dcgan-export": "from export.cli import main; main()",
    "dcgan-generate": "from deploy.generate import main; main()",
    "dcgan-launch": "from deploy.launch import main; main()",
}
SUBCOMMANDS = [
    ("train.py", ""),
    ("dcgan-launch", ""),
    ("dcgan-generate", ""),
    ("dcgan-generate", "merge"),
    *(("dcgan-data", name) for name in ("", "build", "verify", "show", "merge", "clear", "dedup")),
    *(("dcgan-export", name) for name in ("", "onnx", "trt", "triton", "verify", "bench", "inspect")),
    *(("dcgan-eval", name) for name in ("", "swd", "fid", "probe", "arithmetic", "features", "report")),
]


@pytest.mark.parametrize(("program", "subcommand"), SUBCOMMANDS)
def test_help_imports_nothing_heavy(program: str, subcommand: str) -> None:
    arguments = [program, *([subcommand] if subcommand else []), "--help"]
    code = (
        f"import sys; sys.argv={arguments!r}\n"
        f"try:\n    {PROGRAMS[program]}\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        f"found = [name for name in {HEAVY!r} if name in sys.modules]\nassert not found, found\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-800:]
    assert "Usage:" in done.stdout
