"""Batch metadata over NumPy: one slice copy per row. What lies outside of the arrays is left out, as on the device."""

from __future__ import annotations

import numpy as np


def ragged(
    block_tables: np.ndarray, input_lengths: np.ndarray, cache_lengths: np.ndarray, block_tables_ragged: np.ndarray
) -> None:
    """The rows of the padded table one after another, each with its input + cache entries."""
    start = 0
    for row, new, cached in zip(block_tables, input_lengths.tolist(), cache_lengths.tolist(), strict=False):
        length = max(new, 0) + max(cached, 0)
        part = row[:length]
        room = block_tables_ragged[start : start + part.shape[0]]
        room[...] = part[: room.shape[0]]
        start += length


def block_tables_to_ragged(
    *,
    block_tables: np.ndarray,
    input_lengths: list[int],
    cache_lengths: list[int],
    input_lengths_tensor: np.ndarray,
    cache_lengths_tensor: np.ndarray,
    max_current_length: int,
) -> np.ndarray:
    """See :func:`cupy_lora.block_tables_to_ragged`."""
    del max_current_length
    out = np.empty(sum(input_lengths) + sum(cache_lengths), np.int32)
    ragged(block_tables, input_lengths_tensor, cache_lengths_tensor, out)
    return out


def block_tables_to_padded(
    max_blocks: int, cu_seqlen: np.ndarray, block_tables: np.ndarray, block_tables_ragged: np.ndarray
) -> None:
    """See :func:`cupy_lora.block_tables_to_padded`."""
    del max_blocks
    for row, start, stop in zip(block_tables, cu_seqlen[:-1].tolist(), cu_seqlen[1:].tolist(), strict=True):
        if start >= 0:
            part = block_tables_ragged[start:stop][: row.shape[0]]
            row[: part.shape[0]] = part


def copy_next_input_ids_inplace(
    max_next_input_ids: int,
    all_input_ids: np.ndarray,
    cache_lengths: np.ndarray,
    input_lengths: np.ndarray,
    prompt_lengths: np.ndarray,
    next_input_ids: np.ndarray,
    cu_accepted_ids: np.ndarray,
) -> None:
    """See :func:`cupy_lora.copy_next_input_ids_inplace`."""
    del max_next_input_ids
    lengths = cache_lengths.astype(np.int64) + input_lengths
    for b, row in enumerate(all_input_ids):
        start, stop = int(cu_accepted_ids[b]), min(int(cu_accepted_ids[b + 1]), next_input_ids.shape[0])
        for i in range(start, stop):
            column = int(lengths[b]) + i - start
            if start >= 0 and max(int(prompt_lengths[b]), 0) <= column < row.shape[0]:
                row[column] = next_input_ids[i]


def prepare_position_slot_ids(
    max_input_length: int,
    cache_lengths: np.ndarray,
    cu_seqlen: np.ndarray,
    cu_slots: np.ndarray,
    position_ids: np.ndarray,
    slot_indices: np.ndarray,
) -> None:
    """See :func:`cupy_lora.prepare_position_slot_ids`."""
    del max_input_length
    for b, cached in enumerate(cache_lengths.tolist()):
        start, stop = int(cu_seqlen[b]), min(int(cu_seqlen[b + 1]), position_ids.shape[0])
        if 0 <= start < stop:
            positions = cached + np.arange(stop - start, dtype=np.int64)
            position_ids[start:stop] = positions
            slot_indices[start:stop] = int(cu_slots[b]) + positions


def slots_filtering(
    max_slots: int, slots: np.ndarray, filtered_slots: np.ndarray, cu_slots: np.ndarray, slots_start: np.ndarray
) -> None:
    """See :func:`cupy_lora.slots_filtering`."""
    del max_slots
    for b, first in enumerate(slots_start.tolist()):
        start, stop = int(cu_slots[b]), int(cu_slots[b + 1])
        if start < 0 or first < 0 or stop <= start:
            continue
        part = slots[first : first + stop - start]
        room = filtered_slots[start:stop]
        count = min(part.shape[0], room.shape[0])
        room[:count] = part[:count]


def prepare_decode_step(
    *,
    block_tables: np.ndarray,
    input_lengths: np.ndarray,
    cache_lengths: np.ndarray,
    cu_slots: np.ndarray,
    position_ids: np.ndarray,
    slot_indices: np.ndarray,
    block_tables_ragged: np.ndarray,
    max_current_length: int,
    cu_seqlen: np.ndarray | None = None,
    ragged_indptr: np.ndarray | None = None,
) -> None:
    """See :func:`cupy_lora.prepare_decode_step`."""
    ragged(block_tables, input_lengths, cache_lengths, block_tables_ragged)
    new = np.maximum(input_lengths.astype(np.int64), 0)
    starts = np.concatenate([[0], np.cumsum(new)])
    prepare_position_slot_ids(max_current_length, cache_lengths, starts, cu_slots, position_ids, slot_indices)
    if cu_seqlen is not None:
        cu_seqlen[...] = starts
    if ragged_indptr is not None:
        ragged_indptr[0] = 0
        ragged_indptr[1:] = np.cumsum(new + np.maximum(cache_lengths.astype(np.int64), 0))
