"""Whether an NVIDIA driver is here, asked without any library that crashes when it is not."""

import ctypes
from functools import cache


@cache
def driver_version() -> str | None:
    """Return the CUDA version that the installed driver supports, such as 13.0, or None when no GPU can be used.

    `tensorrt.Runtime()` can end Python by a signal where there is no driver: ask here first.
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
