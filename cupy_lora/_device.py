"""Which device an object of the library lives on when the caller does not say."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from . import _arrays, _jit
from ._arrays import CPU
from ._lora_checks import integer


@functools.cache
def has_gpu_kernels() -> bool:
    """Whether CuPy is installed and sees a GPU that the kernels run on (compute capability 8.0 or newer)."""
    try:
        import cupy

        count = cupy.cuda.runtime.getDeviceCount()
    except Exception:  # no CuPy, no driver or no device: each raises its own type
        return False
    if count == 0:
        return False
    return int(cupy.cuda.Device().compute_capability) >= _jit.OLDEST_ARCH


def resolve(device: Any) -> int:
    """The ``device=`` argument as a number: -1 for ``"cpu"``, the current GPU (or the host) for None.

    Raises
    ------
    TypeError, ValueError
        For anything but None, ``"cpu"`` and the number of a GPU of this machine.
    """
    if device is None:
        return int(_jit._cupy().cuda.runtime.getDevice()) if has_gpu_kernels() else CPU
    if isinstance(device, str):
        if device == "cpu":
            return CPU
        raise ValueError(f"device: expected None, 'cpu' or the number of a GPU, got {device!r}")
    number = integer("device", device, 0)
    if not has_gpu_kernels():
        raise ValueError(f"device: expected None or 'cpu' on a machine without a usable GPU, got {number}")
    integer("device", number, 0, int(_jit._cupy().cuda.runtime.getDeviceCount()) - 1)
    _jit.device_arch(number)
    return number


def filled(shape: tuple[int, ...], dtype: np.dtype[Any], device: int, value: int) -> Any:
    """A new integer array of 0 or -1, there for every stream: waits for the device once."""
    array = _arrays.empty(shape, dtype, device)
    if device == CPU:
        array.fill(value)
        return array
    cupy = _jit._cupy()
    with cupy.cuda.Device(device):
        # Both are bytes that repeat. CuPy's own fill compiles a kernel for -1, at a process's first use.
        array.data.memset_async({0: 0, -1: 0xFF}[value], array.nbytes)
        cupy.cuda.get_current_stream().synchronize()
    return array


def capturing(stream: Any) -> bool:
    """Whether work on this stream is being captured into a graph."""
    return bool(_jit._cupy().cuda.runtime.streamIsCapturing(stream.ptr))


@contextlib.contextmanager
def on(device: int, stream: Any) -> Iterator[Any]:
    """CuPy with this device and stream as the current ones.

    Not ``with stream:``, which forgets a stream that the caller has chosen by ``Stream.use()``.
    """
    cupy = _jit._cupy()
    with cupy.cuda.Device(device):
        before = cupy.cuda.get_current_stream(device)
        stream.use()
        try:
            yield cupy
        finally:
            before.use()
