"""Argument checks that the LoRA ops share. A check raises before anything is written."""

from __future__ import annotations

import numbers
import operator
from typing import Any, Final

import numpy as np

from . import _arrays, _env, _jit
from ._arrays import CPU, FLOAT32, HALVES, INDICES, Array, check_contiguous, check_dtype, check_shape, view

MAX_RANK: Final = 1024


def real(name: str, value: Any) -> float:
    """A real scalar as a float; TypeError for anything else, arrays included."""
    if type(value) is float:
        return value
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a real number, got {type(value).__name__}")
    return float(value)


def integer(name: str, value: Any, least: int, most: int | None = None) -> int:
    """An integer in ``least .. most``; TypeError for another type, ValueError outside the range."""
    if type(value) is not int:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
        try:
            value = operator.index(value)
        except TypeError:
            raise TypeError(f"{name}: expected an integer, got {type(value).__name__}") from None
    if value < least or (most is not None and value > most):
        limits = f"of at least {least}" if most is None else f"in {least} .. {most}"
        raise ValueError(f"{name}: expected an integer {limits}, got {value}")
    return int(value)


def rows(name: str, obj: Any) -> Array:
    """A 2-D array whose rows are contiguous and do not overlap; the rows may be any distance apart."""
    array = view(name, obj)
    if array.ndim != 2:
        raise ValueError(f"{name}: expected 2 dimensions (rows, columns), got shape {array.shape}")
    count, width = array.shape
    if (width > 1 and array.strides[1] != 1 and count) or (count > 1 and array.strides[0] < width):
        raise ValueError(
            f"{name}: expected contiguous rows that do not overlap, got shape {array.shape} "
            f"with strides {array.strides} (elements)"
        )
    return array


def stacked(name: str, obj: Any) -> Array:
    """Weights ``(n, p, q)`` or ``(n, 1, p, q)``, fp16 or bf16, contiguous; the shape of the result is as passed."""
    array = view(name, obj)
    check_dtype(name, array, HALVES)
    if array.ndim not in (3, 4) or (array.ndim == 4 and array.shape[1] != 1):
        raise ValueError(f"{name}: expected shape (n, rows, columns) or (n, 1, rows, columns), got {array.shape}")
    if 0 in array.shape[1:]:
        raise ValueError(f"{name}: expected a rank and a width of at least 1, got shape {array.shape}")
    check_contiguous(name, array)
    return array


def check_rank(name: str, rank: int) -> None:
    """ValueError above the largest rank that the kernels hold on the chip."""
    if rank > MAX_RANK:
        raise ValueError(f"{name}: expected a rank of at most {MAX_RANK}, got {rank}")


def indices(name: str, obj: Any, length: int | None = None) -> Array:
    """A contiguous vector of int32 or int64, of the given length."""
    array = view(name, obj)
    check_dtype(name, array, INDICES)
    check_shape(name, array, ("n" if length is None else length,))
    check_contiguous(name, array)
    return array


def check_mix(name: str, array: Array, weights_name: str, dtype: np.dtype[Any], *, also_float32: bool) -> None:
    """TypeError unless the array has the weights' dtype (or float32, where that is allowed)."""
    if array.dtype != dtype and not (also_float32 and array.dtype == FLOAT32):
        either = " or float32" if also_float32 else ""
        raise TypeError(f"{name}: expected the dtype of {weights_name} ({dtype.name}){either}, got {array.dtype.name}")


def host_copy(array: Array) -> np.ndarray:
    """The array's values in host memory; waits for the device where it is on one (debug checks, loop path)."""
    if array.device == CPU:
        return array.numpy()
    return on_device(array).get(stream=_arrays.stream_for(array.device, array.obj))  # type: ignore[no-any-return]


def on_device(array: Array) -> Any:
    """The GPU array as a CuPy array over the same memory."""
    cupy = _jit._cupy()
    if isinstance(array.obj, cupy.ndarray):
        return array.obj
    low, high = array.span
    memory = cupy.cuda.UnownedMemory(low, high - low, array.obj, array.device)
    pointer = cupy.cuda.MemoryPointer(memory, array.ptr - low)
    strides = tuple(stride * array.dtype.itemsize for stride in array.strides)
    return cupy.ndarray(array.shape, array.dtype, memptr=pointer, strides=strides)


def debug_slots(name: str, array: Array, count: int) -> None:
    """Under ``CUPY_LORA_DEBUG=1``: ValueError that names the first index of no adapter's. Waits for the device."""
    if not _env.DEBUG.on:
        return
    bad = np.flatnonzero(host_copy(array) >= count)
    if bad.size:
        first = int(bad[0])
        raise ValueError(
            f"{name}: expected slots below {count} (negative: no adapter), got {int(host_copy(array)[first])} "
            f"in row {first}"
        )


def check_segments(starts_name: str, starts: np.ndarray, lengths_name: str, lengths: np.ndarray, num_rows: int) -> None:
    """ValueError for a negative segment, one that leaves the rows, or two that overlap (values in host memory)."""
    bad = np.flatnonzero(lengths < 0)
    if bad.size:
        raise ValueError(f"{lengths_name}: expected lengths of at least 0, got {int(lengths[bad[0]])} at {int(bad[0])}")
    full = np.flatnonzero(lengths > 0)
    first = starts[full].astype(np.int64)
    last = first + lengths[full].astype(np.int64)
    bad = np.flatnonzero((first < 0) | (last > num_rows))
    if bad.size:
        at = int(bad[0])
        raise ValueError(
            f"{starts_name}: expected segments within the {num_rows} rows, "
            f"got rows {first[at]} to {last[at]} at {full[at]}"
        )
    order = np.argsort(first, kind="stable")
    bad = np.flatnonzero(first[order][1:] < last[order][:-1])
    if bad.size:
        one, two = full[order[bad[0]]], full[order[bad[0] + 1]]
        raise ValueError(f"{starts_name}: expected segments that do not overlap, got {one} and {two} overlapping")
