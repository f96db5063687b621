"""`make gpu-check` says "passed" only of what was really checked on a GPU."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from export.format.driver import driver_version

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_check.py"


@pytest.fixture(scope="module")
def gpu_check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(driver_version() is not None, reason="needs a machine without an NVIDIA driver")
def test_it_explains_itself_without_a_gpu(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, tmp_path / "out"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (69, "")
    assert done.stderr.startswith("error: gpu-check has nothing to check: no NVIDIA GPU that PyTorch ")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_gpu_that_pytorch_cannot_use_is_none(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A driver and a CPU build of PyTorch: every test would be skipped, and nothing fail."""
    monkeypatch.setattr("export.format.tensorrt_library.driver_version", lambda: "13.0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", str(tmp_path / "out")])
    assert gpu_check.main() == 69
    assert "install a CUDA build of PyTorch" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def junit(*skips: str | None) -> str:
    cases = [f'<testcase><skipped message="{skip}"/></testcase>' if skip else "<testcase/>" for skip in skips]
    return f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>"


@pytest.mark.parametrize(
    ("skips", "result"),
    [
        ((None, None), "passed"),
        ((None, "not possible: TensorRT-RTX does not run on this GPU"), "passed"),
        ((None, "pip install tensorrt-cu13"), "incomplete"),
        (("not possible: here", "not possible: either"), "incomplete"),
        ((), "incomplete"),
    ],
)
def test_skipped_tests_are_counted(gpu_check: ModuleType, skips: tuple[str | None, ...], result: str) -> None:
    counted = gpu_check.counted({"step": "tests", "result": "passed"}, junit(*skips))
    assert (counted["result"], counted["tests"]) == (result, len(skips))
    assert counted["skipped"] == len([skip for skip in skips if skip])


def test_a_missing_library_is_not_passed(gpu_check: ModuleType) -> None:
    """`trt` ends with 69 where TensorRT is missing."""
    steps = [gpu_check.step(str(code), [sys.executable, "-c", f"raise SystemExit({code})"]) for code in (0, 69, 65)]
    assert [step["result"] for step in steps] == ["passed", "incomplete", "failed"]
    assert gpu_check.verdict(steps[:1]) == "passed"
    assert gpu_check.verdict(steps[:2]) == "incomplete"
    assert gpu_check.verdict(steps) == "failed"
