"""What the metadata functions ask of their arguments. A check raises before anything is written."""

from __future__ import annotations

import array
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import _env
from ._arrays import INDICES, Array, check_contiguous, check_dtype, check_shape, view
from ._lora_checks import host_copy


def vector(
    name: str,
    obj: Any,
    length: int | None = None,
    *,
    least: int = 0,
    dtypes: tuple[np.dtype[Any], ...] = INDICES,
) -> Array:
    """A contiguous vector of this length, or of at least so many entries."""
    array = view(name, obj)
    if array.dtype not in dtypes:
        check_dtype(name, array, dtypes)
    shape = array.shape
    if len(shape) != 1 or (length is not None and shape[0] != length):
        check_shape(name, array, ("length" if length is None else length,))
    if shape[0] < least:
        raise ValueError(f"{name}: expected at least {least} entries, got {shape[0]}")
    if array.strides[0] != 1 and shape[0] > 1:
        check_contiguous(name, array)
    return array


def rows(name: str, obj: Any) -> Array:
    """A table of contiguous rows, any distance apart."""
    array = view(name, obj)
    if array.dtype not in INDICES:
        check_dtype(name, array, INDICES)
    if len(array.shape) != 2:
        check_shape(name, array, ("rows", "width"))
    count, width = array.shape
    if array.size and ((width > 1 and array.strides[1] != 1) or (count > 1 and array.strides[0] < width)):
        raise ValueError(
            f"{name}: expected contiguous rows that do not overlap, got shape {array.shape} "
            f"with strides {array.strides} (elements)"
        )
    return array


def check_table_rows(table: Array, batch: int) -> None:
    """ValueError unless there is a row for each length."""
    if table.shape[0] < batch:
        raise ValueError(f"block_tables: expected at least {batch} rows (one per length), got {table.shape[0]}")


def host_lengths(name: str, lengths: Any, batch: int) -> Sequence[int]:
    """The lengths as a sequence in host memory; waits for the device where they are an array on one."""
    if not isinstance(lengths, (list, tuple)):
        array = vector(name, lengths)
        lengths = list(host_copy(array).tolist())
    if len(lengths) != batch:
        raise ValueError(f"{name}: expected {batch} lengths, got {len(lengths)}")
    return lengths  # type: ignore[no-any-return]


def sum_of_lengths(news: Sequence[int], caches: Sequence[int], width: int) -> int:
    """Entries of the ragged table; ValueError for a row that is too short for its lengths."""
    if not news:
        return 0
    (new_most, new_sum), (cached_most, cached_sum) = _most_and_sum(news), _most_and_sum(caches)
    if new_most < 0 or cached_most < 0 or new_most + cached_most > width:
        for b, (new, cached) in enumerate(zip(news, caches, strict=True)):
            if new < 0 or cached < 0:
                raise ValueError(
                    f"input_lengths and cache_lengths: expected lengths >= 0, got {new} and {cached} at {b}"
                )
            if new + cached > width:
                raise ValueError(
                    f"block_tables: expected rows of at least {new + cached} entries (row {b}), got {width}"
                )
    return new_sum + cached_sum


def _most_and_sum(lengths: Sequence[int]) -> tuple[int, int]:
    """The largest length, and the sum; -1 for the former where the lengths are to be looked at one by one."""
    first = lengths[0]
    # A decode step's one new token each: a tenth of what max() takes.
    if first == lengths[-1] and lengths.count(first) == len(lengths):
        return first, first * len(lengths)
    try:
        array.array("I", lengths)  # refuses a negative one in half the time of min()
    except (OverflowError, TypeError):
        return -1, sum(lengths)
    return max(lengths), sum(lengths)


def debug_cumulative(name: str, cu: Array, total: int, most: int) -> None:
    """Under ``CUPY_LORA_DEBUG=1``: ValueError that names the first entry that is wrong. Waits for the device."""
    if not _env.DEBUG.on:
        return
    entries = host_copy(cu).astype(np.int64)
    bad = np.flatnonzero((entries < 0) | (entries > total))
    if bad.size:
        raise ValueError(f"{name}: expected entries of 0 .. {total}, got {entries[bad[0]]} at {bad[0]}")
    counts = np.diff(entries)
    bad = np.flatnonzero((counts < 0) | (counts > most))
    if bad.size:
        raise ValueError(f"{name}: expected steps of 0 .. {most}, got {counts[bad[0]]} at {bad[0]}")


def debug_lengths(what: str, new: Array, cached: Array, width: int) -> np.ndarray | None:
    """Under ``CUPY_LORA_DEBUG=1``: the lengths in host memory; ValueError for one that its row does not hold."""
    if not _env.DEBUG.on:
        return None
    lengths: np.ndarray = host_copy(new).astype(np.int64) + host_copy(cached)
    _debug_most(what, lengths, width, "width of block_tables")
    return lengths


def _debug_most(name: str, values: np.ndarray, most: int, what: str) -> None:
    bad = np.flatnonzero((values < 0) | (values > most))
    if bad.size:
        raise ValueError(f"{name}: expected 0 .. {most} ({what}), got {int(values[bad[0]])} at {bad[0]}")


# ---- the functions over rows: how many of them there is work for ---------------------------------
def check_padded(cu: Array, table: Array, ragged: Array) -> int:
    """For :func:`cupy_lora.block_tables_to_padded`."""
    count, width = rows("block_tables", table).shape
    vector("cu_seqlen", cu, count + 1)
    vector("block_tables_ragged", ragged)
    debug_cumulative("cu_seqlen", cu, ragged.shape[0], width)
    return count


def check_copy_next(ids: Array, cached: Array, new: Array, prompts: Array, tokens: Array, cu: Array) -> int:
    """For :func:`cupy_lora.copy_next_input_ids_inplace`."""
    count, width = rows("all_input_ids", ids).shape
    vector("cache_lengths", cached, count)
    vector("input_lengths", new, count)
    vector("prompt_lengths", prompts, count)
    vector("next_input_ids", tokens)
    vector("cu_accepted_ids", cu, count + 1)
    debug_cumulative("cu_accepted_ids", cu, tokens.shape[0], width)
    return count


def check_position_slot(cached: Array, cu: Array, slots: Array, positions: Array, indices: Array) -> int:
    """For :func:`cupy_lora.prepare_position_slot_ids`."""
    count = vector("cache_lengths", cached).shape[0]
    vector("cu_seqlen", cu, count + 1)
    vector("cu_slots", slots, least=count)
    tokens = vector("position_ids", positions).shape[0]
    vector("slot_indices", indices, tokens)
    debug_cumulative("cu_seqlen", cu, tokens, tokens)
    return count if tokens else 0


def check_filtering(source: Array, target: Array, cu: Array, starts: Array) -> int:
    """For :func:`cupy_lora.slots_filtering`."""
    vector("slots", source)
    vector("filtered_slots", target)
    count = vector("slots_start", starts).shape[0]
    vector("cu_slots", cu, count + 1)
    debug_cumulative("cu_slots", cu, target.shape[0], source.shape[0])
    if _env.DEBUG.on:
        ends = host_copy(starts).astype(np.int64) + np.diff(host_copy(cu).astype(np.int64))
        _debug_most("slots_start", ends, source.shape[0], "length of slots")
    return count
