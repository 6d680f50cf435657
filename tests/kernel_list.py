"""Every kernel specialisation that is compiled without a GPU: a function per op family, through its plan functions."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cupy_lora import _jit
from cupy_lora._arrays import BFLOAT16, FLOAT16, FLOAT32, INT32, INT64, Array

PACKAGE = Path(_jit.__file__).resolve().parent
ARCHS = (80, 86, 89, 90, 100, 120)
SM_COUNTS = {80: 108, 86: 84, 89: 142, 90: 132, 100: 148, 120: 170}

Named = tuple[str, _jit.Kernel]
_FAMILIES: dict[str, Callable[[Any, int, int], Iterator[Named]]] = {}


def family(module: str) -> Callable[[Callable[[Any, int, int], Iterator[Named]]], Callable[..., Iterator[Named]]]:
    """Register a function (module, arch, SM count) -> (id, kernel) pairs for ``cupy_lora.<module>``."""

    def register(function: Callable[[Any, int, int], Iterator[Named]]) -> Callable[..., Iterator[Named]]:
        _FAMILIES[module] = function
        return function

    return register


def kernels(arch: int) -> list[Named]:
    """Every distinct kernel for one architecture, with an id that says what asked for it."""
    found: dict[_jit.Kernel, str] = {}
    for module, function in _FAMILIES.items():
        for name, kernel in function(importlib.import_module(f"cupy_lora.{module}"), arch, SM_COUNTS[arch]):
            found.setdefault(kernel, f"{module}-{name}")
    return [(name, kernel) for kernel, name in found.items()]


def one_per_source(arch: int) -> list[Named]:
    """The first kernel of each source file."""
    first: dict[str, Named] = {}
    for name, kernel in kernels(arch):
        first.setdefault(kernel.source, (name, kernel))
    return list(first.values())


def array(
    shape: tuple[int, ...], dtype: np.dtype[Any], strides: tuple[int, ...] | None = None, offset: int = 0
) -> Array:
    """What a plan sees of a device array; ``offset`` (in bytes) takes its alignment away. Memory is never touched."""
    if strides is None:
        strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return Array(next(_addresses) + offset, shape, strides, dtype, 0, None)


_addresses = itertools.count(1 << 32, 1 << 32)  # far apart, 256-byte aligned
_SHORT = {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}


@family("norm")
def norm_kernels(norm: Any, arch: int, sm_count: int) -> Iterator[Named]:
    def case(
        columns: int, dtype: np.dtype[Any], weight: np.dtype[Any], *, fused: bool = False, offset: int = 0, pad: int = 0
    ) -> Named:
        x, residual, out = (array((3, columns), dtype, (columns + pad, 1), offset) for _ in range(3))
        launch = norm.plan_rms_norm(
            x, residual if fused else None, array((columns,), weight), out, 1e-6, arch=arch, sms=sm_count
        )
        unaligned = "-unaligned" if offset or pad else ""
        name = f"{columns}-{_SHORT[dtype.name]}-{_SHORT[weight.name]}{'-fused' if fused else ''}{unaligned}"
        return name, launch.kernel

    for columns in (1, 7, 65, 128, 1000, 1024, 4096, 5120, 8192, 16384, 28672, 65536, 65537):
        yield case(columns, BFLOAT16, BFLOAT16)
        yield case(columns, BFLOAT16, BFLOAT16, fused=True)
    for columns in (129, 4096, 65536):
        for dtype, weight in ((FLOAT16, FLOAT16), (FLOAT32, FLOAT32), (FLOAT16, FLOAT32), (BFLOAT16, FLOAT32)):
            yield case(columns, dtype, weight)
            yield case(columns, dtype, weight, fused=True)
    for columns in (4096, 20000, 65536):
        yield case(columns, BFLOAT16, BFLOAT16, offset=2, fused=True)
        yield case(columns, FLOAT32, FLOAT32, pad=1)


@family("paged_kv")
def paged_kv_kernels(paged_kv: Any, arch: int, sm_count: int) -> Iterator[Named]:
    del arch, sm_count  # the same plan everywhere
    shapes = ((1, 64, 16), (2, 128, 1), (8, 128, 16), (8, 96, 16), (5, 80, 7), (32, 128, 32), (3, 256, 64), (1, 8, 3))
    for heads, head_dim, page in shapes:
        for dtype in (BFLOAT16, FLOAT32) if head_dim == 128 else (BFLOAT16,):
            for offset in (0, 2) if heads == 8 and dtype == BFLOAT16 else (0,):
                for new in (False, True):
                    k, v = (array((6, heads, head_dim), dtype, offset=offset) for _ in range(2))
                    pointers, pages, last = array((9,), INT64), array((4,), INT32), array((3,), INT32)
                    indptr = array((4,), INT32) if new else None
                    launch = paged_kv.plan_write_kv(pointers, pages, last, k, v, indptr, 1, page)
                    unaligned = "-unaligned" if offset else ""
                    name = f"{'init' if new else 'append'}-h{heads}-d{head_dim}-p{page}-{_SHORT[dtype.name]}{unaligned}"
                    yield name, launch.kernel
