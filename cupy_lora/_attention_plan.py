"""From checked arrays to launches: paged attention. Pure but for pointers."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ._arrays import BFLOAT16, FLOAT16, FLOAT32, INT32, Array
from ._cubins import ARCH_SPECIFIC
from ._jit import DeviceFacts, Kernel, Launch
from ._rope import Rope, frequencies

_CTYPES: Final = {BFLOAT16: "bf16", FLOAT16: "f16"}
_LOG2E: Final = math.log2(math.e)
_RESERVED: Final = 1024  # bytes of shared memory that the system takes of each block
_BULK_MIN: Final = 1024  # bytes of the smallest copy that the copy engine is asked for

CHUNK_MIN: Final = 256  # keys of the smallest chunk of decode
COUNTERS: Final = 1 << 14  # int32 at the start of a workspace
TICKETS: Final = 4  # the first of them: what hands out units to blocks
SPLIT_LOAD: Final = 1.0  # a sequence is split where it has more keys than this times a block's fair share


@functools.cache
def shared_limits(arch: int) -> tuple[int, int]:
    """Bytes of shared memory that one block may have, and that a multiprocessor has."""
    if arch in (80, 87):
        return 163 << 10, 164 << 10
    if 90 <= arch < 120:
        return 227 << 10, 228 << 10
    return 99 << 10, 100 << 10


@dataclass(frozen=True)
class TileConfig:
    """The shape of a block.

    Attributes
    ----------
    warps, tile, stages : int
        Warps of a block, keys of a tile, tiles in shared memory.
    blocks : int
        16-row blocks of queries of each warp (prefill; 1 in decode).
    resident : int
        Blocks that a multiprocessor shall hold.
    bulk : bool
        Whether the copy engine brings the tiles (decode).
    crews : int
        Warpgroups that multiply 64 rows each, beside one that brings the tiles (prefill by wgmma); 0: mma.sync.
    turns : bool
        Whether they issue their products in turns.
    """

    warps: int
    tile: int
    stages: int
    blocks: int
    resident: int
    bulk: bool = False
    crews: int = 0
    turns: bool = False


@dataclass(frozen=True)
class Shape:
    """What a kernel is compiled for."""

    dim: int
    group: int
    kv_heads: int
    page_size: int
    dtype: np.dtype[Any]
    rope: bool
    causal: bool
    window: bool
    soft_cap: bool
    vectors: bool


def _aligned(*sizes: int) -> int:
    return sum(-(-size // 16) * 16 for size in sizes)


def decode_shared_bytes(dim: int, group: int, rope: bool, config: TileConfig) -> int:
    """Dynamic shared memory of batch_decode: the map in attention_decode.cuh."""
    rows, warps, stages = min(group, 16), config.warps, config.stages
    unit = 4 if dim % 64 == 0 else 2 if dim % 32 == 0 else 1
    ring = (
        *(stages * 2 * (2 * config.tile * dim + (0 if config.bulk else 4 * 32)), stages * rows * 2 * dim, stages * 48),
        *(0 if config.bulk else config.tile * 8, (2 * stages + 2) * 8),
    )
    turned = (17 * (4 * dim + (0 if dim % 32 else 64)), warps * dim // 16 * min(rows, 8) * 64) if rope else ()
    joined = (warps * rows * (16 * unit + 4) * 4, warps * rows * 8, rows * dim * 4, 2 * rows * 8)
    return _aligned(*ring, *turned, *joined, 20, 32 * (warps + 2) * 8, (warps + 2) * 8)


def prefill_shared_bytes(dim: int, rope: bool, config: TileConfig) -> int:
    """Dynamic shared memory of batch_prefill: the map in attention_prefill.cuh."""
    warps, tile, stages = config.warps, config.tile, config.stages
    rows = 16 * config.blocks * warps
    lanes = dim // 16
    turners = lanes << min(32 * warps // lanes, tile).bit_length() - 1
    staging = (stages * 2 * tile * (2 * dim + 16), turners * 64 + dim * 4 if rope else 0, stages * tile * 8)
    return _aligned(rows * (2 * dim + 16), *staging, (warps + 1) * 8, 16, rows * 8)


def wgmma_shared_bytes(dim: int, group: int, rope: bool, config: TileConfig) -> int:
    """Dynamic shared memory of batch_prefill_wgmma: the map in attention_prefill_wgmma.cuh."""
    queries = 2  # units whose queries are there
    rows, key_stages = 64 * config.crews, config.stages + rope
    matrices = 2 * dim * ((key_stages + config.stages) * config.tile + queries * rows)
    far = ((rows // group) + 1) // 8 + 2
    angles = 8 * (2 * 128 * 8 + (1 + 8 + far) * dim // 2) if rope else 0
    return 1024 + _aligned(matrices, 16 * (key_stages + config.stages + queries), queries * 32, queries * 4, angles)


@functools.cache
def choose_decode(dim: int, group: int, page_size: int, rope: bool, arch: int) -> TileConfig:
    """The block of decode: as many bytes under way as fit, two blocks a multiprocessor where they do.

    The number of warps fixes the order of the sums.
    """
    block_limit, limit = shared_limits(arch)
    for warps in (4, 2, 1) if dim <= 128 else (2, 1):
        bulk = arch >= 90 and math.gcd(page_size, 4 * warps) * dim * 2 >= _BULK_MIN
        best: tuple[tuple[int, int], TileConfig] | None = None
        for resident in (1, 2):
            for stages in (2, 3, 4):
                config = TileConfig(warps, 16 * warps, stages, 1, resident, bulk)
                size = decode_shared_bytes(dim, group, rope, config)
                if size > block_limit or resident * (size + _RESERVED) > limit:
                    continue
                rank = resident, stages
                if best is None or rank >= best[0]:
                    best = rank, config
        if best is not None:
            return best[1]
    raise ValueError(f"head_dim: expected one whose tiles fit in shared memory, got {dim}")


@functools.cache
def choose_wgmma(dim: int, rope: bool, arch: int) -> TileConfig | None:
    """The block of prefill by warpgroup products; None where there is none (other architectures, other shapes).

    Where keys are rotated there is a stage more of them, and tiles are smaller to make room for it.
    """
    if arch != 90 or dim not in (64, 128):
        return None
    stages = 2 if dim == 128 else 4
    return TileConfig(warps=12, tile=96 if rope else 128, stages=stages, blocks=1, resident=1, crews=2, turns=True)


@functools.cache
def choose_prefill(dim: int, rope: bool, arch: int) -> TileConfig:
    """The block of prefill by mma.sync: 32 rows a warp where the accumulators fit in registers.

    Measured on 132 multiprocessors at head_dim 128: tiles of 32 keys are as fast as tiles of 64 and take fewer
    registers; where keys are rotated, 8 warps that share one rotation are 4 % faster than two blocks of 4, and tiles
    of 64 another 4 % (but spill from sm_100 on).
    """
    block_limit, limit = shared_limits(arch)
    blocks = 2 if dim <= (128 if arch < 120 else 96) else 1  # more spill registers there
    several = ((4, 2), (4, 1))
    for warps, resident in ((8, 1), *several) if rope else several:
        for tile in (32, 64, 16) if 96 <= dim <= 128 and not (rope and arch < 100) else (64, 32, 16):
            if tile * dim > 64 * 128 or (tile == 16 and (resident == 2 or warps == 8)):
                continue
            config = TileConfig(warps, tile, 3 if rope else 2, blocks, resident)
            size = prefill_shared_bytes(dim, rope, config)
            if size <= block_limit and resident * (size + _RESERVED) <= limit:
                return config
    raise ValueError(f"head_dim: expected one whose tiles fit in shared memory, got {dim}")


def _defines(shape: Shape, config: TileConfig) -> tuple[tuple[str, int | str], ...]:
    values: dict[str, int | str] = {
        "ELEMENT": _CTYPES[shape.dtype],
        "DIM": shape.dim,
        "HEADS": shape.kv_heads,
        "GROUP": shape.group,
        "PAGE": shape.page_size,
        "WARPS": config.warps,
        "TILE": config.tile,
        "STAGES": config.stages,
        "RESIDENT": config.resident,
        "ROPE": int(shape.rope),
        "SOFT_CAP": int(shape.soft_cap),
        "WINDOW": int(shape.window),
        "VECTORS": int(shape.vectors),
    }
    return tuple(values.items())


@functools.cache
def decode_kernel(shape: Shape, arch: int) -> tuple[Kernel, TileConfig]:
    """The specialisation of batch_decode."""
    config = choose_decode(shape.dim, shape.group, shape.page_size, shape.rope, arch)
    units = shape.kv_heads * math.ceil(shape.group / 16)
    chunks = (("CHUNK_MIN", CHUNK_MIN), ("CHUNK_SPREAD", 8 * units), ("TICKETS", TICKETS))
    own = (("MODE", 0), ("COPY_BULK", int(config.bulk)), *chunks)
    shared = decode_shared_bytes(shape.dim, shape.group, shape.rope, config)
    threads = 32 * config.warps + 64
    return Kernel("attention", "batch_decode", (*own, *_defines(shape, config)), threads, shared), config


@functools.cache
def prefill_kernel(shape: Shape, arch: int) -> tuple[Kernel, TileConfig]:
    """The specialisation of batch_prefill."""
    config = choose_wgmma(shape.dim, shape.rope, arch)
    if config is not None:
        return wgmma_kernel(shape, config), config
    config = choose_prefill(shape.dim, shape.rope, arch)
    own = (("MODE", 1), ("BLOCKS", config.blocks), ("CAUSAL", int(shape.causal)))
    shared = prefill_shared_bytes(shape.dim, shape.rope, config)
    kernel = Kernel("attention", "batch_prefill", (*own, *_defines(shape, config)), 32 * config.warps, shared)
    return kernel, config


def wgmma_kernel(shape: Shape, config: TileConfig) -> Kernel:
    """A specialisation of batch_prefill_wgmma."""
    own = (("MODE", 2), ("TURNS", int(config.turns)), ("CAUSAL", int(shape.causal)), (ARCH_SPECIFIC, 1))
    shared = wgmma_shared_bytes(shape.dim, shape.group, shape.rope, config)
    return Kernel("attention", "batch_prefill_wgmma", (*own, *_defines(shape, config)), 32 * config.warps, shared)


@dataclass(frozen=True)
class Numbers:
    """The scalars of a call, checked."""

    sm_scale: float
    soft_cap: float | None
    window: int | None
    rope: Rope | None


def _scales(numbers: Numbers) -> tuple[np.float32, np.float32]:
    """``scale`` and ``cap`` of the kernels."""
    if numbers.soft_cap is None:
        return np.float32(numbers.sm_scale * _LOG2E), np.float32(0)
    return np.float32(numbers.soft_cap * _LOG2E), np.float32(numbers.sm_scale / numbers.soft_cap)


def _row_stride(array: Array) -> np.int64:
    _, heads, dim = array.shape
    stride: np.int64 = np.int64(array.strides[0] if array.shape[0] > 1 else heads * dim)
    return stride


def shape_of(q: Array, out: Array, kv_heads: int, page_size: int, causal: bool, numbers: Numbers) -> Shape:
    """What the kernel depends on."""
    vectors = all(array.aligned(16) and (array.shape[0] < 2 or array.strides[0] % 8 == 0) for array in (q, out))
    _, heads, dim = q.shape
    rope, window, soft_cap = (value is not None for value in (numbers.rope, numbers.window, numbers.soft_cap))
    return Shape(dim, heads // kv_heads, kv_heads, page_size, q.dtype, rope, causal, window, soft_cap, vectors)


def partial_slots(nbytes: int, heads: int, kv_heads: int, dim: int) -> int:
    """Chunks whose partial results a workspace holds."""
    units = kv_heads * math.ceil(heads // kv_heads / 16)
    return max(min((nbytes - 4 * COUNTERS) // (heads * (dim + 4) * 4), (COUNTERS - TICKETS) // units), 0)


def parts_of(workspace: Array, q: Array, kv_heads: int) -> tuple[Array, Array, Array]:
    """The partial results of decode in a workspace (bytes): accumulators, rows, and the counters of arrivals."""
    _, heads, dim = q.shape
    slots = partial_slots(workspace.nbytes, heads, kv_heads, dim)
    rows = workspace.ptr + 4 * COUNTERS

    def part(pointer: int, count: int, dtype: np.dtype[Any]) -> Array:
        return Array(pointer, (count,), (1,), dtype, workspace.device, workspace.obj)

    return (
        part(rows + slots * heads * 16, slots * heads * dim, FLOAT32),
        part(rows, slots * heads * 4, FLOAT32),
        part(workspace.ptr, min(COUNTERS, workspace.nbytes // 4), INT32),
    )


def counters_of(workspace: Array) -> Array:
    """The counters that hand out units, in a workspace (bytes): zeros between launches."""
    return Array(workspace.ptr, (TICKETS,), (1,), INT32, workspace.device, workspace.obj)


def decode(
    q: Array,
    out: Array,
    lse: Array | None,
    tables: tuple[Array, Array, Array],
    parts: tuple[Array, Array, Array],
    shape: Shape,
    layer_idx: int,
    numbers: Numbers,
    facts: DeviceFacts,
) -> Launch:
    """Launch of ``batch_decode``; ``parts``: see :func:`parts_of`."""
    kernel, config = decode_kernel(shape, facts.arch)
    batch, heads, dim = q.shape
    units = shape.kv_heads * math.ceil(shape.group / 16)
    slots = parts[1].shape[0] // (heads * 4)
    at_once = config.resident * facts.sm_count
    # More blocks than there can be units only look at the tables; fewer than units take turns.
    most = batch + tables[0].shape[0] * shape.page_size // CHUNK_MIN
    grid = max(1, min(at_once, units * most))
    args = (
        *(q, out, lse, *tables, *parts, frequencies(dim, numbers.rope)),
        *(_row_stride(q), _row_stride(out)),
        *(np.int32(n) for n in (tables[0].shape[0], batch, layer_idx, min(numbers.window or 0, 2**31 - 1), slots)),
        np.int32(max(1, round(at_once / SPLIT_LOAD))),
        *_scales(numbers),
    )
    return Launch(kernel, (grid, 1, 1), args)


def prefill(
    q: Array,
    out: Array,
    lse: Array | None,
    qo_indptr: Array,
    tables: tuple[Array, Array, Array],
    counters: Array | None,
    shape: Shape,
    layer_idx: int,
    numbers: Numbers,
    facts: DeviceFacts,
) -> Launch:
    """Launch of ``batch_prefill``; ``counters``: see :func:`counters_of`, where :func:`choose_wgmma` is not None."""
    kernel, config = prefill_kernel(shape, facts.arch)
    tokens, _, dim = q.shape
    batch = qo_indptr.shape[0] - 1
    rows = 64 * config.crews or 16 * config.blocks * config.warps
    tiles = tokens * shape.group // rows + min(batch, tokens)  # at most: one begun tile a sequence
    units = tiles * shape.kv_heads
    arrays = q, out, lse, qo_indptr, *tables
    turns = frequencies(dim, numbers.rope)
    strides = _row_stride(q), _row_stride(out)
    sizes = tables[0].shape[0], batch, tokens, layer_idx, min(numbers.window or 0, 2**31 - 1)
    if config.crews:
        most = min(units, 2**31 - 1)
        ints = (np.int32(n) for n in (*sizes, most))
        args = (*arrays, counters, turns, *strides, *ints, *_scales(numbers))
        return Launch(kernel, (min(config.resident * facts.sm_count, units), 1, 1), args)
    args = (*arrays, turns, *strides, *(np.int32(n) for n in sizes), *_scales(numbers))
    return Launch(kernel, (units, 1, 1), args)
