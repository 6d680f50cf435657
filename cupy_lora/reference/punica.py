"""The LoRA functions of the drop-in module over NumPy: weights behind host addresses, float64 inside, one rounding."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np


def weights_at(pointer: int, layer_idx: int, shape: tuple[int, int], dtype: np.dtype[Any]) -> np.ndarray | None:
    """One layer's matrix behind a host address; None for an address that the kernels take for no adapter."""
    if pointer == 0 or pointer % 16:
        return None
    count = shape[0] * shape[1]
    memory = (ctypes.c_uint8 * (count * dtype.itemsize)).from_address(pointer + layer_idx * count * dtype.itemsize)
    return np.ctypeslib.as_array(memory).view(dtype).reshape(shape)


def _add(y: np.ndarray, x: np.ndarray, matrix: np.ndarray, scale: float) -> None:
    y[...] = (y.astype(np.float64) + scale * (x.astype(np.float64) @ matrix.astype(np.float64))).astype(y.dtype)


def dispatch_bgmv(
    y: np.ndarray,
    x: np.ndarray,
    w_ptr: np.ndarray,
    indicies: np.ndarray,
    layer_idx: int,
    scale: float,
    dtype: np.dtype[Any],
) -> None:
    """See :func:`cupy_lora.punica_kernels.dispatch_bgmv`; ``dtype`` of the weights."""
    for row, slot in enumerate(indicies.tolist()):
        if 0 <= slot < w_ptr.shape[0]:
            matrix = weights_at(int(w_ptr[slot]), layer_idx, (y.shape[1], x.shape[1]), dtype)
            if matrix is not None:
                _add(y[row], x[row], matrix.T, scale)


def sgmv(
    y: np.ndarray,
    x: np.ndarray,
    w_ptr: np.ndarray,
    s_start: np.ndarray,
    s_end: np.ndarray,
    layer_idx: int,
    dtype: np.dtype[Any],
    transposed: bool,
) -> None:
    """``sgmv_cutlass`` (``transposed``: weights in by out) and ``sgmv_shrink`` (out by in)."""
    shape = (x.shape[1], y.shape[1]) if transposed else (y.shape[1], x.shape[1])
    for pointer, start, end in zip(w_ptr.tolist(), s_start.tolist(), s_end.tolist(), strict=True):
        rows = slice(start, min(end, x.shape[0]))
        matrix = weights_at(pointer, layer_idx, shape, dtype)
        if 0 <= start < rows.stop and matrix is not None:
            _add(y[rows], x[rows], matrix if transposed else matrix.T, 1.0)
