"""From checked arrays to launches: the LoRA functions of the drop-in module, whose weights are behind pointers."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np

from ._arrays import INT64, Array
from ._jit import DeviceFacts, Launch
from ._lora_choice import choose_halves, chunk_of
from ._lora_plan import _MAX_GRID_YZ, Defines, _half_defines, _half_kernel, _row_stride

SHRINK: Final = 1
EXPAND: Final = 2


def phase_of(width_in: int, width_out: int) -> int:
    """Expand where the output is the wider one, as the original decides."""
    return EXPAND if width_in < width_out else SHRINK


def _pointer_defines(
    phase: int, config: Any, x: Array, y: Array, dtype: np.dtype[Any], rank: int, width: int, transposed: bool
) -> Defines:
    """Macros for ``y += x W^T`` with one matrix (rank by width) per pointer, pointers multiples of 16 bytes."""
    # Two slots in a row: what the alignment of the first layer says of the others.
    stack = Array(0, (2, rank, width), (rank * width, width, 1), dtype, x.device, None)
    values = dict(_half_defines(phase, config, x, stack, y, rank, width, add=True, offset=0))
    values.update(POINTERS=1, TRANSPOSED=int(transposed))
    if transposed:  # neighbours in a column are not neighbours in memory
        values.update(A_VECTORS=0, B_VECTORS=0)
    return tuple(sorted(values.items()))


def bgmv(
    y: Array,
    x: Array,
    w_ptr: Array,
    indices: Array,
    layer_idx: int,
    scale: float,
    dtype: np.dtype[Any],
    facts: DeviceFacts,
) -> Launch:
    """Launch of ``dispatch_bgmv``; weights ``[layers, out, in]`` of ``dtype``."""
    tokens, width_in = x.shape
    width_out = y.shape[1]
    phase = phase_of(width_in, width_out)
    rank, width = (width_out, width_in) if phase == SHRINK else (width_in, width_out)
    chunks = math.ceil(rank / chunk_of(rank)) if phase == SHRINK else 1
    config = choose_halves(rank, tokens * chunks, facts)
    defines = (
        *_pointer_defines(phase, config, x, y, dtype, rank, width, False),
        ("INDEX_64", int(indices.dtype == INT64)),
    )
    kernel = _half_kernel("bgmv", "bgmv_shrink" if phase == SHRINK else "bgmv_expand", phase, config, rank, defines)
    layer = np.int64(layer_idx * rank * width)
    args = (x, None, w_ptr, y, indices, np.int32(w_ptr.shape[0]), np.int64(0), layer, _row_stride(x), _row_stride(y))
    return Launch(kernel, (tokens * config.cluster, chunks, 1), (*args, np.float32(scale)))


def sgmv(
    y: Array,
    x: Array,
    w_ptr: Array,
    starts: Array,
    ends: Array,
    layer_idx: int,
    dtype: np.dtype[Any],
    facts: DeviceFacts,
    *,
    phase: int,
    transposed: bool,
) -> Launch:
    """Launch of ``sgmv_cutlass`` (weights ``[layers, in, out]``: transposed) or ``sgmv_shrink`` (out by in)."""
    tokens, width_in = x.shape
    width_out, segments = y.shape[1], starts.shape[0]
    rank, width = (width_out, width_in) if phase == SHRINK else (width_in, width_out)
    chunks = math.ceil(rank / chunk_of(rank)) if phase == SHRINK else 1
    config = choose_halves(rank, math.ceil(tokens / 8) * chunks, facts)
    defines = (
        *_pointer_defines(phase, config, x, y, dtype, rank, width, transposed),
        ("INDEX_64", 0),
        ("START_64", int(starts.dtype == INT64)),
        ("LENGTH_64", int(ends.dtype == INT64)),
        ("ENDS", 1),
    )
    kernel = _half_kernel("sgmv", "sgmv", phase, config, rank, defines)
    # Segment lengths are on the device: blocks for twice the mean, longer segments are walked over.
    tiles = (
        max(1, math.ceil(2 * tokens / (config.rows * segments))) if segments > 1 else math.ceil(tokens / config.rows)
    )
    grid = (tiles * config.cluster, chunks, min(segments, _MAX_GRID_YZ))
    layer = np.int64(layer_idx * rank * width)
    counts = (np.int32(segments), np.int64(tokens), np.int32(w_ptr.shape[0]))
    strides = (np.int64(0), layer, _row_stride(x), _row_stride(y))
    return Launch(kernel, grid, (x, None, w_ptr, y, starts, ends, None, *counts, *strides, np.float32(1.0)))
