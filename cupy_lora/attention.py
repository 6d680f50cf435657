"""Attention over paged keys and values: one query a sequence (decode), or its last positions (prefill)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from . import _arrays, _attention_plan, _env, _jit, _workspace
from ._arrays import (
    CPU,
    FLOAT32,
    HALVES,
    INT32,
    INT64,
    Array,
    check_contiguous,
    check_dtype,
    check_no_overlap,
    check_shape,
    same_device,
    stream_of,
    view,
)
from ._attention_plan import Numbers
from ._lora_checks import host_copy, integer
from ._plans import Plans
from ._rope import checked, positive
from .paged_kv import _check_table, _debug_tables

MAX_HEAD_DIM = 256


def batch_decode(
    q: Any,
    kv_ptrs: Any,
    kv_indptr: Any,
    last_page_offset: Any,
    num_layers: int,
    layer_idx: int,
    num_kv_heads: int,
    page_size: int,
    *,
    out: Any = None,
    rope: str | None = "llama",
    rope_theta: float = 1e4,
    rope_scale: float = 1.0,
    sm_scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    return_lse: bool = False,
    workspace: Any = None,
) -> Any:
    """Attention of one query per sequence, its last position, over all of the sequence's keys.

    ``out[b, h] = softmax(sm_scale * q[b, h] . k[:, h // group]) v[:, h // group]`` with ``group``
    query heads to a key head.

    Parameters
    ----------
    q : array, shape (batch, num_heads, head_dim)
        float16 or bfloat16; ``num_heads`` a multiple of ``num_kv_heads``; ``head_dim`` a multiple of 16 up to 256;
        rows contiguous, any distance apart.
    kv_ptrs : array of int64, shape (total_pages,)
        Address of each page, 16-byte aligned; a page is ``[num_layers, 2, num_kv_heads, page_size, head_dim]``
        in the dtype of ``q``, keys at 0 and values at 1. What is not in a sequence is not read.
    kv_indptr : array of int32, shape (batch + 1,)
        The pages of sequence ``i`` are ``kv_ptrs[kv_indptr[i] : kv_indptr[i + 1]]``. It may have none.
    last_page_offset : array of int32, shape (batch,)
        Tokens in the last page, 1 to ``page_size``: the sequence has ``(pages - 1) * page_size`` more.
    num_layers, layer_idx, num_kv_heads, page_size : int
    out : array, shape of ``q``, optional
        Written in place, in the dtype of ``q``; rows contiguous, any distance apart.
    rope : {"llama", None}
        ``"llama"``: query and keys are rotated by their positions first, pairs half a head apart.
        None for keys that were rotated when they were stored (:func:`cupy_lora.append_kv` does): faster.
    rope_theta, rope_scale : float
        Pair ``d`` turns by ``rope_theta ** (-2 d / head_dim) / rope_scale`` a position.
    sm_scale : float, optional
        Above 0; by default ``1 / sqrt(head_dim)``.
    window : int, optional
        Only the last ``window`` keys, the query's own position included, are seen.
    soft_cap : float, optional
        Scores are ``soft_cap * tanh(score / soft_cap)``.
    return_lse : bool
        Return the logarithm (natural, float32) of the sum of the exponentials of the scores too.
    workspace : array of uint8, optional
        Scratch memory, 16-byte aligned, more than 64 KiB; at most 16 MiB are of use. Its first 64 KiB are
        zeros when it is first used and after each call. By default the stream's own.

    Returns
    -------
    array, or (array, array)
        ``out``, and with ``return_lse`` float32 ``(batch, num_heads)``. Zeros and -inf for an empty sequence.

    Raises
    ------
    TypeError
        If a type or dtype is wrong.
    ValueError
        If a shape, stride, number or device is. Under ``CUPY_LORA_DEBUG=1`` also for a page address that is 0 or not
        aligned and for tables out of range; without it such a page counts as zeros and such a sequence as empty.

    Notes
    -----
    A row's bits depend on its sequence and the layer's shape alone. Lengths stay on the device: a captured call
    may be replayed with other tables in the same arrays.
    """
    inputs = _views(q, kv_ptrs, kv_indptr, last_page_offset)
    qa, oa = inputs[0], None if out is None else view("out", out)
    space = None if workspace is None else view("workspace", workspace)
    sizes = num_layers, layer_idx, num_kv_heads, page_size
    options = rope, rope_theta, rope_scale, sm_scale, window, soft_cap
    kept, key, *_, on_torch = _plans.find(_NAMES, (*inputs, None, oa, space), "decode", return_lse, *sizes, *options)
    if kept is None:
        _check_inputs(*inputs)
        check_shape("kv_indptr", inputs[2], (qa.shape[0] + 1,))
        check_shape("last_page_offset", inputs[3], (qa.shape[0],))
        sizes = _sizes(qa, *sizes, inputs[1])
        numbers = _numbers(qa, *options)
        if space is not None:
            _check_workspace(space)
        if oa is not None:
            _check_output(oa, qa)
        same_device(q=qa, kv_ptrs=inputs[1], kv_indptr=inputs[2], last_page_offset=inputs[3], out=oa, workspace=space)
        if _env.DEBUG.on:
            _debug(inputs[1:], page_size, None, 0)
    device = qa.device
    out, oa = _result(out, oa, qa)
    lse = _arrays.empty(qa.shape[:2], FLOAT32, device) if return_lse else None
    if kept is None and device == CPU and not _jit.has_host_runner():
        from .reference import attention

        tables = inputs[1].numpy(), inputs[2].numpy(), inputs[3].numpy()
        attention.batch_decode(qa.numpy(), *tables, *sizes, out=oa.numpy(), lse=lse, numbers=numbers)
    elif qa.shape[0]:
        stream = None if device == CPU else stream_of(device, on_torch)
        if space is None:
            chunks = qa.shape[0] + inputs[1].shape[0] * page_size // _attention_plan.CHUNK_MIN * 2
            need = 4 * _attention_plan.COUNTERS + chunks * qa.shape[1] * (qa.shape[2] + 4) * 4
            space = _workspace.for_stream(device, stream, min(need, _workspace.NBYTES))
        parts = _attention_plan.parts_of(space, qa, num_kv_heads)
        lse_view = None if lse is None else view("lse", lse)
        arrays = (*inputs, oa, lse_view, *parts)
        if kept is not None:
            kept.run([0 if array is None else array.ptr for array in arrays], arrays, on_torch)
        else:
            shape = _attention_plan.shape_of(qa, oa, sizes[2], sizes[3], True, numbers)
            facts = _jit.device_facts(device)
            launch = _attention_plan.decode(qa, oa, lse_view, inputs[1:], parts, shape, sizes[1], numbers, facts)
            _plans.run(key, launch, arrays, on_torch)
    return (out, lse) if return_lse else out


def batch_prefill(
    q: Any,
    qo_indptr: Any,
    kv_ptrs: Any,
    kv_indptr: Any,
    last_page_offset: Any,
    num_layers: int,
    layer_idx: int,
    num_kv_heads: int,
    page_size: int,
    *,
    out: Any = None,
    rope: str | None = "llama",
    rope_theta: float = 1e4,
    rope_scale: float = 1.0,
    sm_scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    soft_cap: float | None = None,
    return_lse: bool = False,
    workspace: Any = None,
) -> Any:
    """Attention of many queries per sequence, its last positions, over the sequence's keys.

    Sequence ``i`` has ``qo_len = qo_indptr[i + 1] - qo_indptr[i]`` queries; the first of them sits
    at position ``kv_len - qo_len``, so keys that were stored before these queries' are seen too.

    Parameters
    ----------
    q : array, shape (tokens, num_heads, head_dim)
        As in :func:`batch_decode`.
    qo_indptr : array of int32, shape (batch + 1,)
        Ascending; counted in rows of ``q``. A sequence may have no queries.
    kv_ptrs, kv_indptr, last_page_offset, num_layers, layer_idx, num_kv_heads, page_size
        As in :func:`batch_decode`; the keys and values of the queries' own positions are in the pages already.
    out, rope, rope_theta, rope_scale, sm_scale, soft_cap
        As in :func:`batch_decode`.
    causal : bool
        A query sees no key after its own position.
    window : int, optional
        A query at position p sees no key before ``p - window + 1``.
    return_lse, workspace
        As in :func:`batch_decode`; of a workspace only the first 64 KiB are of use, on some GPUs.

    Returns
    -------
    array, or (array, array)
        ``out``, and with ``return_lse`` float32 ``(tokens, num_heads)``. Zeros and -inf for a query that sees no key.

    Raises
    ------
    TypeError, ValueError
        As :func:`batch_decode`; under ``CUPY_LORA_DEBUG=1`` also for a ``qo_indptr`` that is not ascending from 0 to
        ``tokens``, and for more queries than keys. Without it, such a sequence has no queries, and a query before
        position 0 sees no key.

    Notes
    -----
    A row's bits depend on its sequence and the layer's shape alone. Lengths stay on the device.
    """
    inputs = _views(q, kv_ptrs, kv_indptr, last_page_offset)
    indptr = view("qo_indptr", qo_indptr)
    qa, oa = inputs[0], None if out is None else view("out", out)
    space = None if workspace is None else view("workspace", workspace)
    sizes = num_layers, layer_idx, num_kv_heads, page_size
    options = rope, rope_theta, rope_scale, sm_scale, window, soft_cap
    scalars = return_lse, causal, *sizes, *options
    kept, key, *_, on_torch = _plans.find(_NAMES, (*inputs, indptr, oa, space), "prefill", *scalars)
    if kept is None:
        _check_inputs(*inputs)
        _check_table("qo_indptr", indptr, INT32)
        batch = inputs[3].shape[0]
        check_shape("kv_indptr", inputs[2], (batch + 1,))
        check_shape("qo_indptr", indptr, (batch + 1,))
        sizes = _sizes(qa, *sizes, inputs[1])
        numbers = _numbers(qa, *options)
        if space is not None:
            _check_workspace(space)
        if oa is not None:
            _check_output(oa, qa)
        tables = {"kv_ptrs": inputs[1], "kv_indptr": inputs[2], "last_page_offset": inputs[3]}
        same_device(q=qa, qo_indptr=indptr, **tables, out=oa, workspace=space)
        if _env.DEBUG.on:
            _debug(inputs[1:], page_size, indptr, qa.shape[0])
    device = qa.device
    out, oa = _result(out, oa, qa)
    lse = _arrays.empty(qa.shape[:2], FLOAT32, device) if return_lse else None
    if kept is None and device == CPU and not _jit.has_host_runner():
        from .reference import attention

        hosts = qa.numpy(), indptr.numpy(), inputs[1].numpy(), inputs[2].numpy(), inputs[3].numpy()
        attention.batch_prefill(*hosts, *sizes, out=oa.numpy(), lse=lse, causal=bool(causal), numbers=numbers)
    elif inputs[3].shape[0] and qa.shape[0]:
        lse_view = None if lse is None else view("lse", lse)
        facts = _jit.device_facts(device)
        counters = None
        if _attention_plan.choose_wgmma(qa.shape[2], rope is not None, facts.arch) is not None:
            if space is None:
                stream = None if device == CPU else stream_of(device, on_torch)
                space = _workspace.for_stream(device, stream, 4 * _attention_plan.COUNTERS)
            counters = _attention_plan.counters_of(space)
        arrays = (*inputs, indptr, oa, lse_view, counters)
        if kept is not None:
            kept.run([0 if array is None else array.ptr for array in arrays], arrays, on_torch)
        else:
            shape = _attention_plan.shape_of(qa, oa, sizes[2], sizes[3], bool(causal), numbers)
            launch = _attention_plan.prefill(
                qa, oa, lse_view, indptr, inputs[1:], counters, shape, sizes[1], numbers, facts
            )
            _plans.run(key, launch, arrays, on_torch)
    return (out, lse) if return_lse else out


_NAMES = ("q", "kv_ptrs", "kv_indptr", "last_page_offset", "qo_indptr", "out", "workspace")
_plans = Plans()


def _views(q: Any, kv_ptrs: Any, kv_indptr: Any, last_page_offset: Any) -> tuple[Array, Array, Array, Array]:
    pointers, pages = view("kv_ptrs", kv_ptrs), view("kv_indptr", kv_indptr)
    return view("q", q), pointers, pages, view("last_page_offset", last_page_offset)


def _result(out: Any, array: Array | None, q: Array) -> tuple[Any, Array]:
    """The output, a new one where there is none; what the plan does not cover of it is checked: overlap."""
    if array is None:
        out = _arrays.empty(q.shape, q.dtype, q.device)
        return out, view("out", out)
    check_no_overlap("out", array, q=q)
    return out, array


# ---- checks -------------------------------------------------------------------------------------
def _check_rows(name: str, array: Array) -> None:
    check_dtype(name, array, HALVES)
    check_shape(name, array, ("tokens", "num_heads", "head_dim"))
    tokens, heads, dim = array.shape
    if heads < 1 or dim < 16 or dim % 16 or dim > MAX_HEAD_DIM:
        raise ValueError(
            f"{name}: expected at least one head and a head_dim that is a multiple of 16 up to {MAX_HEAD_DIM}, "
            f"got shape {array.shape}"
        )
    row = Array(array.ptr, array.shape[1:], array.strides[1:], array.dtype, array.device, array.obj)
    if tokens and (not row.contiguous or (tokens > 1 and array.strides[0] < heads * dim)):
        raise ValueError(
            f"{name}: expected contiguous rows (num_heads, head_dim) that do not overlap, "
            f"got strides {array.strides} (elements)"
        )


def _check_output(out: Array, q: Array) -> None:
    _check_rows("out", out)
    check_dtype("out", out, (q.dtype,))
    check_shape("out", out, q.shape)


def _check_inputs(q: Array, kv_ptrs: Array, kv_indptr: Array, last_page_offset: Array) -> None:
    _check_rows("q", q)
    _check_table("kv_ptrs", kv_ptrs, INT64)
    _check_table("kv_indptr", kv_indptr, INT32)
    _check_table("last_page_offset", last_page_offset, INT32)


def _sizes(
    q: Array, num_layers: int, layer_idx: int, num_kv_heads: int, page_size: int, ptrs: Array
) -> tuple[int, int, int, int]:
    num_layers = integer("num_layers", num_layers, 1)
    layer_idx = integer("layer_idx", layer_idx, 0, num_layers - 1)
    num_kv_heads = integer("num_kv_heads", num_kv_heads, 1)
    page_size = integer("page_size", page_size, 1)
    if q.shape[1] % num_kv_heads:
        raise ValueError(f"num_kv_heads: expected a divisor of the {q.shape[1]} heads of q, got {num_kv_heads}")
    if ptrs.shape[0] * page_size >= 2**31:
        raise ValueError(f"kv_ptrs: expected pages of fewer than 2**31 tokens, got {ptrs.shape[0]} of {page_size}")
    return num_layers, layer_idx, num_kv_heads, page_size


def _numbers(
    q: Array,
    rope: Any,
    rope_theta: Any,
    rope_scale: Any,
    sm_scale: Any,
    window: Any,
    soft_cap: Any,
) -> Numbers:
    return Numbers(
        sm_scale=1 / math.sqrt(q.shape[2]) if sm_scale is None else positive("sm_scale", sm_scale),
        soft_cap=None if soft_cap is None else positive("soft_cap", soft_cap),
        window=None if window is None else integer("window", window, 1),
        rope=checked(rope, rope_theta, rope_scale),
    )


def _check_workspace(array: Array) -> None:
    check_dtype("workspace", array, (np.dtype(np.uint8),))
    check_shape("workspace", array, ("bytes",))
    check_contiguous("workspace", array)
    if array.nbytes < 4 * _attention_plan.COUNTERS or not array.aligned(16):
        raise ValueError(
            f"workspace: expected at least {4 * _attention_plan.COUNTERS} bytes at a multiple of 16, "
            f"got {array.nbytes} at {array.ptr}"
        )
    if _env.DEBUG.on and host_copy(array)[: 4 * _attention_plan.COUNTERS].any():
        raise ValueError(f"workspace: expected zeros in the first {4 * _attention_plan.COUNTERS} bytes, got others")


def _debug(tables: tuple[Array, Array, Array], page_size: int, qo_indptr: Array | None, tokens: int) -> None:
    """ValueError that names the first sequence whose tables are wrong; waits for the device."""
    ptrs, pages, last = tables
    batch = last.shape[0]
    nothing = view("seqlen_indptr", np.zeros(batch + 1, np.int32))
    _debug_tables(ptrs, pages, last, nothing, 0, page_size)
    if qo_indptr is None:
        return
    starts = host_copy(qo_indptr).astype(np.int64)
    if starts[0] != 0 or starts[-1] != tokens or (np.diff(starts) < 0).any():
        raise ValueError(f"qo_indptr: expected ascending entries from 0 to {tokens} (rows of q), got {starts.tolist()}")
    counts = np.diff(host_copy(pages).astype(np.int64))
    lengths = np.where(counts > 0, (counts - 1) * page_size + host_copy(last), 0)
    bad = np.flatnonzero((np.diff(starts) > lengths) & (lengths > 0))
    if bad.size:
        at = int(bad[0])
        raise ValueError(
            f"qo_indptr: expected at most the {lengths[at]} positions of sequence {at}, "
            f"got {starts[at + 1] - starts[at]} queries"
        )
