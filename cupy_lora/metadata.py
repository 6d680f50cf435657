"""Batch metadata: the small index computations between two steps of a server, each one launch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _arrays, _env, _jit, _metadata_plan
from ._arrays import (
    CPU,
    INDICES,
    INT32,
    Array,
    check_contiguous,
    check_dtype,
    check_shape,
    same_device,
    stream_for,
    view,
    views,
)
from ._device import has_gpu_kernels
from ._lora_checks import host_copy, integer
from ._plans import Plans

if TYPE_CHECKING:
    from .lora_batch import LoraBatch

__all__ = [
    "block_tables_to_padded",
    "block_tables_to_ragged",
    "copy_next_input_ids_inplace",
    "has_gpu_kernels",
    "has_triton",
    "prepare_decode_step",
    "prepare_position_slot_ids",
    "slots_filtering",
]

has_triton = has_gpu_kernels  # the name that LoRAX asks for


def block_tables_to_ragged(
    *,
    block_tables: Any,
    input_lengths: Sequence[int],
    cache_lengths: Sequence[int],
    input_lengths_tensor: Any,
    cache_lengths_tensor: Any,
    max_current_length: int,
    out: Any = None,
) -> Any:
    """The block table without its padding: one entry per token of cache and input (block size 1), row after row.

    One launch, its cumulative sum included, and one allocation.

    Parameters
    ----------
    block_tables : array of int32 or int64, shape (rows, width)
        Row ``b`` holds ``input_lengths[b] + cache_lengths[b]`` entries. Rows contiguous, any distance
        apart; there may be more of them than lengths.
    input_lengths, cache_lengths : sequence of int
        The lengths on the host: they size the result. A device array here is read, which waits
        for the device; with ``out`` neither is looked at.
    input_lengths_tensor, cache_lengths_tensor : array of int32 or int64, shape (batch,)
        The same lengths beside the table.
    max_current_length : int
        Longest input + cache length: a hint that sizes the grid. One too small is slower, never wrong.
    out : array of int32, optional
        Contiguous, one axis, at least as long as the result; its beginning is written. The way to
        call this while a graph is captured without an allocation.

    Returns
    -------
    array of int32, shape (sum of all lengths,)
        A torch tensor where ``block_tables`` is one, else CuPy (NumPy on the host); or ``out``.

    Raises
    ------
    TypeError
        If a dtype or type is wrong.
    ValueError
        If shapes do not match, a row is shorter than its lengths, or the arrays are on different devices.
    """
    given = block_tables, input_lengths_tensor, cache_lengths_tensor
    kept, key, pointers, objs, on_torch = _plans.find(_RAGGED, given, "ragged", max_current_length)
    if kept is not None and out is not None:
        ragged = _vector("out", out, dtypes=(INT32,))
        if ragged.device == kept.device:
            total = ragged.shape[0]
            if total:
                values = ((_metadata_plan.RAGGED_TOTAL, np.uint32(total)),)
                kept.run((*pointers, ragged.ptr), (*objs, ragged), on_torch, values)
            return out
    table, new, cached = inputs = views(_RAGGED, objs)
    if kept is None:
        _rows("block_tables", table)
        batch = _vector("input_lengths_tensor", new).shape[0]
        _vector("cache_lengths_tensor", cached, batch)
        _check_table_rows(table, batch)
        same_device(block_tables=table, input_lengths_tensor=new, cache_lengths_tensor=cached)
    batch, device = new.shape[0], table.device
    if out is None:
        news = _host_lengths("input_lengths", input_lengths, batch)
        caches = _host_lengths("cache_lengths", cache_lengths, batch)
        _check_lengths(news, caches, table.shape[1])
        out = _empty_like(block_tables, sum(news) + sum(caches), device)
        ragged = view("out", out)
    else:
        ragged = _vector("out", out, dtypes=(INT32,))
        same_device(block_tables=table, out=ragged)
    arrays = (*inputs, ragged)
    total = ragged.shape[0]
    values = ((_metadata_plan.RAGGED_TOTAL, np.uint32(total)),)
    if kept is not None:
        if total:
            kept.run((*pointers, ragged.ptr), arrays, on_torch, values)
    else:
        if _env.DEBUG.on:
            lengths = host_copy(new).astype(np.int64) + host_copy(cached)
            _debug_most("input_lengths_tensor + cache_lengths_tensor", lengths, table.shape[1], "width of block_tables")
            if int(lengths.sum()) > total:
                raise ValueError(f"out: expected room for {int(lengths.sum())} entries, got {total}")
        if device == CPU and not _jit.has_host_runner():
            from .reference import metadata

            metadata.ragged(table.numpy(), new.numpy(), cached.numpy(), ragged.numpy())
            return out
        if batch == 0:
            return out
        if total:
            launch = _metadata_plan.ragged(table, new, cached, ragged, max_current_length)
            _plans.run(key, launch, arrays, on_torch, values=values)
    return out


def prepare_decode_step(
    *,
    block_tables: Any,
    input_lengths: Any,
    cache_lengths: Any,
    cu_slots: Any,
    position_ids: Any,
    slot_indices: Any,
    block_tables_ragged: Any,
    max_current_length: int,
    cu_seqlen: Any = None,
    ragged_indptr: Any = None,
    batch: LoraBatch | None = None,
    adapter_indices: Any = None,
) -> None:
    """All that a step needs of the tables, in one launch.

    Position ids and slot indices as :func:`prepare_position_slot_ids` writes them, the ragged table
    as :func:`block_tables_to_ragged`, the two cumulative sums behind them, and the token-to-adapter
    schedule as ``batch.update(adapter_indices)`` sets it. Nothing is allocated or read back, so the
    call can be captured in a graph.

    Parameters
    ----------
    block_tables : array of int32 or int64, shape (rows, width)
        As in :func:`block_tables_to_ragged`.
    input_lengths, cache_lengths : array of int32 or int64, shape (batch,)
        New tokens (1 each in a plain decode step) and cached tokens of every sequence.
    cu_slots : array of int32 or int64, at least ``batch`` entries
        Where a sequence's slots start.
    position_ids, slot_indices : array of int32 or int64, one axis of equal length
        Written for every new token, ``sum(input_lengths)`` of them.
    block_tables_ragged : array of int32 or int64, one axis
        Written for every token, ``sum(input_lengths + cache_lengths)`` of them.
    max_current_length : int
        Longest input + cache length: a hint that sizes the grid.
    cu_seqlen : array of int32, shape (batch + 1,), optional
        Receives the cumulative sum of ``input_lengths``.
    ragged_indptr : array of int32, shape (batch + 1,), optional
        Receives the cumulative sum of ``input_lengths + cache_lengths``.
    batch : LoraBatch, optional
        Updated with ``adapter_indices``; on the device of the arrays.
    adapter_indices : (num_tokens,) array of int32 or int64, optional
        Slot of each new token, on the device; as ``indices`` of :meth:`LoraBatch.update`.

    Raises
    ------
    TypeError
        If a dtype or type is wrong.
    ValueError
        If shapes do not match, the arrays are on different devices, or only one of ``batch`` and
        ``adapter_indices`` is given.
    """
    if (batch is None) != (adapter_indices is None):
        raise ValueError("batch and adapter_indices: expected both or none, got one of them")
    plans, schedule = _plans if batch is None else batch.step_plans, None
    given = (
        block_tables,
        input_lengths,
        cache_lengths,
        block_tables_ragged,
        cu_slots,
        position_ids,
        slot_indices,
        cu_seqlen,
        ragged_indptr,
        adapter_indices,
        None if batch is None else batch.counter_view,
    )
    kept, key, pointers, objs, on_torch = plans.find(_STEP, given, "decode_step", max_current_length)
    if kept is not None:
        if batch is not None:
            batch.begin_update(view("adapter_indices", objs[9]), plan=False)
        kept.run(pointers, objs, on_torch)
    else:
        table, new, cached, ragged, slots, positions, indices = views(_STEP[:7], objs[:7])
        cu, indptr, adapters = (
            None if obj is None else view(name, obj) for name, obj in zip(_STEP[7:10], objs[7:10], strict=True)
        )
        arrays = (table, new, cached, ragged, slots, positions, indices, cu, indptr)
        device = table.device
        _rows("block_tables", table)
        (count,) = _vector("input_lengths", new).shape
        _vector("cache_lengths", cached, count)
        _check_table_rows(table, count)
        _vector("cu_slots", slots, least=count)
        _vector("slot_indices", indices, _vector("position_ids", positions).shape[0])
        _vector("block_tables_ragged", ragged)
        for name, sums in (("cu_seqlen", cu), ("ragged_indptr", indptr)):
            if sums is not None:
                _vector(name, sums, count + 1, dtypes=(INT32,))
        same_device(
            block_tables=table,
            input_lengths=new,
            cache_lengths=cached,
            cu_slots=slots,
            position_ids=positions,
            slot_indices=indices,
            block_tables_ragged=ragged,
            cu_seqlen=cu,
            ragged_indptr=indptr,
            adapter_indices=adapters,
        )
        if _env.DEBUG.on:
            lengths = host_copy(new).astype(np.int64) + host_copy(cached)
            _debug_most("input_lengths + cache_lengths", lengths, table.shape[1], "width of block_tables")
        integer("max_current_length", max_current_length, -(2**62))
        if batch is not None and adapters is not None:
            _vector("adapter_indices", adapters)
            schedule = batch.begin_update(adapters)
        if device == CPU and not _jit.has_host_runner():
            from .reference import metadata

            metadata.prepare_decode_step(
                block_tables=table.numpy(),
                input_lengths=new.numpy(),
                cache_lengths=cached.numpy(),
                cu_slots=slots.numpy(),
                position_ids=positions.numpy(),
                slot_indices=indices.numpy(),
                block_tables_ragged=ragged.numpy(),
                max_current_length=max_current_length,
                cu_seqlen=None if cu is None else cu.numpy(),
                ragged_indptr=None if indptr is None else indptr.numpy(),
            )
            return
        if count == 0:
            if schedule is not None:
                _jit.run(schedule, device, stream_for(device, block_tables, adapter_indices))
            return
        launch = _metadata_plan.decode_step(*arrays, max_current_length, schedule)
        plans.run(key, launch, (*arrays, adapters, None if batch is None else batch.counter_view), on_torch)


def block_tables_to_padded(max_blocks: int, cu_seqlen: Any, block_tables: Any, block_tables_ragged: Any) -> None:
    """Row ``b`` of the padded table becomes ``block_tables_ragged[cu_seqlen[b] : cu_seqlen[b + 1]]``; the rest stays.

    Parameters
    ----------
    max_blocks : int
        Longest row: a hint that sizes the grid.
    cu_seqlen : array of int32 or int64, shape (rows + 1,)
        Ascending.
    block_tables : array of int32 or int64, shape (rows, width)
        Written in place. Rows contiguous, any distance apart.
    block_tables_ragged : array of int32 or int64, one axis

    Raises
    ------
    TypeError
        If a dtype or type is wrong.
    ValueError
        If shapes do not match, or the arrays are on different devices.
    """
    given = cu_seqlen, block_tables, block_tables_ragged
    kept, key, pointers, objs, on_torch = _plans.find(_PADDED, given, "padded", max_blocks)
    if kept is not None:
        kept.run(pointers, objs, on_torch)
    else:
        cu, table, ragged = arrays = views(_PADDED, objs)
        rows = _rows("block_tables", table).shape[0]
        _vector("cu_seqlen", cu, rows + 1)
        _vector("block_tables_ragged", ragged)
        device = same_device(block_tables=table, cu_seqlen=cu, block_tables_ragged=ragged)
        if _env.DEBUG.on:
            _debug_cumulative("cu_seqlen", cu, ragged.shape[0], table.shape[1])
        if device == CPU and not _jit.has_host_runner():
            from .reference import metadata

            metadata.block_tables_to_padded(max_blocks, cu.numpy(), table.numpy(), ragged.numpy())
            return
        if rows == 0:
            return
        launch = _metadata_plan.padded(cu, table, ragged, max_blocks)
        _plans.run(key, launch, arrays, on_torch)


def copy_next_input_ids_inplace(
    max_next_input_ids: int,
    all_input_ids: Any,
    cache_lengths: Any,
    input_lengths: Any,
    prompt_lengths: Any,
    next_input_ids: Any,
    cu_accepted_ids: Any,
) -> None:
    """Accepted token ``i`` of sequence ``b`` goes to column ``cache + input + i`` of its row.

    A column inside the prompt (``< prompt_lengths[b]``) is left as it is: that sequence is still prefilling.

    Parameters
    ----------
    max_next_input_ids : int
        Most tokens accepted for one sequence: a hint that sizes the grid.
    all_input_ids : array of int32 or int64, shape (batch, width)
        Written in place. Rows contiguous, any distance apart.
    cache_lengths, input_lengths, prompt_lengths : array of int32 or int64, shape (batch,)
    next_input_ids : array of int32 or int64, one axis
        The accepted tokens of all sequences.
    cu_accepted_ids : array of int32 or int64, shape (batch + 1,)
        Sequence ``b`` accepted ``next_input_ids[cu_accepted_ids[b] : cu_accepted_ids[b + 1]]``.

    Raises
    ------
    TypeError
        If a dtype or type is wrong.
    ValueError
        If shapes do not match, or the arrays are on different devices.
    """
    given = all_input_ids, cache_lengths, input_lengths, prompt_lengths, next_input_ids, cu_accepted_ids
    kept, key, pointers, objs, on_torch = _plans.find(_COPY_NEXT, given, "copy_next", max_next_input_ids)
    if kept is not None:
        kept.run(pointers, objs, on_torch)
    else:
        ids, cached, new, prompts, tokens, cu = arrays = views(_COPY_NEXT, objs)
        batch = _rows("all_input_ids", ids).shape[0]
        _vector("cache_lengths", cached, batch)
        _vector("input_lengths", new, batch)
        _vector("prompt_lengths", prompts, batch)
        _vector("next_input_ids", tokens)
        _vector("cu_accepted_ids", cu, batch + 1)
        device = same_device(
            all_input_ids=ids,
            cache_lengths=cached,
            input_lengths=new,
            prompt_lengths=prompts,
            next_input_ids=tokens,
            cu_accepted_ids=cu,
        )
        if _env.DEBUG.on:
            _debug_cumulative("cu_accepted_ids", cu, tokens.shape[0], ids.shape[1])
        if device == CPU and not _jit.has_host_runner():
            from .reference import metadata

            metadata.copy_next_input_ids_inplace(max_next_input_ids, *(a.numpy() for a in arrays))
            return
        if batch == 0:
            return
        launch = _metadata_plan.copy_next_input_ids(ids, cached, new, prompts, tokens, cu, max_next_input_ids)
        _plans.run(key, launch, arrays, on_torch)


def prepare_position_slot_ids(
    max_input_length: int,
    cache_lengths: Any,
    cu_seqlen: Any,
    cu_slots: Any,
    position_ids: Any,
    slot_indices: Any,
) -> None:
    """Position ids and slot indices of the new tokens of every sequence.

    For token ``i`` of sequence ``b``, at ``t = cu_seqlen[b] + i``: ``position_ids[t] = cache_lengths[b] + i`` and
    ``slot_indices[t] = cu_slots[b] + cache_lengths[b] + i`` (an index into the slots).

    Parameters
    ----------
    max_input_length : int
        Most new tokens of one sequence: a hint that sizes the grid.
    cache_lengths : array of int32 or int64, shape (batch,)
    cu_seqlen : array of int32 or int64, shape (batch + 1,)
        Cumulative sum of the new tokens.
    cu_slots : array of int32 or int64, at least ``batch`` entries
        Where a sequence's slots start.
    position_ids, slot_indices : array of int32 or int64, one axis of equal length
        Written in place.

    Raises
    ------
    TypeError
        If a dtype or type is wrong.
    ValueError
        If shapes do not match, or the arrays are on different devices.
    """
    given = cache_lengths, cu_seqlen, cu_slots, position_ids, slot_indices
    kept, key, pointers, objs, on_torch = _plans.find(_POSITION_SLOT, given, "position_slot", max_input_length)
    if kept is not None:
        kept.run(pointers, objs, on_torch)
    else:
        cached, cu, slots, positions, indices = arrays = views(_POSITION_SLOT, objs)
        batch = _vector("cache_lengths", cached).shape[0]
        _vector("cu_seqlen", cu, batch + 1)
        _vector("cu_slots", slots, least=batch)
        tokens = _vector("position_ids", positions).shape[0]
        _vector("slot_indices", indices, tokens)
        device = same_device(
            cache_lengths=cached, cu_seqlen=cu, cu_slots=slots, position_ids=positions, slot_indices=indices
        )
        if _env.DEBUG.on:
            _debug_cumulative("cu_seqlen", cu, tokens, tokens)
        if device == CPU and not _jit.has_host_runner():
            from .reference import metadata

            metadata.prepare_position_slot_ids(max_input_length, *(a.numpy() for a in arrays))
            return
        if batch == 0 or tokens == 0:
            return
        launch = _metadata_plan.position_slot_ids(cached, cu, slots, positions, indices, max_input_length)
        _plans.run(key, launch, arrays, on_torch)


def slots_filtering(max_slots: int, slots: Any, filtered_slots: Any, cu_slots: Any, slots_start: Any) -> None:
    """Keep the slots of some sequences: ``cu_slots[b + 1] - cu_slots[b]`` of them, from ``slots_start[b]`` on.

    Parameters
    ----------
    max_slots : int
        Most slots of one sequence: a hint that sizes the grid.
    slots : array of int32 or int64, one axis
    filtered_slots : array of int32 or int64, one axis
        Written in place, at ``cu_slots[b] : cu_slots[b + 1]``.
    cu_slots : array of int32 or int64, shape (batch + 1,)
    slots_start : array of int32 or int64, shape (batch,)

    Raises
    ------
    TypeError
        If a dtype or type is wrong.
    ValueError
        If shapes do not match, or the arrays are on different devices.
    """
    given = slots, filtered_slots, cu_slots, slots_start
    kept, key, pointers, objs, on_torch = _plans.find(_FILTERING, given, "slots_filtering", max_slots)
    if kept is not None:
        kept.run(pointers, objs, on_torch)
    else:
        source, target, cu, starts = arrays = views(_FILTERING, objs)
        _vector("slots", source)
        _vector("filtered_slots", target)
        batch = _vector("slots_start", starts).shape[0]
        _vector("cu_slots", cu, batch + 1)
        device = same_device(slots=source, filtered_slots=target, cu_slots=cu, slots_start=starts)
        if _env.DEBUG.on:
            _debug_cumulative("cu_slots", cu, target.shape[0], source.shape[0])
            ends = host_copy(starts).astype(np.int64) + np.diff(host_copy(cu).astype(np.int64))
            _debug_most("slots_start", ends, source.shape[0], "length of slots")
        if device == CPU and not _jit.has_host_runner():
            from .reference import metadata

            metadata.slots_filtering(max_slots, *(a.numpy() for a in arrays))
            return
        if batch == 0:
            return
        launch = _metadata_plan.slots_filtering(source, target, cu, starts, max_slots)
        _plans.run(key, launch, arrays, on_torch)


_RAGGED = ("block_tables", "input_lengths_tensor", "cache_lengths_tensor")
_STEP = (
    "block_tables",
    "input_lengths",
    "cache_lengths",
    "block_tables_ragged",
    "cu_slots",
    "position_ids",
    "slot_indices",
    "cu_seqlen",
    "ragged_indptr",
    "adapter_indices",
    "counters",
)
_PADDED = ("cu_seqlen", "block_tables", "block_tables_ragged")
_COPY_NEXT = ("all_input_ids", "cache_lengths", "input_lengths", "prompt_lengths", "next_input_ids", "cu_accepted_ids")
_POSITION_SLOT = ("cache_lengths", "cu_seqlen", "cu_slots", "position_ids", "slot_indices")
_FILTERING = ("slots", "filtered_slots", "cu_slots", "slots_start")
_plans = Plans()


# ---- checks -------------------------------------------------------------------------------------
def _vector(
    name: str,
    obj: Any,
    length: int | None = None,
    *,
    least: int = 0,
    dtypes: tuple[np.dtype[Any], ...] = INDICES,
) -> Array:
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


def _rows(name: str, obj: Any) -> Array:
    array = view(name, obj)
    if array.dtype not in INDICES:
        check_dtype(name, array, INDICES)
    if len(array.shape) != 2:
        check_shape(name, array, ("rows", "width"))
    rows, width = array.shape
    if array.size and ((width > 1 and array.strides[1] != 1) or (rows > 1 and array.strides[0] < width)):
        raise ValueError(
            f"{name}: expected contiguous rows that do not overlap, got shape {array.shape} "
            f"with strides {array.strides} (elements)"
        )
    return array


def _check_table_rows(table: Array, batch: int) -> None:
    if table.shape[0] < batch:
        raise ValueError(f"block_tables: expected at least {batch} rows (one per length), got {table.shape[0]}")


def _host_lengths(name: str, lengths: Any, batch: int) -> Sequence[int]:
    if not isinstance(lengths, (list, tuple)):
        array = _vector(name, lengths)
        lengths = list(host_copy(array).tolist())
    if len(lengths) != batch:
        raise ValueError(f"{name}: expected {batch} lengths, got {len(lengths)}")
    return lengths  # type: ignore[no-any-return]


def _check_lengths(news: Sequence[int], caches: Sequence[int], width: int) -> None:
    if not news:
        return
    if min(news) >= 0 and min(caches) >= 0 and max(news) + max(caches) <= width:
        return
    for b, (new, cached) in enumerate(zip(news, caches, strict=True)):
        if new < 0 or cached < 0:
            raise ValueError(f"input_lengths and cache_lengths: expected lengths >= 0, got {new} and {cached} at {b}")
        if new + cached > width:
            raise ValueError(f"block_tables: expected rows of at least {new + cached} entries (row {b}), got {width}")


def _debug_cumulative(name: str, cu: Array, total: int, most: int) -> None:
    entries = host_copy(cu).astype(np.int64)
    bad = np.flatnonzero((entries < 0) | (entries > total))
    if bad.size:
        raise ValueError(f"{name}: expected entries of 0 .. {total}, got {entries[bad[0]]} at {bad[0]}")
    counts = np.diff(entries)
    bad = np.flatnonzero((counts < 0) | (counts > most))
    if bad.size:
        raise ValueError(f"{name}: expected steps of 0 .. {most}, got {counts[bad[0]]} at {bad[0]}")


def _debug_most(name: str, values: np.ndarray, most: int, what: str) -> None:
    bad = np.flatnonzero((values < 0) | (values > most))
    if bad.size:
        raise ValueError(f"{name}: expected 0 .. {most} ({what}), got {int(values[bad[0]])} at {bad[0]}")


def _empty_like(block_tables: Any, total: int, device: int) -> Any:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(block_tables, torch.Tensor):
        return block_tables.new_empty((total,), dtype=torch.int32)
    return _arrays.empty((total,), INT32, device)
