"""RMS norm, alone and fused with the residual addition before it."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import _jit
from ._arrays import (
    CPU,
    FLOAT32,
    FLOATS,
    Array,
    check_contiguous,
    check_dtype,
    check_shape,
    empty,
    read,
    same_device,
    view,
    views,
)
from ._lora_checks import real
from ._plans import Plans

_ELEMENTS = {"float16": "f16", "bfloat16": "bf16", "float32": "float"}
_IN_L2 = 48 << 20  # bytes of input and residual that may be in the L2 cache
_STRIDES = np.dtype([("outer", np.int64), ("inner", np.int64)])


@dataclass(frozen=True)
class RmsNormConfig:
    """How the kernel cuts a row; depends on the columns and dtypes only, so a row's bits do not depend on the batch.

    Attributes
    ----------
    threads : int
        Threads per row.
    block : int
        Threads per block; more than ``threads`` where a block takes several rows.
    register_vecs, shared_vecs, reread_vecs : int
        16-byte vectors per thread held in registers, held in shared memory, and read a second time.
    """

    threads: int
    block: int
    register_vecs: int
    shared_vecs: int
    reread_vecs: int

    @property
    def rows(self) -> int:
        """Rows a block works on at a time."""
        return self.block // self.threads


def rms_norm(input: Any, weight: Any, epsilon: float = 1e-6, out: Any = None) -> Any:
    """RMS norm over the last axis: ``input / sqrt(mean(input**2) + epsilon) * weight``.

    Computed in float32, rounded once. The bits of a row depend on that row, the weight and
    the number of columns only.

    Parameters
    ----------
    input : array, shape (..., columns)
        float16, bfloat16 or float32. The last axis is contiguous; the leading axes have any
        strides that reduce to two (a slice of a fused QKV output, split into heads, does).
    weight : array, shape (columns,)
        Contiguous, of the input's dtype or float32.
    epsilon : float
        Added to the mean of the squares; not negative.
    out : array, optional
        Of the input's shape and dtype; may be ``input`` itself. A new contiguous array by default.

    Returns
    -------
    array
        ``out``, or the new array.

    Raises
    ------
    TypeError
        If a dtype is wrong, or an argument is not an array.
    ValueError
        If shapes do not match, the last axis is not contiguous, ``out`` overlaps the input
        without being it, epsilon is out of range, or the arrays are on different devices.
    """
    kept, key, pointers, objs, on_torch = _plans.find(_NAMES, (input, None, weight, out), epsilon, out is input)
    if kept is not None:
        if out is None:
            like = view("input", objs[0]) if on_torch else objs[0]
            out = empty(like.shape, like.dtype, kept.device)
            _, (pointers[3],), (new,), _ = read(_NAMES[3:], (out,))
            objs = (*objs[:3], new)
        kept.run(pointers, objs, on_torch)
        return out
    x, w = view("input", objs[0]), view("weight", objs[2])
    epsilon = real("epsilon", epsilon)
    _check("input", x, w, epsilon)
    same_device(input=x, weight=w)
    apart: tuple[tuple[int, int], ...] = ()
    if out is None:
        out = empty(x.shape, x.dtype, x.device)
        o = view("out", out)
    else:
        apart = ((3, 2),) if out is input else ((3, 0), (3, 2))
        o = view("out", objs[3])
        _check_like("out", o, "input", x)
        same_device(input=x, weight=w, out=o)
        _check_writable("out", o)
        _check_apart("out", o, "input", x, same_allowed=True)
        _check_apart("out", o, "weight", w)
    _run(key, (x, None, w, o), epsilon, on_torch, apart)
    return out


def fused_add_rms_norm(input: Any, residual: Any, weight: Any, epsilon: float = 1e-6) -> tuple[Any, Any]:
    """``residual += input``, then ``input = rms_norm(residual)``, both in place, in one pass.

    The sum is rounded to the dtype when it is stored, and the norm is that of the stored sum:
    the same bits as the two steps one after the other.

    Parameters
    ----------
    input : array, shape (..., columns)
        float16, bfloat16 or float32; overwritten by the norm. Strides as in :func:`rms_norm`.
    residual : array
        Of the input's shape and dtype; overwritten by the sum.
    weight : array, shape (columns,)
        Contiguous, of the input's dtype or float32.
    epsilon : float
        Added to the mean of the squares; not negative.

    Returns
    -------
    tuple of array
        ``(input, residual)``, the objects that were passed.

    Raises
    ------
    TypeError, ValueError
        As :func:`rms_norm`.
    """
    kept, key, pointers, objs, on_torch = _plans.find(_NAMES, (input, residual, weight, input), epsilon)
    if kept is not None:
        kept.run(pointers, objs, on_torch)
        return input, residual
    x, r, w = views(_NAMES[:3], objs[:3])
    epsilon = real("epsilon", epsilon)
    _check("input", x, w, epsilon)
    _check_like("residual", r, "input", x)
    same_device(input=x, residual=r, weight=w)
    _check_writable("input", x)
    _check_writable("residual", r)
    _check_apart("residual", r, "input", x)
    _check_apart("input", x, "weight", w)
    _check_apart("residual", r, "weight", w)
    _run(key, (x, r, w, x), epsilon, on_torch, ((1, 0), (0, 2), (1, 2)))
    return input, residual


_NAMES = ("input", "residual", "weight", "out")
_plans = Plans()


def _run(
    key: Hashable,
    arrays: tuple[Array, Array | None, Array, Array],
    epsilon: float,
    on_torch: bool,
    apart: tuple[tuple[int, int], ...],
) -> None:
    x, r, w, o = arrays
    if x.device == CPU and not _jit.has_host_runner():
        from .reference import norm

        if r is None:
            norm.rms_norm(x.numpy(), w.numpy(), epsilon, o.numpy())
        else:
            norm.fused_add_rms_norm(x.numpy(), r.numpy(), w.numpy(), epsilon)
        return
    launch = plan_rms_norm(x, r, w, o, epsilon, _jit.device_facts(x.device))
    if launch is not None:
        _plans.run(key, launch, arrays, on_torch, apart)


# ---- checks -------------------------------------------------------------------------------------
def _check(name: str, x: Array, w: Array, epsilon: float) -> None:
    check_dtype(name, x, FLOATS)
    if x.ndim < 1:
        raise ValueError(f"{name}: expected at least one axis, got shape {x.shape}")
    columns = x.shape[-1]
    if columns < 1:
        raise ValueError(f"{name}: expected at least one column, got shape {x.shape}")
    _check_rows(name, x)
    check_dtype("weight", w, (x.dtype,) if x.dtype == FLOAT32 else (x.dtype, FLOAT32))
    check_shape("weight", w, (columns,))
    check_contiguous("weight", w)
    if not 0.0 <= epsilon < float("inf"):
        raise ValueError(f"epsilon: expected a finite number >= 0, got {epsilon}")


def _check_like(name: str, array: Array, other_name: str, other: Array) -> None:
    check_dtype(name, array, (other.dtype,))
    if array.shape != other.shape:
        raise ValueError(f"{name}: expected the shape of {other_name}, {other.shape}, got {array.shape}")
    _check_rows(name, array)


def _check_rows(name: str, array: Array) -> None:
    if array.shape[-1] > 1 and array.strides[-1] != 1 and array.size:
        raise ValueError(f"{name}: expected a contiguous last axis, got strides {array.strides} (elements)")


def _check_writable(name: str, array: Array) -> None:
    """ValueError if rows of an output share memory, or the host array is read-only."""
    if isinstance(array.obj, np.ndarray) and not array.obj.flags.writeable:
        raise ValueError(f"{name}: expected a writable array, got a read-only one")
    if array.size == 0:
        return
    reach = array.shape[-1]
    axes = sorted((abs(s), n) for s, n in zip(array.strides[:-1], array.shape[:-1], strict=True) if n > 1)
    for stride, extent in axes:
        if stride < reach:
            raise ValueError(
                f"{name}: expected rows that do not overlap, got shape {array.shape} "
                f"with strides {array.strides} (elements)"
            )
        reach += stride * (extent - 1)


def _check_apart(name: str, out: Array, other_name: str, other: Array, *, same_allowed: bool = False) -> None:
    """ValueError if the output's elements overlap another array's (interleaved column slices do not)."""
    if same_allowed and out.ptr == other.ptr and out.strides == other.strides:
        return
    low, high = out.span
    start, stop = other.span
    if not (out.size and other.size and start < high and low < stop):
        return
    if out.strides == other.strides and out.ndim > 1 and min(out.strides) > 0:
        # Column slices of one buffer: compare what each covers within one step of the outermost axis.
        item, step = out.dtype.itemsize, out.strides[0]
        reach = 1 + sum((n - 1) * s for n, s in zip(out.shape[1:], out.strides[1:], strict=True))
        ahead = ((out.ptr - other.ptr) // item) % step
        if reach <= ahead <= step - reach:
            return
    same = " or the array itself" if same_allowed else ""
    raise ValueError(f"{name}: expected memory apart from that of {other_name}{same}, got memory that overlaps it")


# ---- plan ---------------------------------------------------------------------------------------
def shared_limit(arch: int) -> int:
    """Bytes of dynamic shared memory that a block may have."""
    return {80: 163, 87: 163, 90: 227, 100: 227, 103: 227}.get(arch, 99) * 1024


@functools.cache
def choose_rms_norm(columns: int, itemsize: int, arch: int, *, fused: bool = False) -> RmsNormConfig:
    """How to cut a row of ``columns`` elements of ``itemsize`` bytes; pure.

    Two vectors a thread for common widths: enough bytes in flight with 4 blocks an SM, and a
    short chain when there is one row. Wide rows take 512 threads, which leaves 128 registers a thread. What is
    held where (``fused`` holds less in registers) does not change the order of the sums.
    """
    vecs = -(-columns * itemsize // 16)
    if vecs <= 64:
        per_thread = 1 if vecs <= 32 else 2
        threads = 1 << (-(-vecs // per_thread) - 1).bit_length()
        return RmsNormConfig(threads, 128, per_thread, 0, 0)
    if vecs <= 2048:
        threads = -(-vecs // 64) * 32
        return RmsNormConfig(threads, threads, 2, 0, 0)
    threads = 512
    per_thread = -(-vecs // threads)
    in_registers = min(per_thread, 4 if fused else 6)  # more of them spill
    room = (shared_limit(arch) - 256) // (16 * threads)
    in_shared = min(per_thread - in_registers, room)
    return RmsNormConfig(threads, threads, in_registers, in_shared, per_thread - in_registers - in_shared)


def threads_per_sm(*, fused: bool) -> int:
    """Threads of a multiprocessor that the registers of the common sizes allow at least; pure."""
    return 768 if fused else 1024


def choose_walk(config: RmsNormConfig, rows: int, row_bytes: int, sm_count: int, *, fused: bool) -> bool:
    """Whether blocks go on to further rows instead of ending with theirs; pure, and no bit depends on it.

    Rows from memory are faster a block each: the hardware starts a block wherever one has ended. With the residual
    and from the L2 cache they come so fast that the start of the blocks is what takes time.
    """
    if config.register_vecs > 2:
        return True
    blocks = -(-rows // config.rows)
    return fused and blocks > sm_count * (threads_per_sm(fused=True) // config.block) and 2 * rows * row_bytes <= _IN_L2


@functools.cache
def rms_norm_kernel(
    dtype: np.dtype[Any],
    weight_dtype: np.dtype[Any],
    columns: int,
    fused: bool,
    access: int,
    weight_access: int,
    levels: int,
    arch: int,
    walk: bool,
) -> _jit.Kernel:
    """The specialisation for one width and dtype.

    ``access`` and ``weight_access`` are the widths in bytes (2 to 16) of the memory accesses that the
    alignment of the rows allows, ``levels`` (1 or 2) the number of strides that lead from row to row.
    """
    config = choose_rms_norm(columns, dtype.itemsize, arch, fused=fused)
    few = config.register_vecs <= 2
    resident = max(1, threads_per_sm(fused=fused) // config.block) if few else 1
    whole = resident * config.block <= threads_per_sm(fused=fused)
    defines: tuple[tuple[str, int | str], ...] = (
        ("ELEMENT", _ELEMENTS[dtype.name]),
        ("WEIGHT", _ELEMENTS[weight_dtype.name]),
        ("COLUMNS", columns),
        ("FUSED_ADD", int(fused)),
        ("THREADS", config.threads),
        ("BLOCK", config.block),
        ("VECS", config.register_vecs),
        ("SHARED_VECS", config.shared_vecs),
        ("REREAD_VECS", config.reread_vecs),
        ("ACCESS", access),
        ("WEIGHT_ACCESS", weight_access),
        ("KEEP", int(few)),
        ("PREFETCH", int(walk and few and whole)),
        ("WALK", int(walk)),
        ("LEVELS", levels),
        ("MIN_BLOCKS", resident),
    )
    shared = 256 + 16 * config.threads * config.shared_vecs
    return _jit.Kernel("norm", "rms_norm", defines, config.block, shared)


def plan_rms_norm(
    x: Array, residual: Array | None, weight: Array, out: Array, epsilon: float, facts: _jit.DeviceFacts
) -> _jit.Launch | None:
    """The launch for checked arrays; None where there are no rows."""
    columns, item = x.shape[-1], x.dtype.itemsize
    rows = x.size // columns
    if rows == 0:
        return None
    extents, strides = _levels(x, residual if residual is not None else x, out)
    access, weight_access = 16, 16
    while any(s * item % access for level in strides for s in level) or any(
        a is not None and a.ptr % access for a in (x, residual, out)
    ):
        access //= 2
    while weight.ptr % weight_access:
        weight_access //= 2
    fused = residual is not None
    levels = len(extents)
    config = choose_rms_norm(columns, item, facts.arch, fused=fused)
    walk = choose_walk(config, rows, columns * item, facts.sm_count, fused=fused)
    kernel = rms_norm_kernel(x.dtype, weight.dtype, columns, fused, access, weight_access, levels, facts.arch, walk)
    blocks = -(-rows // config.rows)
    at_once = facts.sm_count * max(1, threads_per_sm(fused=fused) // config.block)
    each = -(-blocks // at_once) if walk else 1  # rows of a block: as many in each, give or take one
    return _jit.Launch(
        kernel,
        (-(-blocks // each), 1, 1),
        (
            x,
            residual,
            weight,
            out,
            np.int64(rows),
            np.int64(extents[-1]),
            *(_strides(level) for level in strides),
            np.float32(epsilon),
        ),
    )


def _strides(level: tuple[int, ...]) -> np.ndarray:
    return np.array([(level[0], level[-1] if len(level) > 1 else 0)], _STRIDES)


def _levels(*arrays: Array) -> tuple[list[int], list[tuple[int, ...]]]:
    """The leading axes, merged where every array allows it: extents, and strides per array."""
    extents: list[int] = []
    strides: list[list[int]] = [[] for _ in arrays]
    for axis, extent in enumerate(arrays[0].shape[:-1]):
        if extent == 1:
            continue
        steps = [array.strides[axis] for array in arrays]
        if extents and all(s[-1] == step * extent for s, step in zip(strides, steps, strict=True)):
            extents[-1] *= extent
            for s, step in zip(strides, steps, strict=True):
                s[-1] = step
        else:
            extents.append(extent)
            for s, step in zip(strides, steps, strict=True):
                s.append(step)
    if len(extents) > 2:
        raise ValueError(
            f"input: expected leading axes whose strides reduce to two, got shape {arrays[0].shape} "
            f"with strides {' and '.join(str(a.strides) for a in arrays)} (elements)"
        )
    if not extents:
        return [1], [(0,) for _ in arrays]
    return extents, [tuple(s) for s in strides]
