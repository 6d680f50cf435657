"""Keys and values into the pages of their sequences."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import _env, _jit, _rope
from ._arrays import (
    CPU,
    FLOATS,
    INT32,
    INT64,
    Array,
    check_contiguous,
    check_dtype,
    check_shape,
    same_device,
    view,
    views,
)
from ._lora_checks import host_copy, integer
from ._plans import Plans


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
    *,
    rope: str | None = None,
    rope_theta: float = 1e4,
    rope_scale: float = 1.0,
) -> None:
    """Write the last tokens of every sequence into its pages: a whole prompt, or a chunk after what is there.

    Sequence ``i`` has ``n = seqlen_indptr[i + 1] - seqlen_indptr[i]`` rows of ``k`` and ``v``;
    they become its last ``n`` positions. Its length, ``(pages - 1) * page_size +
    last_page_offset[i]``, already counts them. Keys are stored as they are, unless ``rope`` says otherwise.

    Parameters
    ----------
    kv_ptrs : array of int64, shape (total_pages,)
        Address of each page, 16-byte aligned; a page is ``[num_layers, 2, num_kv_heads, page_size, head_dim]``
        in the dtype of ``k``, keys at 0 and values at 1.
    kv_indptr : array of int32, shape (batch + 1,)
        The pages of sequence ``i`` are ``kv_ptrs[kv_indptr[i] : kv_indptr[i + 1]]``.
    last_page_offset : array of int32, shape (batch,)
        Tokens in the last page, 1 to ``page_size``.
    k, v : array, shape (tokens, num_kv_heads, head_dim)
        float16, bfloat16 or float32; ``head_dim`` a multiple of 8; rows contiguous, any distance apart.
    seqlen_indptr : array of int32, shape (batch + 1,)
        Ascending; counted in rows of ``k``.
    num_layers, layer_idx, num_kv_heads, page_size : int
    rope : {None, "llama"}
        ``"llama"``: each key is rotated by its position when it is stored (pairs half a head apart, in float32, rounded
        once), for attention with ``rope=None``. ``head_dim`` is then a multiple of 16.
    rope_theta, rope_scale : float
        Pair ``d`` turns by ``rope_theta ** (-2 d / head_dim) / rope_scale`` a position.

    Raises
    ------
    TypeError
        If a dtype or type is wrong.
    ValueError
        If shapes do not match, an array is not contiguous, a number is out of range, or the
        arrays are on different devices. Under ``CUPY_LORA_DEBUG=1`` also for a page address that
        is 0 or not aligned, a ``last_page_offset`` out of range, and a sequence whose pages do
        not hold its tokens; without it such tokens are not written.
    """
    indptr = view("seqlen_indptr", seqlen_indptr)
    sizes = num_layers, layer_idx, num_kv_heads, page_size
    _write(kv_ptrs, kv_indptr, last_page_offset, k, v, indptr, *sizes, rope, rope_theta, rope_scale)


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
    *,
    rope: str | None = None,
    rope_theta: float = 1e4,
    rope_scale: float = 1.0,
) -> None:
    """Write one new token of every sequence into its pages, at its last position.

    The length of sequence ``i``, ``(pages - 1) * page_size + last_page_offset[i]``, already
    counts the new token, so a sequence without pages is an error here (one that is named under
    ``CUPY_LORA_DEBUG=1``; its token is not written otherwise).

    Parameters
    ----------
    kv_ptrs, kv_indptr, last_page_offset
        As in :func:`init_kv`.
    k, v : array, shape (batch, num_kv_heads, head_dim)
        As in :func:`init_kv`, one row per sequence.
    num_layers, layer_idx, num_kv_heads, page_size : int
    rope, rope_theta, rope_scale
        As in :func:`init_kv`.

    Raises
    ------
    TypeError, ValueError
        As :func:`init_kv`.
    """
    sizes = num_layers, layer_idx, num_kv_heads, page_size
    _write(kv_ptrs, kv_indptr, last_page_offset, k, v, None, *sizes, rope, rope_theta, rope_scale)


def _write(
    kv_ptrs: Any,
    kv_indptr: Any,
    last_page_offset: Any,
    k: Any,
    v: Any,
    indptr: Array | None,
    num_layers: int,
    layer_idx: int,
    num_kv_heads: int,
    page_size: int,
    rope: str | None,
    rope_theta: float,
    rope_scale: float,
) -> None:
    given = kv_ptrs, kv_indptr, last_page_offset, k, v, indptr
    sizes = num_layers, layer_idx, num_kv_heads, page_size
    kept, key, pointers, objs, on_torch = _plans.find(_NAMES, given, *sizes, rope, rope_theta, rope_scale)
    if kept is not None:
        kept.run(pointers, objs, on_torch)
        return
    arrays = (*views(_NAMES[:5], objs[:5]), indptr)
    launch = _checked(arrays, *sizes, rope, rope_theta, rope_scale)
    if launch is not None:
        _plans.run(key, launch, arrays, on_torch)


_NAMES = ("kv_ptrs", "kv_indptr", "last_page_offset", "k", "v", "seqlen_indptr")
_plans = Plans()


def _checked(
    arrays: Sequence[Any],
    num_layers: int,
    layer_idx: int,
    num_kv_heads: int,
    page_size: int,
    rope: str | None,
    rope_theta: float,
    rope_scale: float,
) -> _jit.Launch | None:
    """The launch of a call that was checked; None where it is done already (NumPy), or there is nothing to do."""
    ptrs, pages, last, k, v, indptr = arrays
    _check_table("kv_ptrs", ptrs, INT64)
    _check_table("kv_indptr", pages, INT32)
    _check_table("last_page_offset", last, INT32)
    num_layers = integer("num_layers", num_layers, 1)
    layer_idx = integer("layer_idx", layer_idx, 0, num_layers - 1)
    num_kv_heads = integer("num_kv_heads", num_kv_heads, 1)
    page_size = integer("page_size", page_size, 1)
    batch = last.shape[0]
    check_shape("kv_indptr", pages, (batch + 1,))
    if indptr is not None:
        _check_table("seqlen_indptr", indptr, INT32)
        check_shape("seqlen_indptr", indptr, (batch + 1,))
    _check_rows("k", k, "tokens" if indptr is not None else batch, num_kv_heads)
    check_dtype("v", v, (k.dtype,))
    check_shape("v", v, k.shape)
    _check_rows("v", v, k.shape[0], num_kv_heads)
    turned = _rope.checked(rope, rope_theta, rope_scale)
    if turned is not None and k.shape[2] % 16:
        raise ValueError(f"k: expected a head_dim that is a multiple of 16 (with rope), got {k.shape[2]}")
    device = same_device(kv_ptrs=ptrs, kv_indptr=pages, last_page_offset=last, k=k, v=v, seqlen_indptr=indptr)
    if _env.DEBUG.on:
        _debug_tables(ptrs, pages, last, indptr, k.shape[0], page_size)
    if device != CPU or _jit.has_host_runner():
        return plan_write_kv(ptrs, pages, last, k, v, indptr, layer_idx, page_size, turned)
    from .reference import kv

    tables = ptrs.numpy(), pages.numpy(), last.numpy(), k.numpy(), v.numpy()
    sizes = num_layers, layer_idx, num_kv_heads, page_size
    if indptr is None:
        kv.append_kv(*tables, *sizes, turned)
    else:
        kv.init_kv(*tables, indptr.numpy(), *sizes, turned)
    return None


# ---- checks -------------------------------------------------------------------------------------
def _check_table(name: str, array: Array, dtype: np.dtype[Any]) -> None:
    check_dtype(name, array, (dtype,))
    if array.ndim != 1:
        raise ValueError(f"{name}: expected one axis, got shape {array.shape}")
    check_contiguous(name, array)


def _check_rows(name: str, array: Array, tokens: int | str, num_kv_heads: int) -> None:
    check_dtype(name, array, FLOATS)
    check_shape(name, array, (tokens, num_kv_heads, "head_dim"))
    head_dim = array.shape[2]
    if head_dim < 8 or head_dim % 8:
        raise ValueError(f"{name}: expected a head_dim that is a multiple of 8, got {head_dim}")
    row = Array(array.ptr, array.shape[1:], array.strides[1:], array.dtype, array.device, array.obj)
    if array.size and not row.contiguous:
        raise ValueError(
            f"{name}: expected contiguous rows (num_kv_heads, head_dim), got strides {array.strides} (elements)"
        )


def _debug_tables(ptrs: Array, pages: Array, last: Array, indptr: Array | None, tokens: int, page_size: int) -> None:
    """ValueError that names the first sequence whose tables are wrong; waits for the device."""
    pointers, bounds, offsets = host_copy(ptrs), host_copy(pages).astype(np.int64), host_copy(last)
    starts = np.arange(offsets.shape[0] + 1) if indptr is None else host_copy(indptr).astype(np.int64)
    if indptr is not None and starts.size and (starts[0] != 0 or starts[-1] != tokens):
        raise ValueError(f"seqlen_indptr: expected 0 first and {tokens} last, got {starts[0]} and {starts[-1]}")
    for i, offset in enumerate(offsets.tolist()):
        new = int(starts[i + 1] - starts[i])
        first, end = int(bounds[i]), int(bounds[i + 1])
        if new < 0:
            raise ValueError(f"seqlen_indptr: expected ascending entries, got {starts[i + 1]} after {starts[i]} at {i}")
        if not 0 <= first <= end <= pointers.shape[0]:
            raise ValueError(
                f"kv_indptr: expected ascending entries of 0 .. {pointers.shape[0]} (length of kv_ptrs), "
                f"got {first} and {end} for sequence {i}"
            )
        if end == first:
            if new:
                raise ValueError(f"kv_indptr: expected pages for the {new} tokens of sequence {i}, got none")
            continue
        if not 1 <= offset <= page_size:
            raise ValueError(f"last_page_offset: expected 1 .. {page_size}, got {offset} for sequence {i}")
        length = (end - first - 1) * page_size + offset
        if new > length:
            raise ValueError(
                f"kv_indptr: expected pages that hold the {new} tokens of sequence {i}, got a length of {length}"
            )
        bad = np.flatnonzero((pointers[first:end] == 0) | (pointers[first:end] % 16 != 0))
        if bad.size:
            at = first + int(bad[0])
            raise ValueError(
                f"kv_ptrs: expected an address that is not 0 and a multiple of 16, "
                f"got {int(pointers[at])} at {at} (sequence {i})"
            )


# ---- plan ---------------------------------------------------------------------------------------
_CTYPES = {FLOATS[0]: "f16", FLOATS[1]: "bf16", FLOATS[2]: "float"}


def choose_writers(vecs: int, *, chunks: bool) -> tuple[int, int, int]:
    """Warps a token, 16-byte vectors a thread in flight, and threads a block, for ``vecs`` vectors a token; pure.

    Two vectors a thread and up to eight warps a token, then more vectors. A block that writes ``chunks`` has
    neighbours of one sequence, which share its tables; single tokens do not, and spread over smaller blocks.
    """
    warps = min(8, 1 << (-(-vecs // 64) - 1).bit_length())
    return warps, min(4, -(-vecs // (32 * warps))), max(256 if chunks else 128, 32 * warps)


@functools.cache
def write_kv_kernel(
    symbol: str, num_kv_heads: int, page_size: int, row_bytes: int, access: int, element: str = ""
) -> _jit.Kernel:
    """The specialisation of ``append_kv`` or ``init_kv``; pure.

    ``row_bytes`` is head_dim times the size of an element, ``access`` the width in bytes of the
    loads that the alignment of k and v allows, ``element`` the type of elements that are rotated (none: nothing
    is).
    """
    warps, batch, block = choose_writers(2 * num_kv_heads * row_bytes // 16, chunks=symbol == "init_kv")
    defines: tuple[tuple[str, int | str], ...] = (
        ("HEADS", num_kv_heads),
        ("PAGE", page_size),
        ("ROW_BYTES", row_bytes),
        ("ACCESS", access),
        ("WARPS_PER_TOKEN", warps),
        ("BATCH", batch + batch % 2 if element else batch),  # pairs of vectors
        ("BLOCK", block),
        ("ROPE", int(bool(element))),
        *((("ELEMENT", element),) if element else ()),
    )
    return _jit.Kernel("paged_kv", symbol, defines, block)


def plan_write_kv(
    ptrs: Array,
    pages: Array,
    last: Array,
    k: Array,
    v: Array,
    indptr: Array | None,
    layer_idx: int,
    page_size: int,
    rope: _rope.Rope | None = None,
) -> _jit.Launch | None:
    """The launch for checked arrays; None where there is nothing to write."""
    tokens, num_kv_heads, head_dim = k.shape
    if tokens == 0 or last.shape[0] == 0:
        return None
    item = k.dtype.itemsize
    strides = [array.strides[0] * item if tokens > 1 else 0 for array in (k, v)]
    access = 16
    while any(number % access for number in (k.ptr, v.ptr, *strides)):
        access //= 2
    element = "" if rope is None else _CTYPES[k.dtype]
    symbol = "append_kv" if indptr is None else "init_kv"
    kernel = write_kv_kernel(symbol, num_kv_heads, page_size, head_dim * item, access, element)
    warps = dict(kernel.defines)["WARPS_PER_TOKEN"]
    per_block = kernel.block // (32 * int(warps))
    sizes = [np.int32(ptrs.shape[0]), np.int32(last.shape[0])]
    if indptr is not None:
        sizes.append(np.int32(tokens))
    return _jit.Launch(
        kernel,
        (-(-tokens // per_block), 1, 1),
        (
            ptrs,
            pages,
            last,
            k,
            v,
            *(() if indptr is None else (indptr,)),
            *(np.int64(stride) for stride in strides),
            *sizes,
            np.int32(layer_idx),
            *(() if rope is None else (_rope.frequencies(head_dim, rope),)),
        ),
    )
