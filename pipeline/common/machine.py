"""What this process may use of its machine, and which versions it runs."""

import ctypes
import os
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Literal

CGROUP = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


def available_cores() -> int:
    """Return the cores that this process may use: its affinity, or the CPU limit of its control group if that is lower.

    The limit is that of a container, or of a job on a shared machine. A part of a core counts as a whole one.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([cores, *(max(1, quota // period) for quota, period in _cpu_limits())])


def _cpu_limits() -> Iterator[tuple[int, int]]:
    """Yield (quota, period) of every limited control group that this process is in, in versions 1 and 2 of cgroups.

    In a container a group's path is often that of the host, where nothing is: then the container's is the uppermost.
    """
    own = {"": "/", "cpu": "/"}  # by controller; version 2 has one group for all of them
    with suppress(OSError, ValueError):
        for line in OWN_CGROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            own |= dict.fromkeys(controllers.split(","), path)
    for root, path, files in (
        (CGROUP, own[""], ("cpu.max",)),
        (CGROUP / "cpu", own["cpu"], ("cpu.cfs_quota_us", "cpu.cfs_period_us")),
    ):
        group = PurePosixPath("/", path)
        for folder in (group, *group.parents):
            with suppress(OSError, ValueError):  # "max" where version 2 has no limit
                quota, period = " ".join((root / folder.relative_to("/") / file).read_text() for file in files).split()
                if int(quota) > 0:  # -1 where version 1 has none
                    yield int(quota), int(period)


def available_threads() -> int:
    """Return OMP_NUM_THREADS where it is set, else the available cores."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return int(wanted) if wanted.isdigit() and int(wanted) else available_cores()


def cores_near(pci_address: str, system: Path = Path("/sys")) -> set[int]:
    """Return those cores of this process that lie on the NUMA node of a PCI device (`0000:3b:00.0`).

    Empty where the system has no such device, knows no node of it, or forbids all of that node's cores.
    """
    with suppress(OSError, ValueError):
        node = int((system / "bus/pci/devices" / pci_address / "numa_node").read_text())  # -1: not known
        cores: set[int] = set()
        for part in (system / f"devices/system/node/node{node}/cpulist").read_text().strip().split(","):
            first, _, last = part.partition("-")
            cores |= set(range(int(first), int(last or first) + 1))
        return cores & os.sched_getaffinity(0)
    return set()


def multiplies_bf16() -> bool:
    """Return whether the processor has instructions for products of bfloat16.

    AMX (Intel's servers since 2023), or AVX512-BF16 (AMD's since Zen 4).
    """
    return not {"amx_bf16", "avx512_bf16"}.isdisjoint(_processor_fields().get("flags", "").split())


class SignalStack(ctypes.Structure):
    """stack_t of Linux."""

    _fields_ = [("pointer", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]


NO_SIGNAL_STACK = 2  # SS_DISABLE


def use_no_signal_stack() -> None:
    """Let signal handlers run on this thread's ordinary stack, whatever alternate stack a library has set.

    OpenVINO's has 12 kB, as faulthandler's has: too few where AMX is in use, and the first signal that Python handles
    (Ctrl-C, SIGTERM) would be a segmentation fault.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).sigaltstack(ctypes.byref(SignalStack(None, NO_SIGNAL_STACK, 0)), None)


CPU_INFO = Path("/proc/cpuinfo")
PACKAGES_OF_DEVELOPMENT = ("dev", "interop")
"""Extras of pyproject.toml that take no part in anyone's result."""


def processor() -> str:
    """Return the name of the processor, as the system gives it."""
    with suppress(OSError):
        for line in CPU_INFO.read_text(errors="replace").splitlines():
            if line.startswith(("model name", "Model")) and ":" in line:
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


Instructions = Literal["amx", "avx512", "avx2", "other"]
_FLAGS: dict[str, Instructions] = {"amx_tile": "amx", "avx512f": "avx512", "avx2": "avx2"}
"""Flags of /proc/cpuinfo, the widest instructions first."""


def instructions() -> Instructions:
    """Return the widest vector instructions of the processor."""
    flags = _processor_fields().get("flags", "").split()
    return next((name for flag, name in _FLAGS.items() if flag in flags), "other")


def processor_kind() -> str:
    """Return the processor's name, family and model: clouds give several generations one name."""
    fields = _processor_fields()
    numbers = [f"{name} {fields[key]}" for name, key in (("family", "cpu family"), ("model", "model")) if key in fields]
    return ", ".join([processor(), *numbers])


def _processor_fields() -> dict[str, str]:
    """Return what /proc/cpuinfo says of the first processor; nothing where there is no such file."""
    with suppress(OSError):
        first = CPU_INFO.read_text(errors="replace").split("\n\n")[0]
        pairs = (line.partition(":") for line in first.splitlines())
        return {key.strip(): value.strip() for key, _, value in pairs}
    return {}


def imported_versions() -> dict[str, str]:
    """Return the versions of Python, of this project, and of those of its dependencies that this process has imported.

    Call it when the work is done: what is installed but did nothing is not there, and a new dependency is there by
    itself. Without the project's own metadata every imported package counts.
    """
    try:
        requirements = metadata.requires("dcgan-pipeline") or []
    except metadata.PackageNotFoundError:
        requirements = None
    found: dict[str, str] = {}
    for module, packages in metadata.packages_distributions().items():
        if sys.modules.get(module) is not None:
            found |= {_normal(package): metadata.version(package) for package in packages}
    if requirements is not None:
        ours = {_normal(re.split(r"[^A-Za-z0-9._-]", one)[0]) for one in requirements if not _is_for_development(one)}
        # TensorRT's packages are shells: what is imported comes from others, whose names begin with theirs.
        found = {name: found[name] for name in found if any(name == own or name.startswith(f"{own}-") for own in ours)}
    return versions() | dict(sorted(found.items()))


def _normal(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


def _is_for_development(requirement: str) -> bool:
    return any(re.search(rf"extra == .{extra}.", requirement) for extra in PACKAGES_OF_DEVELOPMENT)


def versions(*packages: str) -> dict[str, str]:
    """Return the installed versions of `packages`, of Python and of this project."""
    found = {"python": platform.python_version()}
    for package in ("dcgan-pipeline", *packages):
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
