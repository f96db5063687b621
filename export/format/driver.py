"""Whether an NVIDIA driver is installed, asked without any library that crashes if it is not."""

import ctypes
from functools import cache


@cache
def driver_version() -> str | None:
    """Return the CUDA version that the installed driver supports, for example 13.0, or None if no GPU can be used.

    `tensorrt.Runtime()` can kill Python by a signal if there is no driver, so ask here first.
    """
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    count, version = ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return None
    if cuda.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"
