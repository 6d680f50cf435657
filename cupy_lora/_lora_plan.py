"""From checked arrays to launches: the plans of bgmv, sgmv, the fused layer and the schedule. Pure but for pointers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ._arrays import BFLOAT16, FLOAT16, FLOAT32, INT64, Array
from ._jit import DeviceFacts, Kernel, Launch
from ._lora_choice import LoraConfig, choose_halves, chunk_of, ring_slot_bytes, staged_alone, staged_rank
from .dispatch import choose_lora

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .lora_batch import LoraBatch
    from .lora_weights import LoraWeights

_CTYPES: Final = {BFLOAT16: "bf16", FLOAT16: "f16", FLOAT32: "float"}
_MAX_RANK_SHARED: Final = 1024  # kMaxRank of lora_config.cuh
_HOP_STORES: Final = 400  # kHopStores of lora_exchange.cuh
_CODED_IN: Final = 8192  # longest x with several of them
_CODED_RANKS: Final = 4  # ranks with code of their own in one kernel
_VECTOR: Final = 16  # bytes of the widest access
_MAX_GRID_YZ: Final = 65535

_PLACED: Final = 256  # tokens that a block of build_tiles places
_FEW_TOKENS: Final = 2048  # up to here 256 threads read all indices at once

Defines = tuple[tuple[str, int | str], ...]


def stage_bytes(ranks: Iterable[int]) -> int:
    """Bytes of one unit of B and y, of those of these ranks that are staged: ``kStageBytes`` of lora_exchange.cuh."""
    return max(((32 if rank > 64 else 64) * (rank + 8) * 2 for rank in ranks), default=1024)


def _staged(config: LoraConfig, ranks: tuple[int, ...], in_features: int) -> list[int]:
    """Those of a kernel's ranks whose code stages B and y in the direct form."""
    if len(ranks) == 1:
        return [rank for rank in ranks if staged_alone(rank, config, in_features)]
    return [rank for rank in ranks if staged_rank(rank)]


def _half(cluster: int, chunk: int) -> int:
    """Floats that other blocks write in an exchange of so many ranks: ``half_of`` of lora_exchange.cuh."""
    rows = 8 if cluster <= 2 else min(8, 4 * _HOP_STORES // (chunk * (cluster - 2)))
    return max(cluster * rows, 8 if rows < 8 else 0) * chunk


def _exchange_bytes(config: LoraConfig, chunks: tuple[int, ...]) -> tuple[int, int]:
    """Bytes that other blocks of the cluster write, and the block's own, without v and slots."""
    chunk = max(chunks)
    received = 2 * 4 * max(_half(config.cluster, of) for of in chunks) if config.cluster > 1 else 0
    return received, config.warps * 8 * (chunk + 4) * 4 + 8 * chunk * 4


_V_BYTES: Final = 8 * (_MAX_RANK_SHARED + 4) * 4


def direct_shared_bytes(config: LoraConfig, ranks: tuple[int, ...], in_features: int, *, holds_v: bool) -> int:
    """Dynamic shared memory of the direct form: the map in lora_direct.cuh."""
    staged = _staged(config, ranks, in_features)
    rest = [max(32, chunk_of(rank - 64)) for rank in staged if rank > 64]  # of a second exchange
    chunks = (16, *map(chunk_of, ranks))
    received, own = _exchange_bytes(config, (*chunks, *rest))
    kept = 8 * max(chunks) * 4 if rest else 0
    slots = config.warps * config.stages * stage_bytes(staged)
    return 128 + received + own + kept + max(slots, _V_BYTES if holds_v else 0)


def ring_shared_bytes(config: LoraConfig, ranks: tuple[int, ...], in_features: int) -> int:
    """Dynamic shared memory of the ring form: the map in lora_ring.cuh."""
    ring = [rank for rank in ranks if staged_rank(rank)]
    received, own = _exchange_bytes(config, (16, *map(chunk_of, ranks)))
    remote = received + (2 * config.rows * chunk_of(max(ring, default=1)) * 4 if config.cluster > 1 else 0)
    local = own + _V_BYTES
    for rank in ring:
        slot, parts = ring_slot_bytes(config.rows, rank, in_features, config.warps)
        local = max(local, parts + config.stages * slot)
    return 128 + 256 + remote + local


def _vectors(array: Array, columns: int) -> int:
    """1 where every row can be read 16 bytes at a time: base, row distance and width are multiples of 8 elements."""
    stride = array.strides[0] if array.ndim > 1 and array.shape[0] > 1 else 0
    return int(array.aligned(_VECTOR) and stride % 8 == 0 and columns % 8 == 0)


def _row_stride(array: Array) -> np.int64:
    stride: np.int64 = np.int64(array.strides[0] if array.shape[0] > 1 else array.shape[1])
    return stride


def _defines(config: LoraConfig, **values: int | str) -> Defines:
    values = {
        "CLUSTER": config.cluster,
        "WARPS": config.warps,
        "TILE_ROWS": config.rows,
        "STAGES": max(1, config.stages),
        "MIN_BLOCKS": config.min_blocks,
        **values,
    }
    return tuple(sorted(values.items()))


def coded_ranks(
    ranks: frozenset[int], config: LoraConfig, in_features: int, widths: tuple[int, ...]
) -> tuple[int, ...]:
    """The ranks that get code of their own: those that are staged first, the largest of them."""
    order = sorted(ranks, key=lambda rank: (not staged_rank(rank), rank > chunk_of(rank), rank % 8 != 0, -rank))
    # Several bodies in one kernel spill registers where a block has a whole tile, long leaves or several widths.
    shared = config.cluster > 1 or config.form == "ring"
    most = _CODED_RANKS if shared and in_features <= _CODED_IN and len(set(widths)) == 1 else 1
    return tuple(sorted(order[:most])) or (16,)


# ---- bgmv and sgmv -------------------------------------------------------------------------------


def _half_defines(
    phase: int, config: LoraConfig, x: Array, w: Array, y: Array, rank: int, width: int, *, add: bool, offset: int
) -> Defines:
    """Macros of bgmv.cu and sgmv.cu. ``width``: of x (shrink, phase 1) or of y (expand, phase 2)."""
    shrink = phase == 1
    item = w.dtype.itemsize
    weights_aligned = int(w.aligned(_VECTOR) and (rank * width * item % _VECTOR == 0 or w.shape[0] == 1))
    y_aligned = int(_vectors(y, width) and offset % 8 == 0)
    return _defines(
        config,
        PHASE=phase,
        WEIGHT_T=_CTYPES[w.dtype],
        X_T=_CTYPES[x.dtype],
        OUT_T=_CTYPES[y.dtype],
        IN=width if shrink else 1,
        WIDTHS=1 if shrink else width,
        RANKS=rank,
        ANY_RANK=0,
        X_VECTORS=_vectors(x, width) if shrink else 1,
        A_VECTORS=int(weights_aligned and width % 8 == 0) if shrink else 1,
        B_VECTORS=1 if shrink else weights_aligned,
        Y_VECTORS=1 if shrink else y_aligned,
        TRANSPOSED=0,
        POINTERS=0,
        ADD=int(add),
    )


def _half_kernel(source: str, symbol: str, phase: int, config: LoraConfig, rank: int, defines: Defines) -> Kernel:
    in_features = int(dict(defines)["IN"])
    if phase == 1:
        shared = direct_shared_bytes(replace(config, stages=0), (rank,), in_features, holds_v=False)
    else:
        staged = _staged(config, (rank,), in_features)
        shared = config.warps * config.stages * stage_bytes(staged) if staged else 0
    cluster = config.cluster if phase == 1 else 1
    return Kernel(source, symbol, defines, block=32 * config.warps, shared=shared, cluster=cluster)


def bgmv_shrink(x: Array, a: Array, y: Array, indices: Array, scaling: float, facts: DeviceFacts) -> Launch:
    """Launch of ``bgmv_shrink``; ``a`` (n, rank, in) or (n, 1, rank, in)."""
    tokens, width = x.shape
    rank = a.shape[-2]
    config = choose_halves(rank, tokens * math.ceil(rank / chunk_of(rank)), facts)
    defines = (
        *_half_defines(1, config, x, a, y, rank, width, add=False, offset=0),
        ("INDEX_64", int(indices.dtype == INT64)),
    )
    kernel = _half_kernel("bgmv", "bgmv_shrink", 1, config, rank, defines)
    args = (x, a, None, y, indices, np.int32(a.shape[0]), np.int64(rank * width), np.int64(0), _row_stride(x))
    grid = (tokens * config.cluster, math.ceil(rank / chunk_of(rank)), 1)
    return Launch(kernel, grid, (*args, _row_stride(y), np.float32(scaling)))


def bgmv_expand(
    x: Array,
    b: Array,
    y: Array,
    indices: Array,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool,
    facts: DeviceFacts,
) -> Launch:
    """Launch of ``bgmv_expand`` and ``bgmv_expand_slice``; ``b`` (n, out, rank) or (n, 1, out, rank)."""
    tokens, rank = x.shape
    config = choose_halves(rank, tokens, facts)
    defines = (
        *_half_defines(2, config, x, b, y, rank, slice_size, add=add_inputs, offset=slice_offset),
        ("INDEX_64", int(indices.dtype == INT64)),
    )
    kernel = _half_kernel("bgmv", "bgmv_expand", 2, config, rank, defines)
    args = (x, b, None, _from_column(y, slice_offset), indices, np.int32(b.shape[0]), np.int64(rank * slice_size))
    strides = (np.int64(0), _row_stride(x), _row_stride(y))
    return Launch(kernel, (tokens * config.cluster, 1, 1), (*args, *strides, np.float32(1.0)))


def _from_column(y: Array, column: int) -> Array:
    """The array from this column on: the same rows, another first address."""
    if column == 0:
        return y
    ptr = y.ptr + column * y.dtype.itemsize
    return Array(ptr, (y.shape[0], y.shape[1] - column), y.strides, y.dtype, y.device, y.obj)


def _sgmv(
    phase: int,
    config: LoraConfig,
    defines: Defines,
    x: Array,
    w: Array,
    y: Array,
    starts: Array,
    lengths: Array,
    indices: Array,
    max_seq_length: int,
    rank: int,
    scaling: float,
) -> Launch:
    defines = (
        *defines,
        ("INDEX_64", int(indices.dtype == INT64)),
        ("START_64", int(starts.dtype == INT64)),
        ("LENGTH_64", int(lengths.dtype == INT64)),
        ("ENDS", 0),
    )
    kernel = _half_kernel("sgmv", "sgmv", phase, config, rank, defines)
    segments, tokens = indices.shape[0], x.shape[0]
    tiles = max(1, math.ceil(min(max_seq_length, tokens) / config.rows))
    chunks = math.ceil(rank / chunk_of(rank)) if phase == 1 else 1
    args = (x, w, None, y, starts, lengths, indices, np.int32(segments), np.int64(tokens), np.int32(w.shape[0]))
    strides = (np.int64(w.shape[-2] * w.shape[-1]), np.int64(0), _row_stride(x), _row_stride(y))
    grid = (tiles * config.cluster, chunks, min(segments, _MAX_GRID_YZ))
    return Launch(kernel, grid, (*args, *strides, np.float32(scaling)))


def sgmv_shrink(
    x: Array,
    a: Array,
    y: Array,
    starts: Array,
    lengths: Array,
    indices: Array,
    max_seq_length: int,
    scaling: float,
    facts: DeviceFacts,
) -> Launch:
    """Launch of ``sgmv_shrink``."""
    tokens, width = x.shape
    rank = a.shape[-2]
    tiles = math.ceil(tokens / 8) * math.ceil(rank / chunk_of(rank))
    config = choose_halves(rank, tiles, facts)
    defines = _half_defines(1, config, x, a, y, rank, width, add=False, offset=0)
    return _sgmv(1, config, defines, x, a, y, starts, lengths, indices, max_seq_length, rank, scaling)


def sgmv_expand(
    x: Array,
    b: Array,
    y: Array,
    starts: Array,
    lengths: Array,
    indices: Array,
    max_seq_length: int,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool,
    facts: DeviceFacts,
) -> Launch:
    """Launch of ``sgmv_expand`` and ``sgmv_expand_slice``."""
    tokens, rank = x.shape
    config = choose_halves(rank, math.ceil(tokens / 8), facts)
    defines = _half_defines(2, config, x, b, y, rank, slice_size, add=add_inputs, offset=slice_offset)
    y = _from_column(y, slice_offset)
    return _sgmv(2, config, defines, x, b, y, starts, lengths, indices, max_seq_length, rank, 1.0)


# ---- the fused layer -----------------------------------------------------------------------------


def add_lora(
    y: Array,
    x: Array,
    weights: LoraWeights,
    batch: LoraBatch,
    scale: float,
    facts: DeviceFacts,
    config: LoraConfig | None = None,
) -> Launch:
    """Launch of ``add_lora``; ``config`` overrides the library's choice."""
    tokens = x.shape[0]
    if config is None:
        most = max(weights.rank_set, default=16)
        tiles = {height: batch.tile_bound(height, tokens) for height in batch.heights}
        config = choose_lora(
            most,
            tokens,
            weights.in_features,
            weights.slices,
            dtype=y.dtype,
            arch=facts.arch,
            sm_count=facts.sm_count,
            tiles=tiles,
            aligned=bool(_vectors(x, weights.in_features) and _vectors(y, weights.width)),
            ranks=weights.rank_set,
        )
    widths = weights.slices
    kernel = _layer_kernel(
        config,
        weights.dtype,
        y.dtype,
        weights.in_features,
        widths,
        coded_ranks(weights.rank_set, config, weights.in_features, widths),
        _vectors(x, weights.in_features),
        int(all(width % 8 == 0 for width in widths) and _vectors(y, weights.width)),
    )
    bound = batch.tile_bound(config.rows, tokens)
    tiles_of, counter, _ = batch.schedule(config.rows)
    grid = (max(1, bound) * config.cluster, len(widths), 1)
    args = (
        x,
        y,
        weights.table_view,
        tiles_of,
        counter,
        np.int32(tokens),
        np.int32(weights.max_adapters),
    )
    strides = (np.uint32(_row_stride(x)), np.uint32(_row_stride(y)))
    return Launch(kernel, grid, (*args, *strides, np.float32(scale)))


def _layer_kernel(
    config: LoraConfig,
    weight: np.dtype[Any],
    out: np.dtype[Any],
    width_in: int,
    widths: tuple[int, ...],
    ranks: tuple[int, ...],
    x_vectors: int,
    y_vectors: int,
) -> Kernel:
    defines = _defines(
        config,
        PHASE=0,
        WEIGHT_T=_CTYPES[weight],
        X_T=_CTYPES[weight],
        OUT_T=_CTYPES[out],
        IN=width_in,
        WIDTHS=",".join(map(str, widths)),
        RANKS=",".join(map(str, ranks)),
        ANY_RANK=1,
        X_VECTORS=x_vectors,
        A_VECTORS=int(width_in % 8 == 0),
        B_VECTORS=1,
        Y_VECTORS=y_vectors,
        TRANSPOSED=0,
        ADD=1,
    )
    if config.form == "ring":
        shared = ring_shared_bytes(config, ranks, width_in)
    else:
        shared = direct_shared_bytes(config, ranks, width_in, holds_v=True)
    return Kernel("lora", "add_lora", defines, block=32 * config.warps, shared=shared, cluster=config.cluster)


def set_slot(table: Array, slot: int, records: np.ndarray, facts: DeviceFacts) -> Launch:
    """Launch that writes one slot's records (one per slice) into the table."""
    del facts
    count = len(records)
    kernel = Kernel("lora_weights", "set_slot", (("SLICES", count),), block=max(32, math.ceil(count / 32) * 32))
    by_value = np.zeros(1, np.dtype([("records", records.dtype, (count,))]))
    by_value["records"][0] = records
    return Launch(kernel, (1, 1, 1), (table, np.int32(slot), by_value))


# ---- the schedule --------------------------------------------------------------------------------


def schedule_shared_bytes(heights: tuple[int, ...], max_adapters: int) -> int:
    """Dynamic shared memory of build_tiles: the map in lora_batch.cuh."""
    return 4 * (_PLACED + 32 * len(heights) + (2 + len(heights)) * max_adapters)


def _build(slots: Array, indptr: Array | None, batch: LoraBatch) -> Launch:
    heights = batch.heights
    segments = indptr is not None
    tokens = slots.shape[0]
    if segments:
        tokens = batch.max_tokens if batch.num_tokens is None else batch.num_tokens
    defines = (
        ("HEIGHTS", ",".join(map(str, heights))),
        ("SEGMENTS", int(segments)),
        ("INDEX_64", int(slots.dtype == INT64)),
        ("POINTER_64", int(indptr is not None and indptr.dtype == INT64)),
    )
    shared = schedule_shared_bytes(heights, batch.max_adapters)
    threads = 256 if tokens <= _FEW_TOKENS else 1024
    kernel = Kernel("lora_batch", "build_tiles", (*defines, ("THREADS", threads)), block=threads, shared=shared)
    lists = np.zeros(
        1, np.dtype([("tiles", np.int64, (len(heights),)), ("capacity", np.int32, (len(heights),))], align=True)
    )
    for i, height in enumerate(heights):
        tiles, _, capacity = batch.schedule(height)
        lists["tiles"][0, i] = tiles.ptr
        lists["capacity"][0, i] = capacity
    count = np.int32(slots.shape[0] if segments else 0)
    args = (slots, indptr, count, np.int32(tokens), np.int32(batch.max_adapters), lists, batch.counter_view)
    return Launch(kernel, (max(1, math.ceil(tokens / _PLACED)), 1, 1), args)


def build_tiles(indices: Array, batch: LoraBatch) -> Launch:
    """Launch that arranges rows by slot into tiles."""
    return _build(indices, None, batch)


def build_segment_tiles(indptr: Array, slots: Array, batch: LoraBatch) -> Launch:
    """The same from segments of consecutive rows."""
    return _build(slots, indptr, batch)
