"""Paged attention over NumPy, in float64: rotations, scores, softmax and sums; rounded once, to the output."""

from __future__ import annotations

from typing import Any

import numpy as np

from .._attention_plan import Numbers
from .kv import page_at, rotate


def gather(
    kv_ptrs: np.ndarray,
    kv_indptr: np.ndarray,
    last_page_offset: np.ndarray,
    sequence: int,
    layer_idx: int,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values of a sequence, float64 ``(length, num_kv_heads, head_dim)`` each.

    Empty where the tables are out of range; zeros for a page whose address cannot be one.
    """
    page_size, heads, dim = shape[3], shape[2], shape[4]
    first, end = int(kv_indptr[sequence]), int(kv_indptr[sequence + 1])
    last = int(last_page_offset[sequence])
    if not (0 <= first < end <= kv_ptrs.shape[0] and 1 <= last <= page_size):
        return np.empty((0, heads, dim)), np.empty((0, heads, dim))
    length = (end - first - 1) * page_size + last
    keys, values = np.zeros((2, length, heads, dim))
    for number, pointer in enumerate(kv_ptrs[first:end].tolist()):
        if pointer == 0 or pointer % 16:
            continue
        start = number * page_size
        count = min(page_size, length - start)
        page = page_at(pointer, shape, dtype)[layer_idx]
        keys[start : start + count] = page[0, :, :count].transpose(1, 0, 2)
        values[start : start + count] = page[1, :, :count].transpose(1, 0, 2)
    return keys, values


def attend(
    q: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    positions: np.ndarray,
    causal: bool,
    numbers: Numbers,
) -> tuple[np.ndarray, np.ndarray]:
    """Queries ``(n, heads, dim)`` at their positions over the keys of one sequence: outputs and lse, float64."""
    tokens, heads, _ = q.shape
    first = 0 if numbers.window is None else max(int(positions[0]) - numbers.window + 1, 0)
    keys, values = keys[first:], values[first:]  # what no query sees costs nothing
    length, kv_heads, _ = keys.shape
    key_positions = first + np.arange(length)
    q = q.astype(np.float64)
    if numbers.rope is not None:
        q = rotate(q, positions, numbers.rope)
        keys = rotate(keys, key_positions, numbers.rope)
    seen = np.broadcast_to(positions[:, None] >= 0, (tokens, length))
    if causal:
        seen = seen & (key_positions[None] <= positions[:, None])
    if numbers.window is not None:
        seen = seen & (key_positions[None] > positions[:, None] - numbers.window)
    out = np.zeros(q.shape)
    lse = np.full((tokens, heads), -np.inf)
    some = seen.any(axis=1)
    for head in range(heads if length else 0):
        scores = q[:, head] @ keys[:, head * kv_heads // heads].T * numbers.sm_scale
        if numbers.soft_cap is not None:
            scores = numbers.soft_cap * np.tanh(scores / numbers.soft_cap)
        scores = np.where(seen, scores, -np.inf)[some]
        top = scores.max(axis=1, keepdims=True)
        weights = np.exp(scores - top)
        total = weights.sum(axis=1, keepdims=True)
        out[some, head] = weights / total @ values[:, head * kv_heads // heads]
        lse[some, head] = (top + np.log(total))[:, 0]
    return out, lse


def batch_decode(
    q: np.ndarray,
    kv_ptrs: np.ndarray,
    kv_indptr: np.ndarray,
    last_page_offset: np.ndarray,
    num_layers: int,
    layer_idx: int,
    num_kv_heads: int,
    page_size: int,
    *,
    out: np.ndarray,
    lse: np.ndarray | None,
    numbers: Numbers,
) -> None:
    """See :func:`cupy_lora.batch_decode`."""
    one_each = np.arange(q.shape[0] + 1)
    tables = kv_ptrs, kv_indptr, last_page_offset
    sizes = num_layers, layer_idx, num_kv_heads, page_size
    batch_prefill(q, one_each, *tables, *sizes, out=out, lse=lse, causal=True, numbers=numbers)


def batch_prefill(
    q: np.ndarray,
    qo_indptr: np.ndarray,
    kv_ptrs: np.ndarray,
    kv_indptr: np.ndarray,
    last_page_offset: np.ndarray,
    num_layers: int,
    layer_idx: int,
    num_kv_heads: int,
    page_size: int,
    *,
    out: np.ndarray,
    lse: np.ndarray | None,
    causal: bool,
    numbers: Numbers,
) -> None:
    """See :func:`cupy_lora.batch_prefill`."""
    shape = (num_layers, 2, num_kv_heads, page_size, q.shape[2])
    for i in range(last_page_offset.shape[0]):
        start, stop = int(qo_indptr[i]), int(qo_indptr[i + 1])
        if not 0 <= start < stop <= q.shape[0]:
            continue
        keys, values = gather(kv_ptrs, kv_indptr, last_page_offset, i, layer_idx, shape, q.dtype)
        positions = np.arange(stop - start) + keys.shape[0] - (stop - start)
        rows, logs = attend(q[start:stop], keys, values, positions, causal, numbers)
        out[start:stop] = rows.astype(q.dtype)
        if lse is not None:
            lse[start:stop] = logs
