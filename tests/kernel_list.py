"""Every kernel specialisation that is compiled without a GPU: a function per op family, through its plan functions."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import cases
import numpy as np

from cupy_lora import LoraBatch, _jit, _rope
from cupy_lora._arrays import BFLOAT16, FLOAT16, FLOAT32, INT32, INT64, Array
from cupy_lora.lora_weights import RECORD

ARCHS = (80, 86, 89, 90, 100, 120)
SM_COUNTS = {80: 108, 86: 84, 89: 142, 90: 132, 100: 148, 120: 170}

Named = tuple[str, _jit.Kernel]
Family = Callable[[Any, _jit.DeviceFacts], Iterator[Named]]
_FAMILIES: dict[str, Family] = {}


def family(module: str) -> Callable[[Family], Family]:
    """Register a function (module, facts of a GPU) -> (id, kernel) pairs for ``cupy_lora.<module>``."""

    def register(function: Family) -> Family:
        assert module not in _FAMILIES, f"{module} is listed twice"
        _FAMILIES[module] = function
        return function

    return register


def kernels(arch: int) -> list[Named]:
    """Every distinct kernel for one architecture, with an id that says what asked for it."""
    facts = _jit.DeviceFacts(arch, SM_COUNTS[arch])
    found: dict[_jit.Kernel, str] = {}
    for module, function in _FAMILIES.items():
        for name, kernel in function(importlib.import_module(f"cupy_lora.{module}"), facts):
            found.setdefault(kernel, f"{kernel.source}-{name}")
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


def padded(rows: int, columns: int, dtype: np.dtype[Any], pad: tuple[int, int]) -> Array:
    """Rows with ``pad`` columns before and after each, as the cases have them."""
    return array((rows, columns), dtype, (columns + sum(pad), 1), pad[0] * dtype.itemsize)


# tokens, in, out, rank, adapters: what the rule chooses on 9.0, where it was timed, far from the sizes of the cases.
CHOSEN = (
    (31, 1408, 6656, 24, 4),
    (32, 1280, 4864, 48, 32),
    (97, 6656, 8064, 12, 97),
    (130, 768, 7680, 48, 2),
    (179, 3328, 8704, 96, 1),
    (272, 4480, 7168, 12, 272),
    (294, 13184, 6528, 24, 32),
    (296, 10752, 10880, 8, 1),
    (306, 4096, 1024, 4, 306),
    (306, 11008, 7936, 4, 306),
    (374, 768, 13952, 96, 1),
    (439, 11136, 3584, 48, 1),
    (1478, 15232, 1792, 96, 3),
    (1781, 4352, 8704, 24, 4),
    (1843, 14080, 13440, 24, 4),
    (2071, 13440, 6144, 12, 5),
    (3128, 13568, 1536, 48, 7),
    (3131, 14080, 7936, 12, 7),
    (3964, 13696, 3584, 96, 8),
    (4793, 2560, 3584, 48, 10),
    (7433, 13312, 4096, 64, 15),
)


@family("_lora_plan")
def lora_kernels(plan: Any, facts: _jit.DeviceFacts) -> Iterator[Named]:
    for case in (*cases.ADD_LORA, *cases.ADD_LORA_LARGE):
        if case.tokens:
            yield f"add-{case.id}", add_lora_kernel(plan, case, facts)
    for tokens, in_features, out, rank, adapters in CHOSEN if facts.arch == 90 else ():
        case = cases.Case(tokens, in_features, (out,), (rank,) * adapters, "runs", small=False)
        yield f"add-{case.id}", add_lora_kernel(plan, case, facts)
    for case in (*cases.STACKED, *cases.STACKED_LARGE):
        if case.tokens:
            yield from stacked_kernels(plan, case, facts)
    for slices in (1, 2, 3):
        yield f"set_slot-{slices}", set_slot_kernel(plan, slices, facts)
    for max_tokens, max_adapters in ((1, 1), (256, 64), (8192, 512)):
        batch = host_batch(max_tokens, max_adapters)
        for dtype in (INT32, INT64):
            slots = array((max_tokens,), dtype)
            name = f"{max_tokens}x{max_adapters}-{dtype.name}"
            yield f"tiles-{name}", plan.build_tiles(slots, batch).kernel
            indptr = array((max_tokens + 1,), dtype)
            yield f"segments-{name}", plan.build_segment_tiles(indptr, slots, batch).kernel


def host_batch(max_tokens: int, max_adapters: int) -> LoraBatch:
    """A batch whose lists are allocated, as on a GPU."""
    batch = LoraBatch(max_tokens, max_adapters=max_adapters, device="cpu")
    batch.prepare()
    batch.num_tokens = max_tokens
    return batch


def add_lora_kernel(plan: Any, case: cases.Case, facts: _jit.DeviceFacts) -> _jit.Kernel:
    ranks = {case.rank_of(slot, part) for slot in range(len(case.ranks)) for part in range(len(case.outs))} - {0}
    weights = SimpleNamespace(  # what the plan reads of a LoraWeights: the adapters themselves would take gigabytes
        rank_set=frozenset(ranks),
        max_adapters=len(case.ranks),
        slices=case.outs,
        width=sum(case.outs),
        in_features=case.in_features,
        dtype=cases.DTYPES[case.dtype],
        table_view=array((len(case.ranks), len(case.outs), 4), INT64),
    )
    x = padded(case.tokens, case.in_features, cases.DTYPES[case.dtype], case.pad)
    y = padded(case.tokens, sum(case.outs), cases.DTYPES[case.out], case.pad)
    return plan.add_lora(y, x, weights, host_batch(case.tokens, len(case.ranks)), case.scale, facts).kernel


def set_slot_kernel(plan: Any, slices: int, facts: _jit.DeviceFacts) -> _jit.Kernel:
    records = np.zeros(slices, RECORD)
    return plan.set_slot(array((4, slices, 4), INT64), 1, records, facts).kernel


def stacked_kernels(plan: Any, case: cases.Stacked, facts: _jit.DeviceFacts) -> Iterator[Named]:
    weight, other, index = cases.DTYPES[case.dtype], cases.DTYPES[case.other], np.dtype(case.index)
    middle = (1,) if case.layers else ()
    a = array((case.adapters, *middle, case.rank, case.wide), weight)
    b = array((case.adapters, *middle, case.wide, case.rank), weight)
    wide, narrow = (padded(case.tokens, case.wide, weight, case.pad), padded(case.tokens, case.rank, other, case.pad))
    slots, starts, lengths = (array((case.tokens,), index) for _ in range(3))
    rows = (starts, lengths, slots, case.tokens)
    yield f"bgmv-shrink-{case.id}", plan.bgmv_shrink(wide, a, narrow, slots, 0.5, facts).kernel
    yield f"sgmv-shrink-{case.id}", plan.sgmv_shrink(wide, a, narrow, *rows, 0.5, facts).kernel
    for add in (False, True):
        name = f"{case.id}-{'add' if add else 'set'}"
        yield f"bgmv-expand-{name}", plan.bgmv_expand(narrow, b, wide, slots, 0, case.wide, add, facts).kernel
        yield f"sgmv-expand-{name}", plan.sgmv_expand(narrow, b, wide, *rows, 0, case.wide, add, facts).kernel


@family("norm")
def norm_kernels(norm: Any, facts: _jit.DeviceFacts) -> Iterator[Named]:
    def case(
        columns: int,
        dtype: np.dtype[Any],
        weight: np.dtype[Any],
        *,
        fused: bool = False,
        walk: bool = False,
        offset: int = 0,
        pad: int = 0,
    ) -> Named:
        # On a GPU of one multiprocessor blocks walk over so many rows.
        rows, on = (1000 if columns < 10_000 else 700, _jit.DeviceFacts(facts.arch, 1)) if walk else (3, facts)
        x, residual, out = (array((rows, columns), dtype, (columns + pad, 1), offset) for _ in range(3))
        launch = norm.plan_rms_norm(x, residual if fused else None, array((columns,), weight), out, 1e-6, on)
        assert dict(launch.kernel.defines)["WALK"] or not walk
        marks = "".join(
            f"-{mark}" for mark, on in (("fused", fused), ("walk", walk), ("unaligned", offset or pad)) if on
        )
        return f"{columns}-{_SHORT[dtype.name]}-{_SHORT[weight.name]}{marks}", launch.kernel

    for columns in (1, 7, 65, 128, 1000, 1024, 4096, 5120, 8192, 16384, 28672, 65536, 65537):
        yield case(columns, BFLOAT16, BFLOAT16)
        yield case(columns, BFLOAT16, BFLOAT16, fused=True)
        if columns <= 16384:
            yield case(columns, BFLOAT16, BFLOAT16, fused=True, walk=True)
    for columns in (129, 4096, 65536):
        for dtype, weight in ((FLOAT16, FLOAT16), (FLOAT32, FLOAT32), (FLOAT16, FLOAT32), (BFLOAT16, FLOAT32)):
            yield case(columns, dtype, weight)
            yield case(columns, dtype, weight, fused=True)
            if columns <= 4096:
                yield case(columns, dtype, weight, fused=True, walk=True)
    for columns in (4096, 20000, 65536):
        yield case(columns, BFLOAT16, BFLOAT16, offset=2, fused=True)
        yield case(columns, FLOAT32, FLOAT32, pad=1)


@family("paged_kv")
def paged_kv_kernels(paged_kv: Any, facts: _jit.DeviceFacts) -> Iterator[Named]:
    del facts  # the same plan everywhere
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
    for dtype in (FLOAT16, BFLOAT16, FLOAT32):
        k, v = (array((6, 8, 128), dtype) for _ in range(2))
        tables = array((9,), INT64), array((4,), INT32), array((3,), INT32)
        for indptr in (None, array((4,), INT32)):
            launch = paged_kv.plan_write_kv(*tables, k, v, indptr, 1, 16, _rope.Rope(1e4, 1.0))
            yield f"{'append' if indptr is None else 'init'}-rope-{_SHORT[dtype.name]}", launch.kernel


@family("_metadata_plan")
def metadata_kernels(plan: Any, facts: _jit.DeviceFacts) -> Iterator[Named]:
    del facts  # the same plan everywhere
    lora_plan = importlib.import_module("cupy_lora._lora_plan")
    for dtype in (INT32, INT64):
        rows, table = array((5,), dtype), array((5, 300), dtype)
        cu, slots, flat = array((6,), dtype), array((1000,), dtype), array((5000,), dtype)
        name = dtype.name
        yield f"ragged-{name}", plan.ragged(table, rows, rows, flat, 300).kernel
        yield f"step-{name}", plan.decode_step(table, rows, rows, flat, cu, rows, rows, None, None, 300).kernel
        for tokens in (64, 8192):
            schedule = lora_plan.build_tiles(array((tokens,), dtype), host_batch(tokens, 64))
            step = plan.decode_step(table, rows, rows, flat, cu, rows, rows, None, None, 300, schedule)
            yield f"step-{name}-{tokens}", step.kernel
        for most in (1, 100, 4096):  # one thread, one warp, one block a row
            yield f"padded-{name}-{most}", plan.padded(cu, table, flat, most).kernel
            yield f"copy-{name}-{most}", plan.copy_next_input_ids(table, rows, rows, rows, flat, cu, most).kernel
            yield f"position-{name}-{most}", plan.position_slot_ids(rows, cu, cu, flat, flat, most).kernel
            yield f"slots-{name}-{most}", plan.slots_filtering(slots, flat, cu, rows, most).kernel


@family("_punica_plan")
def punica_kernels(plan: Any, facts: _jit.DeviceFacts) -> Iterator[Named]:
    pointers, indices = array((64,), INT64), array((64,), INT64)
    starts, ends = (array((64,), INT32) for _ in range(2))
    for wide_in, wide_out in ((4096, 16), (16, 4096), (4096, 64), (64, 4096), (100, 7), (33, 1000)):
        for dtype in (FLOAT16, BFLOAT16):
            x, y = array((64, wide_in), dtype), array((64, wide_out), dtype)
            name = f"{wide_in}-{wide_out}-{_SHORT[dtype.name]}"
            yield f"bgmv-{name}", plan.bgmv(y, x, pointers, indices, 1, 0.5, dtype, facts).kernel
            phase = plan.phase_of(wide_in, wide_out)
            for transposed in (False, True):
                launch = plan.sgmv(y, x, pointers, starts, ends, 1, dtype, facts, phase=phase, transposed=transposed)
                yield f"sgmv-{name}{'-transposed' if transposed else ''}", launch.kernel


@family("_attention_plan")
def attention_kernels(plan: Any, facts: _jit.DeviceFacts) -> Iterator[Named]:
    def shape(dim: int, group: int = 4, page: int = 16, dtype: np.dtype[Any] = BFLOAT16, **flags: bool) -> Any:
        options = {"rope": True, "causal": True, "window": False, "soft_cap": False, "vectors": True, **flags}
        return plan.Shape(dim, group, 8, page, dtype, **options)

    shapes = {
        **{f"d{dim}": shape(dim) for dim in (64, 96, 128, 256)},
        "d128-no_rope": shape(128, rope=False),
        "d64-no_rope": shape(64, rope=False),
        "d128-no_rope-f16-window-cap": shape(128, dtype=FLOAT16, rope=False, window=True, soft_cap=True),
        "d128-no_rope-group7-page7-unaligned": shape(128, group=7, page=7, rope=False, vectors=False),
        "d64-no_rope-group32": shape(64, group=32, page=1, dtype=FLOAT16, rope=False, causal=False),
        "d128-f16": shape(128, dtype=FLOAT16),
        "d128-mha-page1": shape(128, group=1, page=1),
        "d128-group7-page7": shape(128, group=7, page=7),
        "d64-group32": shape(64, group=32),
        "d80-unaligned": shape(80, vectors=False),
        "d128-window-cap": shape(128, window=True, soft_cap=True),
        "d96-group3-all": shape(96, group=3, window=True, soft_cap=True, vectors=False),
        "d128-group16": shape(128, group=16),
        "d256-group16-window-cap": shape(256, group=16, window=True, soft_cap=True),
        "d256-no_rope-f16": shape(256, rope=False, dtype=FLOAT16),
    }
    for name, one in shapes.items():
        yield f"decode-{name}", plan.decode_kernel(one, facts.arch)[0]
        yield f"prefill-{name}", plan.prefill_kernel(one, facts.arch)[0]
    yield "prefill-d128-all_keys", plan.prefill_kernel(shape(128, causal=False), facts.arch)[0]
