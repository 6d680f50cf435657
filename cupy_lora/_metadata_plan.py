"""From checked arrays to launches: the plans of the metadata functions. Pure but for pointers."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import _jit
from ._arrays import INT32, Array

RAGGED_TOTAL = 6  # position of the result's length among the arguments of the ragged launch

_BLOCK = 256
_MOST_CHUNKS = 65535  # of the grid's y
_PER_THREAD = 8  # entries of a row that a thread of the ragged kernels copies: PER_THREAD there
_ROLES = {
    "INPUT_LENGTH": "i32",
    "CACHE_LENGTH": "i32",
    "PROMPT_LENGTH": "i32",
    "CUMULATIVE": "i64",
    "CU_SLOTS": "i64",
    "TABLE": "i32",
    "RAGGED": "i32",
    "POSITION": "i32",
    "SLOT_INDEX": "i64",
    "SLOT": "i64",
    "FILTERED": "i64",
    "START": "i64",
    "TOKEN": "i64",
    "NEXT_TOKEN": "i64",
}


@dataclass(frozen=True)
class Shape:
    """How the threads of a kernel that goes by rows share them.

    Attributes
    ----------
    block : int
        Threads of a block.
    lanes : int
        Threads of a row; the block has ``block / lanes`` rows.
    items : int
        Items of its row that a thread has in flight.
    """

    block: int
    lanes: int
    items: int


def choose_shape(hint: int, *, computed: bool = False) -> Shape:
    """The shape for rows of up to ``hint`` items; pure. The result does not depend on it.

    A decode step's rows have one item: a thread each, in small blocks, so that the rows of a batch spread over the
    multiprocessors. Items that are copied wait for memory, so a thread has four in flight; ``computed`` ones do not.
    """
    if hint == 1:
        return Shape(64, 1, 1)
    if hint <= 128:
        return Shape(128, 32, 4)
    return Shape(256, 256, 2) if computed else Shape(128, 128, 4)


@functools.cache
def metadata_kernel(
    symbol: str,
    shape: Shape | None,
    roles: tuple[tuple[str, np.dtype[Any]], ...],
    schedule: _jit.Kernel | None = None,
) -> _jit.Kernel:
    """One kernel for the integer types of its arrays.

    ``shape`` is None for the ragged kernels; ``schedule`` is the kernel whose blocks the step takes over.
    """
    types = {**_ROLES, **{role: "i32" if dtype == INT32 else "i64" for role, dtype in roles}}
    block, shared = (_BLOCK, 256) if shape is None else (shape.block, 0)
    defines: tuple[tuple[str, int | str], ...] = (*types.items(), ("SCHEDULE", int(schedule is not None)))
    if schedule is not None:
        block, shared = schedule.block, max(shared, schedule.shared)
        defines += schedule.defines
    lanes, items = (block, 1) if shape is None else (shape.lanes, shape.items)
    defines += (("BLOCK", block), ("LANES", lanes), ("ITEMS", items))
    return _jit.Kernel("metadata", symbol, defines, block, shared)


def _row_grid(shape: Shape, rows: int, hint: int) -> tuple[int, int, int]:
    """Blocks for all rows, and for all chunks of a row of ``hint`` items."""
    return -(-rows // (shape.block // shape.lanes)), min(-(-hint // (shape.lanes * shape.items)), _MOST_CHUNKS), 1


def _stride(array: Array) -> np.int64:
    stride: np.int64 = np.int64(array.strides[0] if array.shape[0] > 1 else 0)
    return stride


def _ragged_grid(table: Array, batch: int, max_current_length: int, block: int = _BLOCK) -> tuple[int, int, int]:
    longest = min(max(max_current_length, 1), max(table.shape[1], 1))
    return batch, min(-(-longest // (_PER_THREAD * block)), _MOST_CHUNKS), 1


def ragged(table: Array, new: Array, cached: Array, out: Array, max_current_length: int) -> _jit.Launch:
    """The launch of :func:`cupy_lora.block_tables_to_ragged` for checked arrays."""
    roles = (("TABLE", table.dtype), ("INPUT_LENGTH", new.dtype), ("CACHE_LENGTH", cached.dtype))
    return _jit.Launch(
        metadata_kernel("block_tables_to_ragged", None, (*roles, ("RAGGED", out.dtype))),
        _ragged_grid(table, new.shape[0], max_current_length),
        (
            table,
            _stride(table),
            np.int32(table.shape[1]),
            new,
            cached,
            out,
            np.uint32(out.shape[0]),
        ),
    )


def decode_step(
    table: Array,
    new: Array,
    cached: Array,
    ragged: Array,
    slots: Array,
    positions: Array,
    indices: Array,
    cu_seqlen: Array | None,
    ragged_indptr: Array | None,
    max_current_length: int,
    schedule: _jit.Launch | None = None,
) -> _jit.Launch:
    """The launch of :func:`cupy_lora.prepare_decode_step` for checked arrays.

    ``schedule`` is the launch of ``LoraBatch.update``, which becomes the first blocks of this one.
    """
    roles = (
        ("TABLE", table.dtype),
        ("INPUT_LENGTH", new.dtype),
        ("CACHE_LENGTH", cached.dtype),
        ("RAGGED", ragged.dtype),
        ("CU_SLOTS", slots.dtype),
        ("POSITION", positions.dtype),
        ("SLOT_INDEX", indices.dtype),
    )
    kernel = metadata_kernel("decode_step", None, roles, None if schedule is None else schedule.kernel)
    batch, chunks, _ = _ragged_grid(table, new.shape[0], max_current_length, kernel.block)
    ahead = 0 if schedule is None else schedule.grid[0]
    return _jit.Launch(
        kernel,
        (ahead + batch, chunks, 1),
        (
            table,
            _stride(table),
            np.int32(table.shape[1]),
            new,
            cached,
            ragged,
            np.uint32(ragged.shape[0]),
            slots,
            positions,
            indices,
            np.uint32(positions.shape[0]),
            cu_seqlen,
            ragged_indptr,
            *(() if schedule is None else (np.int32(ahead), *schedule.args)),
        ),
    )


def padded(cu: Array, table: Array, ragged: Array, max_blocks: int) -> _jit.Launch:
    """The launch of :func:`cupy_lora.block_tables_to_padded` for checked arrays."""
    rows, width = table.shape
    hint = max(max_blocks, 1)
    shape = choose_shape(hint)
    roles = (("CUMULATIVE", cu.dtype), ("TABLE", table.dtype), ("RAGGED", ragged.dtype))
    return _jit.Launch(
        metadata_kernel("block_tables_to_padded", shape, roles),
        _row_grid(shape, rows, hint),
        (
            cu,
            table,
            _stride(table),
            np.int32(width),
            ragged,
            np.int64(ragged.shape[0]),
            np.int32(rows),
        ),
    )


def copy_next_input_ids(
    rows: Array, cached: Array, new: Array, prompts: Array, tokens: Array, cu: Array, max_next_input_ids: int
) -> _jit.Launch:
    """The launch of :func:`cupy_lora.copy_next_input_ids_inplace` for checked arrays."""
    hint = max(max_next_input_ids, 1)
    shape = choose_shape(hint)
    roles = (
        ("TOKEN", rows.dtype),
        ("CACHE_LENGTH", cached.dtype),
        ("INPUT_LENGTH", new.dtype),
        ("PROMPT_LENGTH", prompts.dtype),
        ("NEXT_TOKEN", tokens.dtype),
        ("CUMULATIVE", cu.dtype),
    )
    return _jit.Launch(
        metadata_kernel("copy_next_input_ids", shape, roles),
        _row_grid(shape, rows.shape[0], hint),
        (
            rows,
            _stride(rows),
            np.int32(rows.shape[1]),
            cached,
            new,
            prompts,
            tokens,
            np.int64(tokens.shape[0]),
            cu,
            np.int32(rows.shape[0]),
        ),
    )


def position_slot_ids(
    cached: Array, cu: Array, slots: Array, positions: Array, indices: Array, max_input_length: int
) -> _jit.Launch:
    """The launch of :func:`cupy_lora.prepare_position_slot_ids` for checked arrays."""
    rows = cached.shape[0]
    hint = max(max_input_length, 1)
    shape = choose_shape(hint, computed=True)
    roles = (
        ("CACHE_LENGTH", cached.dtype),
        ("CUMULATIVE", cu.dtype),
        ("CU_SLOTS", slots.dtype),
        ("POSITION", positions.dtype),
        ("SLOT_INDEX", indices.dtype),
    )
    return _jit.Launch(
        metadata_kernel("prepare_position_slot_ids", shape, roles),
        _row_grid(shape, rows, hint),
        (cached, cu, slots, positions, indices, np.int64(positions.shape[0]), np.int32(rows)),
    )


def slots_filtering(source: Array, target: Array, cu: Array, starts: Array, max_slots: int) -> _jit.Launch:
    """The launch of :func:`cupy_lora.slots_filtering` for checked arrays."""
    rows = starts.shape[0]
    hint = max(max_slots, 1)
    shape = choose_shape(hint)
    roles = (("SLOT", source.dtype), ("FILTERED", target.dtype), ("CUMULATIVE", cu.dtype), ("START", starts.dtype))
    return _jit.Launch(
        metadata_kernel("slots_filtering", shape, roles),
        _row_grid(shape, rows, hint),
        (
            source,
            np.int64(source.shape[0]),
            target,
            np.int64(target.shape[0]),
            cu,
            starts,
            np.int32(rows),
        ),
    )
