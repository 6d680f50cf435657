"""Print the extra of pyproject.toml that fits this machine: cuda13, cuda12, or nvrtc where there is no usable GPU."""

import ctypes
import sys
from pathlib import Path


def driver_version() -> int:
    """CUDA version of the driver as an int (13000 = 13.0); 0 without a driver or a device."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count, version = ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or count.value == 0:
        return 0
    return 0 if driver.cuDriverGetVersion(ctypes.byref(version)) else version.value


def main() -> int:
    """Print the extra; status 1 where the driver is too old for any of them."""
    version = driver_version()
    if version == 0:
        if Path("/dev/nvidia0").exists():
            print("warning: /dev/nvidia0 exists, but its driver does not start: set up without a GPU", file=sys.stderr)
        print("nvrtc")
        return 0
    if version < 12000:
        print(f"error: the NVIDIA driver is for CUDA {version // 1000}; expected 12 or newer", file=sys.stderr)
        return 1
    print("cuda13" if version >= 13000 else "cuda12")
    return 0


if __name__ == "__main__":
    sys.exit(main())
