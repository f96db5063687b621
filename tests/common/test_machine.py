"""The cores that a process may use, and what records say of the machine and of the packages that did the work."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

from pipeline.common import machine
from pipeline.common.machine import available_cores, available_threads, cores_near, imported_versions, processor

CORES = "from pipeline.common.machine import available_cores; print(available_cores())"


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 16),
        ({"cpu.max": "max 100000\n"}, 16),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "350000 100000\n"}, 3),
        ({"cpu.max": "9900000 100000\n"}, 16),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 16),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
    ],
    ids=["no cgroup", "no limit", "half a core", "3.5 cores", "more than there are", "v1, no limit", "v1, 2 cores"],
)
def test_cores_are_those_of_the_containers_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], cores: int
) -> None:
    """64 threads that share half a core sample at a fiftieth of the rate."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert available_cores() == available_threads() == cores
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert available_threads() == 5, "what a person says, for all libraries"


@pytest.mark.parametrize(
    ("own", "limits", "cores"),
    [
        ("0::/job/step\n", {"job/step/cpu.max": "max 100000", "job/cpu.max": "300000 100000"}, 3),
        ("0::/host/pod7\n", {"cpu.max": "400000 100000"}, 4),  # the host's path, inside the container
        (
            "4:cpu,cpuacct:/slurm/job\n0::/\n",
            {
                "cpu/slurm/job/cpu.cfs_quota_us": "600000",
                "cpu/slurm/job/cpu.cfs_period_us": "200000",
                "cpu/cpu.cfs_quota_us": "500000",
                "cpu/cpu.cfs_period_us": "100000",
            },
            3,
        ),
    ],
    ids=["v2, of a job around it", "v2, of the container", "v1, its own and one around it"],
)
def test_the_limits_of_all_groups_around_a_process_count(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own: str, limits: dict[str, str], cores: int
) -> None:
    for name, content in limits.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content + "\n")
    (tmp_path / "own").write_text(own)
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(machine, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert available_cores() == cores


@pytest.fixture
def half_a_core() -> Iterator[Path]:
    """A control group of half a CPU, of whichever version this machine has; the file that takes processes in."""
    for root, limits in (
        ("/sys/fs/cgroup", {"cpu.max": "50000 100000"}),
        ("/sys/fs/cgroup/cpu", {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "50000"}),
    ):
        group = Path(root) / f"dcgan-test-{os.getpid()}"
        with suppress(OSError):
            group.mkdir()
            try:
                for name, limit in limits.items():
                    if not (group / name).exists():
                        raise FileNotFoundError(name)
                    (group / name).write_text(limit)
                yield group / "cgroup.procs"
                return
            finally:
                group.rmdir()
    pytest.skip("needs root, and a control group that may be divided")


def test_a_real_control_group_counts(half_a_core: Path) -> None:
    join = f"echo $$ > {half_a_core} && exec {sys.executable} -c '{CORES}'"
    done = subprocess.run(["sh", "-c", join], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


def test_the_affinity_counts() -> None:
    command = f"import os; os.sched_setaffinity(0, {{{min(os.sched_getaffinity(0))}}}); {CORES}"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


def test_versions_are_those_of_what_was_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    monkeypatch.setitem(sys.modules, "openvino", ModuleType("openvino"))
    found = imported_versions()
    assert found["openvino"] == metadata.version("openvino")
    assert found["numpy"] == metadata.version("numpy")
    assert found["dcgan-pipeline"] == metadata.version("dcgan-pipeline")
    assert "onnxruntime" not in found, "installed, but it did nothing"
    assert not {"pytest", "ruff", "mypy", "pluggy"} & set(found)


def test_without_the_metadata_of_the_project_every_import_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    assert {"numpy", "pytest"} <= set(imported_versions())


def test_the_processor_has_a_name() -> None:
    assert processor().strip()


def test_cores_near_a_device_are_those_of_its_numa_node_that_the_process_may_use(tmp_path: Path) -> None:
    mine = os.sched_getaffinity(0)
    for address, node in (("0000:3b:00.0", "1"), ("0000:af:00.0", "-1"), ("0000:d8:00.0", "2")):
        (tmp_path / "bus/pci/devices" / address).mkdir(parents=True)
        (tmp_path / "bus/pci/devices" / address / "numa_node").write_text(f"{node}\n")
    first, other = min(mine), max(mine) + 100
    for node, cores in (("1", f"{first},{other}-{other + 3}"), ("2", f"{other}-{other + 3}")):
        (tmp_path / f"devices/system/node/node{node}").mkdir(parents=True)
        (tmp_path / f"devices/system/node/node{node}/cpulist").write_text(f"{cores}\n")
    assert cores_near("0000:3b:00.0", tmp_path) == {first}
    for unknown in ("0000:af:00.0", "0000:d8:00.0", "0000:00:00.0", ""):
        assert cores_near(unknown, tmp_path) == set()
