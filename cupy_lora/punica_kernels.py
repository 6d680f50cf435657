"""A drop-in module for the compiled extension ``punica_kernels``: the same names, order of arguments and effects.

``sys.modules["punica_kernels"] = cupy_lora.punica_kernels`` is enough for code that calls the
extension. Outputs are written in place, on the caller's stream. Differences: any rank, width,
page size, and head_dim that is a multiple of 8 (16 in attention); results are rounded once; NumPy arrays work
too; scratch buffers are accepted at any size and not used.

A matrix behind a pointer must start at a multiple of 16 bytes, as every allocation does. A
pointer of 0, or one that does not, is no adapter: its rows are left as they are (and it is named
under ``CUPY_LORA_DEBUG=1``, as are slots and segments that are out of range).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import _env, _jit, _punica_plan, attention, norm, paged_kv
from ._arrays import (
    CPU,
    FLOAT32,
    FLOATS,
    HALVES,
    INT64,
    Array,
    check_contiguous,
    check_dtype,
    check_no_overlap,
    check_shape,
    same_device,
    views,
)
from ._lora_checks import MAX_RANK, check_segments, debug_slots, host_copy, indices, integer, real, rows
from ._plans import Plans

__all__ = [
    "append_kv",
    "batch_decode",
    "batch_prefill",
    "dispatch_bgmv",
    "init_kv",
    "rms_norm",
    "sgmv_cutlass",
    "sgmv_cutlass_tmp_size",
    "sgmv_shrink",
]


def batch_prefill(
    o: Any,
    q: Any,
    qo_indptr: Any,
    kv_ptrs: Any,
    kv_indptr: Any,
    last_page_offset: Any,
    tmpbuf: Any,
    num_layers: int,
    layer_idx: int,
    num_kv_heads: int,
    page_size: int,
) -> None:
    """Causal attention into ``o``, queries and keys rotated (theta 1e4); see :func:`cupy_lora.batch_prefill`."""
    del tmpbuf
    sizes = num_layers, layer_idx, num_kv_heads, page_size
    attention.batch_prefill(q, qo_indptr, kv_ptrs, kv_indptr, last_page_offset, *sizes, out=o)


def batch_decode(
    o: Any,
    q: Any,
    kv_ptrs: Any,
    kv_indptr: Any,
    last_page_offset: Any,
    tmpbuf: Any,
    num_layers: int,
    layer_idx: int,
    num_kv_heads: int,
    page_size: int,
) -> None:
    """Attention of each sequence's last position into ``o``, rotated; see :func:`cupy_lora.batch_decode`."""
    del tmpbuf
    sizes = num_layers, layer_idx, num_kv_heads, page_size
    attention.batch_decode(q, kv_ptrs, kv_indptr, last_page_offset, *sizes, out=o)


def init_kv(
    kv_ptrs: Any,
    kv_indptr: Any,
    last_page_offset: Any,
    k: Any,
    v: Any,
    seqlen_indptr: Any,
    num_layers: int,
    layer_idx: int,
    num_kv_heads: int,
    page_size: int,
) -> None:
    """See :func:`cupy_lora.init_kv`."""
    paged_kv.init_kv(
        kv_ptrs, kv_indptr, last_page_offset, k, v, seqlen_indptr, num_layers, layer_idx, num_kv_heads, page_size
    )


def append_kv(
    kv_ptrs: Any,
    kv_indptr: Any,
    last_page_offset: Any,
    k: Any,
    v: Any,
    num_layers: int,
    layer_idx: int,
    num_kv_heads: int,
    page_size: int,
) -> None:
    """See :func:`cupy_lora.append_kv`."""
    paged_kv.append_kv(kv_ptrs, kv_indptr, last_page_offset, k, v, num_layers, layer_idx, num_kv_heads, page_size)


def rms_norm(output: Any, input: Any, weight: Any, epsilon: float) -> None:
    """``output = rms_norm(input, weight, epsilon)``; see :func:`cupy_lora.rms_norm`."""
    norm.rms_norm(input, weight, epsilon, output)


def dispatch_bgmv(y: Any, x: Any, w_ptr: Any, indicies: Any, layer_idx: int, scale: float) -> None:
    """``y[i] += scale * (x[i] W^T)`` with ``W = weights[indicies[i]][layer_idx]``.

    Parameters
    ----------
    y : (tokens, out) array
        float16, bfloat16 or float32; changed in place. Rows without an adapter stay as they are.
    x : (tokens, in) array
        The dtype of the weights; where out is wider than in, also float32 (the weights then have the dtype of y).
        The smaller of ``in`` and ``out`` is at most 1024.
    w_ptr : (slots,) array of int64
        Address of each slot's weights, ``[layers, out, in]``.
    indicies : (tokens,) array of int64 or int32
        Slot of each row; negative, or past the last slot: no adapter.
    layer_idx : int
    scale : float

    Raises
    ------
    TypeError
        For a wrong type or dtype.
    ValueError
        For shapes that disagree, rows that are not contiguous, a rank above 1024, or arrays on different devices.
    """
    given = y, x, w_ptr, indicies
    kept, key, addresses, objs, on_torch = _plans.find(_BY_ROW, given, "bgmv", layer_idx, scale)
    if kept is not None:
        kept.run(addresses, objs, on_torch)
        return
    ya, xa, pointers, slots = arrays = views(_BY_ROW, objs)
    dtype = _check_matrices(ya, xa)
    _check_pointers(pointers)
    indices("indicies", slots, xa.shape[0])
    layer_idx = integer("layer_idx", layer_idx, 0)
    scale = real("scale", scale)
    device = same_device(y=ya, x=xa, w_ptr=pointers, indicies=slots)
    debug_slots("indicies", slots, pointers.shape[0])
    if _env.DEBUG.on:
        used = np.unique(host_copy(slots))
        _debug_pointers(pointers, used[used >= 0])
    if device == CPU and not _jit.has_host_runner():
        from .reference import punica

        punica.dispatch_bgmv(ya.numpy(), xa.numpy(), pointers.numpy(), slots.numpy(), layer_idx, scale, dtype)
        return
    if xa.shape[0] == 0:
        return
    launch = _punica_plan.bgmv(ya, xa, pointers, slots, layer_idx, scale, dtype, _jit.device_facts(device))
    _plans.run(key, launch, arrays, on_torch, _APART)


def sgmv_cutlass(y: Any, x: Any, w_ptr: Any, s_start: Any, s_end: Any, tmp: Any, layer_idx: int) -> None:
    """``y[start:end] += x[start:end] W`` for every segment, ``W = weights[layer_idx]`` of that segment.

    Parameters
    ----------
    y : (tokens, out) array
        Changed in place; see :func:`dispatch_bgmv`.
    x : (tokens, in) array
    w_ptr : (segments,) array of int64
        Address of each segment's weights, ``[layers, in, out]``.
    s_start, s_end : (segments,) array of int32 or int64
        Segment s is the rows ``s_start[s] : s_end[s]``; it may be empty or ``-1, -1``. Segments do not overlap.
    tmp : array
        Not used.
    layer_idx : int

    Raises
    ------
    TypeError, ValueError
        As :func:`dispatch_bgmv`.
    """
    del tmp
    _sgmv(y, x, w_ptr, s_start, s_end, layer_idx, transposed=True)


def sgmv_shrink(y: Any, x: Any, w_ptr: Any, s_start: Any, s_end: Any, tmp: Any, layer_idx: int) -> None:
    """``y[start:end] += x[start:end] W^T`` for every segment, ``W = weights[layer_idx]`` of that segment.

    Parameters
    ----------
    y : (tokens, rank) array
        Changed in place; see :func:`dispatch_bgmv`.
    x : (tokens, in) array
    w_ptr : (segments,) array of int64
        Address of each segment's weights, ``[layers, rank, in]``.
    s_start, s_end, tmp, layer_idx
        As in :func:`sgmv_cutlass`.

    Raises
    ------
    TypeError, ValueError
        As :func:`dispatch_bgmv`.
    """
    del tmp
    _sgmv(y, x, w_ptr, s_start, s_end, layer_idx, transposed=False)


def sgmv_cutlass_tmp_size(num_problems: int) -> int:
    """Bytes of the ``tmp`` that the original needs for so many segments; nothing here needs it.

    Three pointers, three int64 and three int32 a segment: 60 bytes.
    """
    return 60 * integer("num_problems", num_problems, 0)


# ---- what they share ----------------------------------------------------------------------------
_BY_ROW = ("y", "x", "w_ptr", "indicies")
_BY_SEGMENT = ("y", "x", "w_ptr", "s_start", "s_end")
_APART = ((0, 1),)
_plans = Plans()


def _sgmv(y: Any, x: Any, w_ptr: Any, s_start: Any, s_end: Any, layer_idx: int, *, transposed: bool) -> None:
    given = y, x, w_ptr, s_start, s_end
    kept, key, addresses, objs, on_torch = _plans.find(_BY_SEGMENT, given, "sgmv", layer_idx, transposed)
    if kept is not None:
        kept.run(addresses, objs, on_torch)
        return
    ya, xa, pointers, starts, ends = arrays = views(_BY_SEGMENT, objs)
    dtype = _check_matrices(ya, xa)
    _check_pointers(pointers)
    segments = pointers.shape[0]
    indices("s_start", starts, segments)
    indices("s_end", ends, segments)
    layer_idx = integer("layer_idx", layer_idx, 0)
    device = same_device(y=ya, x=xa, w_ptr=pointers, s_start=starts, s_end=ends)
    if _env.DEBUG.on:
        first, last = host_copy(starts).astype(np.int64), host_copy(ends).astype(np.int64)
        check_segments("s_start", first, "s_end - s_start", last - first, xa.shape[0])
        _debug_pointers(pointers, np.flatnonzero(last > first))
    if device == CPU and not _jit.has_host_runner():
        from .reference import punica

        tables = pointers.numpy(), starts.numpy(), ends.numpy()
        punica.sgmv(ya.numpy(), xa.numpy(), *tables, layer_idx, dtype, transposed)
        return
    if xa.shape[0] == 0 or segments == 0:
        return
    facts = _jit.device_facts(device)
    phase = _punica_plan.phase_of(xa.shape[1], ya.shape[1])
    launch = _punica_plan.sgmv(
        ya, xa, pointers, starts, ends, layer_idx, dtype, facts, phase=phase, transposed=transposed
    )
    _plans.run(key, launch, arrays, on_torch, _APART)


def _check_matrices(y: Array, x: Array) -> np.dtype[Any]:
    """The dtype of the weights between x and y; an error where they do not go together."""
    rows("y", y)
    rows("x", x)
    check_dtype("y", y, FLOATS)
    check_dtype("x", x, FLOATS)
    check_shape("y", y, (x.shape[0], "out"))
    width_in, width_out = x.shape[1], y.shape[1]
    if not 1 <= min(width_in, width_out) <= MAX_RANK:
        raise ValueError(
            f"x: expected a rank (the smaller width) in 1 .. {MAX_RANK}, got widths {width_in} and {width_out}"
        )
    if x.dtype in HALVES:
        check_dtype("y", y, (x.dtype, FLOAT32))
        dtype = x.dtype
    else:
        if _punica_plan.phase_of(width_in, width_out) == _punica_plan.SHRINK:
            check_dtype("x", x, HALVES)
        check_dtype("y", y, HALVES)
        dtype = y.dtype
    check_no_overlap("y", y, x=x)
    return dtype


def _check_pointers(array: Array) -> None:
    check_dtype("w_ptr", array, (INT64,))
    check_shape("w_ptr", array, ("slots",))
    check_contiguous("w_ptr", array)


def _debug_pointers(pointers: Array, used: np.ndarray) -> None:
    values = host_copy(pointers)
    bad = used[(values[used] == 0) | (values[used] % 16 != 0)]
    if bad.size:
        raise ValueError(
            f"w_ptr: expected addresses that are not 0 and multiples of 16, got {int(values[bad[0]])} at {int(bad[0])}"
        )
