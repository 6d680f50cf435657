"""Paged KV writes over NumPy: the pages are host memory, reached by address as the kernels reach device memory."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from .._rope import Rope


def rotate(x: np.ndarray, positions: np.ndarray, rope: Rope) -> np.ndarray:
    """Rows ``(n, heads, dim)`` rotated by their positions, pairs half a head apart, in float64."""
    dim = x.shape[2]
    angles = positions[:, None] * (rope.theta ** (-np.arange(0, dim, 2) / dim) / rope.scale)
    cosine, sine = np.cos(angles)[:, None], np.sin(angles)[:, None]
    first, second = x[..., : dim // 2], x[..., dim // 2 :]
    return np.concatenate((first * cosine - second * sine, second * cosine + first * sine), axis=-1)


def page_at(pointer: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """The page ``(num_layers, 2, num_kv_heads, page_size, head_dim)`` at a host address, as an array over it."""
    count = int(np.prod(shape, dtype=np.int64))
    memory = (ctypes.c_uint8 * (count * dtype.itemsize)).from_address(pointer)
    return np.ctypeslib.as_array(memory).view(dtype).reshape(shape)


def init_kv(
    kv_ptrs: np.ndarray,
    kv_indptr: np.ndarray,
    last_page_offset: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    seqlen_indptr: np.ndarray,
    num_layers: int,
    layer_idx: int,
    num_kv_heads: int,
    page_size: int,
    rope: Rope | None = None,
) -> None:
    """See :func:`cupy_lora.init_kv`."""
    shape = (num_layers, 2, num_kv_heads, page_size, k.shape[2])
    for i in range(last_page_offset.shape[0]):
        start, stop = int(seqlen_indptr[i]), int(seqlen_indptr[i + 1])
        first, end, last = int(kv_indptr[i]), int(kv_indptr[i + 1]), int(last_page_offset[i])
        if not 0 <= start < stop <= k.shape[0]:
            continue
        if not (0 <= first < end <= kv_ptrs.shape[0] and 1 <= last <= page_size):
            continue
        length = (end - first - 1) * page_size + last
        if stop - start > length:
            continue
        for token in range(start, stop):
            number, offset = divmod(length - (stop - token), page_size)
            pointer = int(kv_ptrs[first + number])
            if pointer == 0 or pointer % 16:
                continue
            page = page_at(pointer, shape, k.dtype)
            key = k[token]
            if rope is not None:
                key = rotate(key[None].astype(np.float64), np.array([length - (stop - token)]), rope)[0]
            page[layer_idx, 0, :, offset], page[layer_idx, 1, :, offset] = key.astype(k.dtype), v[token]


def append_kv(
    kv_ptrs: np.ndarray,
    kv_indptr: np.ndarray,
    last_page_offset: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    num_layers: int,
    layer_idx: int,
    num_kv_heads: int,
    page_size: int,
    rope: Rope | None = None,
) -> None:
    """See :func:`cupy_lora.append_kv`."""
    one_each = np.arange(last_page_offset.shape[0] + 1)
    init_kv(kv_ptrs, kv_indptr, last_page_offset, k, v, one_each, num_layers, layer_idx, num_kv_heads, page_size, rope)
