"""LoRA over NumPy, one matrix product per adapter: float64 inside, one rounding when the result is stored.

The helpers take the array module, so that the loop path on a GPU (``DISABLE_SGMV=1``) is the same code over CuPy.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ..lora_batch import LoraBatch
    from ..lora_weights import LoraWeights

Array = Any  # a NumPy array, or a CuPy array where the array module is CuPy


def groups(slots: np.ndarray, count: int) -> Iterator[tuple[int, np.ndarray]]:
    """Each slot of 0 .. count - 1 that occurs, with its rows in ascending order."""
    valid = np.flatnonzero((slots >= 0) & (slots < count))
    order = valid[np.argsort(slots[valid], kind="stable")]
    found, first = np.unique(slots[order], return_index=True)
    for slot, rows in zip(found, np.split(order, first)[1:], strict=True):
        yield int(slot), rows


def segment_slots(
    starts: np.ndarray, lengths: np.ndarray, slots: np.ndarray, num_rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """Slot of each row (-1: none), and whether a segment covers it; what lies beyond the rows is left out."""
    row_slots = np.full(num_rows, -1, np.int64)
    covered = np.zeros(num_rows, np.bool_)
    for start, length, slot in zip(starts.tolist(), lengths.tolist(), slots.tolist(), strict=True):
        rows = slice(max(start, 0), max(start + length, 0))
        row_slots[rows] = slot
        covered[rows] = True
    return row_slots, covered


def shrink_rows(
    xp: Any, real: Any, x: Array, a: Array, y: Array, slots: np.ndarray, covered: np.ndarray, scaling: float
) -> None:
    """y[row] = scaling * x[row] @ a[slot].T, zero where the row has no adapter, for the rows that are covered."""
    count = a.shape[0]
    a = a.reshape(count, a.shape[-2], a.shape[-1])
    bare = np.flatnonzero(covered & ((slots < 0) | (slots >= count)))
    if bare.size:
        y[xp.asarray(bare)] = 0
    for slot, rows in groups(np.where(covered, slots, -1), count):
        rows = xp.asarray(rows)
        value = x[rows].astype(real) @ a[slot].astype(real).T * real(np.float32(scaling))
        y[rows] = value.astype(y.dtype)


def expand_rows(
    xp: Any, real: Any, x: Array, b: Array, y: Array, slots: np.ndarray, add_inputs: bool, columns: slice
) -> None:
    """y[row, columns] (+)= x[row] @ b[slot].T; rows without an adapter are left alone."""
    count = b.shape[0]
    b = b.reshape(count, b.shape[-2], b.shape[-1])
    out = y[:, columns]
    for slot, rows in groups(slots, count):
        rows = xp.asarray(rows)
        value = x[rows].astype(real) @ b[slot].astype(real).T
        if add_inputs:
            value += out[rows].astype(real)
        out[rows] = value.astype(out.dtype)


def add_rows(xp: Any, real: Any, y: Array, x: Array, weights: LoraWeights, slots: np.ndarray, scale: float) -> None:
    """y[row] += scale * slot_scale * (x[row] @ A.T) @ B.T for every slice of the row's adapter."""
    for slot, rows in groups(slots, weights.max_adapters):
        parts = weights.slot(slot)
        if all(part is None for part in parts):
            continue
        rows = xp.asarray(rows)
        inputs = x[rows].astype(real)
        start = 0
        for width, part in zip(weights.slices, parts, strict=True):
            columns = slice(start, start + width)
            start += width
            if part is None:
                continue
            factor = real(np.float32(scale) * np.float32(part.scale))
            delta = (inputs @ part.a.astype(real).T) @ part.b.astype(real).T * factor
            out = y[:, columns]
            out[rows] = (out[rows].astype(real) + delta).astype(y.dtype)


def _all(slots: np.ndarray) -> np.ndarray:
    return np.ones(slots.shape, np.bool_)


def bgmv_shrink(
    inputs: np.ndarray,
    lora_a_weights: np.ndarray,
    output_tensor: np.ndarray,
    lora_indices_tensor: np.ndarray,
    scaling: float = 1.0,
    override_config: object = None,
) -> np.ndarray:
    """``output[t] = scaling * inputs[t] @ A[index[t]].T``; zeros where the row has no adapter."""
    covered = _all(lora_indices_tensor)
    shrink_rows(np, np.float64, inputs, lora_a_weights, output_tensor, lora_indices_tensor, covered, scaling)
    return output_tensor


def bgmv_expand(
    inputs: np.ndarray,
    lora_b_weights: np.ndarray,
    output_tensor: np.ndarray,
    lora_indices_tensor: np.ndarray,
    add_inputs: bool = True,
    override_config: object = None,
) -> np.ndarray:
    """``output[t] (+)= inputs[t] @ B[index[t]].T``; rows without an adapter are left alone."""
    columns = slice(0, output_tensor.shape[1])
    expand_rows(np, np.float64, inputs, lora_b_weights, output_tensor, lora_indices_tensor, add_inputs, columns)
    return output_tensor


def bgmv_expand_slice(
    inputs: np.ndarray,
    lora_b_weights: np.ndarray,
    output_tensor: np.ndarray,
    lora_indices_tensor: np.ndarray,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = True,
    override_config: object = None,
) -> np.ndarray:
    """As :func:`bgmv_expand`, into the columns ``slice_offset : slice_offset + slice_size`` only."""
    columns = slice(slice_offset, slice_offset + slice_size)
    expand_rows(np, np.float64, inputs, lora_b_weights, output_tensor, lora_indices_tensor, add_inputs, columns)
    return output_tensor


def sgmv_shrink(
    inputs: np.ndarray,
    lora_a_weights: np.ndarray,
    output_tensor: np.ndarray,
    b_seq_start_loc: np.ndarray,
    seq_len_tensor: np.ndarray,
    lora_indices_tensor: np.ndarray,
    batches: int,
    max_seq_length: int,
    scaling: float,
) -> np.ndarray:
    """As :func:`bgmv_shrink` with one slot per segment; rows outside every segment are left alone."""
    slots, covered = segment_slots(b_seq_start_loc, seq_len_tensor, lora_indices_tensor, inputs.shape[0])
    shrink_rows(np, np.float64, inputs, lora_a_weights, output_tensor, slots, covered, scaling)
    return output_tensor


def sgmv_expand(
    inputs: np.ndarray,
    lora_b_weights: np.ndarray,
    output_tensor: np.ndarray,
    b_seq_start_loc: np.ndarray,
    seq_len_tensor: np.ndarray,
    lora_indices_tensor: np.ndarray,
    batches: int,
    max_seq_length: int,
    add_inputs: bool = False,
) -> np.ndarray:
    """As :func:`bgmv_expand` with one slot per segment."""
    slots, _ = segment_slots(b_seq_start_loc, seq_len_tensor, lora_indices_tensor, inputs.shape[0])
    columns = slice(0, output_tensor.shape[1])
    expand_rows(np, np.float64, inputs, lora_b_weights, output_tensor, slots, add_inputs, columns)
    return output_tensor


def sgmv_expand_slice(
    inputs: np.ndarray,
    lora_b_weights: np.ndarray,
    output_tensor: np.ndarray,
    b_seq_start_loc: np.ndarray,
    seq_len_tensor: np.ndarray,
    lora_indices_tensor: np.ndarray,
    batches: int,
    max_seq_length: int,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = False,
) -> np.ndarray:
    """As :func:`bgmv_expand_slice` with one slot per segment."""
    slots, _ = segment_slots(b_seq_start_loc, seq_len_tensor, lora_indices_tensor, inputs.shape[0])
    columns = slice(slice_offset, slice_offset + slice_size)
    expand_rows(np, np.float64, inputs, lora_b_weights, output_tensor, slots, add_inputs, columns)
    return output_tensor


def add_lora(y: np.ndarray, x: np.ndarray, weights: LoraWeights, batch: LoraBatch, *, scale: float = 1.0) -> np.ndarray:
    """``y[t] += scale * slot_scale * (x[t] @ A.T) @ B.T`` with the adapter of each row, all slices."""
    add_rows(np, np.float64, y, x, weights, batch.indices[: x.shape[0]], scale)
    return y
