"""Batch metadata: the small index computations between two steps of a server, each one launch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from . import _arrays, _jit, _metadata_plan
from ._arrays import CPU, INT32, read, same_device, stream_for, view, views
from ._device import has_gpu_kernels
from ._lora_checks import integer
from ._metadata_checks import (
    check_copy_next,
    check_filtering,
    check_padded,
    check_position_slot,
    check_table_rows,
    debug_lengths,
    host_lengths,
    rows,
    sum_of_lengths,
    vector,
)
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
    kept, key, pointers, objs, on_torch = _ragged_plans.find(_RAGGED, given, max_current_length)
    if kept is None:
        table, new, cached = views(_RAGGED, objs)
        rows("block_tables", table)
        batch = vector("input_lengths_tensor", new).shape[0]
        vector("cache_lengths_tensor", cached, batch)
        check_table_rows(table, batch)
        device = same_device(block_tables=table, input_lengths_tensor=new, cache_lengths_tensor=cached)
        integer("max_current_length", max_current_length, -(2**62))
    else:
        device, batch = kept.device, objs[1].shape[0]
    if out is None:
        news = host_lengths("input_lengths", input_lengths, batch)
        caches = host_lengths("cache_lengths", cache_lengths, batch)
        total = sum_of_lengths(news, caches, objs[0].shape[1])
        out = _empty_like(block_tables, total, device)
        _, (address,), (ragged,), _ = read(_OUT, (out,))
    else:
        ragged = vector("out", out, dtypes=(INT32,))
        total, address = ragged.shape[0], ragged.ptr
        if ragged.device != device:
            same_device(block_tables=view("block_tables", objs[0]), out=ragged)
    if kept is not None:
        if total:
            total_now = ((_metadata_plan.RAGGED_TOTAL, total),)
            kept.run((*pointers, address), (*objs, ragged), on_torch, total_now)
        return out
    ragged = view("out", ragged)
    lengths = debug_lengths("input_lengths_tensor + cache_lengths_tensor", new, cached, table.shape[1])
    if lengths is not None and int(lengths.sum()) > total:
        raise ValueError(f"out: expected room for {int(lengths.sum())} entries, got {total}")
    if device == CPU and not _jit.has_host_runner():
        from .reference import metadata

        metadata.ragged(table.numpy(), new.numpy(), cached.numpy(), ragged.numpy())
    elif batch and total:
        launch = _metadata_plan.ragged(table, new, cached, ragged, max_current_length)
        _ragged_plans.run(key, launch, (table, new, cached, ragged), on_torch)
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
    plans, schedule = _step_plans if batch is None else batch.step_plans, None
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
    kept, key, pointers, objs, on_torch = plans.find(_STEP, given, max_current_length)
    if kept is not None:
        if batch is not None:
            batch.note_update(objs[9])
        kept.run(pointers, objs, on_torch)
        return
    table, new, cached, ragged, slots, positions, indices = views(_STEP[:7], objs[:7])
    cu, indptr, adapters = (
        None if obj is None else view(name, obj) for name, obj in zip(_STEP[7:10], objs[7:10], strict=True)
    )
    arrays = (table, new, cached, ragged, slots, positions, indices, cu, indptr)
    rows("block_tables", table)
    (count,) = vector("input_lengths", new).shape
    vector("cache_lengths", cached, count)
    check_table_rows(table, count)
    vector("cu_slots", slots, least=count)
    vector("slot_indices", indices, vector("position_ids", positions).shape[0])
    vector("block_tables_ragged", ragged)
    for name, sums in (("cu_seqlen", cu), ("ragged_indptr", indptr)):
        if sums is not None:
            vector(name, sums, count + 1, dtypes=(INT32,))
    device = same_device(**dict(zip(_STEP, (*arrays, adapters), strict=False)))
    debug_lengths("input_lengths + cache_lengths", new, cached, table.shape[1])
    integer("max_current_length", max_current_length, -(2**62))
    if batch is not None and adapters is not None:
        vector("adapter_indices", adapters)
        schedule = batch.begin_update(adapters)
        if schedule is None:
            key = None  # not what a batch with kernels would keep
    if device == CPU and not _jit.has_host_runner():
        from .reference import metadata

        inputs = {name: array.numpy() for name, array in zip(_STEP, arrays, strict=False) if array is not None}
        metadata.prepare_decode_step(**inputs, max_current_length=max_current_length)
    elif count:
        launch = _metadata_plan.decode_step(*arrays, max_current_length, schedule)
        plans.run(key, launch, (*arrays, adapters, None if batch is None else batch.counter_view), on_torch)
    elif schedule is not None:
        _jit.run(schedule, device, stream_for(device, block_tables, adapter_indices))


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
    _by_rows(_PADDED, max_blocks, (cu_seqlen, block_tables, block_tables_ragged))


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
    _by_rows(_COPY_NEXT, max_next_input_ids, given)


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
    _by_rows(_POSITION_SLOT, max_input_length, (cache_lengths, cu_seqlen, cu_slots, position_ids, slot_indices))


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
    _by_rows(_FILTERING, max_slots, (slots, filtered_slots, cu_slots, slots_start))


# ---- inside -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _ByRows:
    """A function over rows of known offset."""

    name: str  # of the NumPy one
    hint: str
    arrays: tuple[str, ...]
    check: Callable[..., int]
    plan: Callable[..., _jit.Launch]
    plans: Plans = field(default_factory=Plans)


_PADDED = _ByRows(
    "block_tables_to_padded",
    "max_blocks",
    ("cu_seqlen", "block_tables", "block_tables_ragged"),
    check_padded,
    _metadata_plan.padded,
)
_COPY_NEXT = _ByRows(
    "copy_next_input_ids_inplace",
    "max_next_input_ids",
    ("all_input_ids", "cache_lengths", "input_lengths", "prompt_lengths", "next_input_ids", "cu_accepted_ids"),
    check_copy_next,
    _metadata_plan.copy_next_input_ids,
)
_POSITION_SLOT = _ByRows(
    "prepare_position_slot_ids",
    "max_input_length",
    ("cache_lengths", "cu_seqlen", "cu_slots", "position_ids", "slot_indices"),
    check_position_slot,
    _metadata_plan.position_slot_ids,
)
_FILTERING = _ByRows(
    "slots_filtering",
    "max_slots",
    ("slots", "filtered_slots", "cu_slots", "slots_start"),
    check_filtering,
    _metadata_plan.slots_filtering,
)
_RAGGED = ("block_tables", "input_lengths_tensor", "cache_lengths_tensor")
_OUT = ("out",)
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
_ragged_plans, _step_plans = Plans(), Plans()


def _by_rows(op: _ByRows, hint: int, given: tuple[Any, ...]) -> None:
    kept, key, pointers, objs, on_torch = op.plans.find(op.arrays, given, hint)
    if kept is not None:
        kept.run(pointers, objs, on_torch)
        return
    arrays = views(op.arrays, objs)
    rows_to_do = op.check(*arrays)
    device = same_device(**dict(zip(op.arrays, arrays, strict=True)))
    integer(op.hint, hint, -(2**62))
    if device == CPU and not _jit.has_host_runner():
        from .reference import metadata

        getattr(metadata, op.name)(hint, *(array.numpy() for array in arrays))
    elif rows_to_do:
        op.plans.run(key, op.plan(*arrays, hint), arrays, on_torch)


def _empty_like(block_tables: Any, total: int, device: int) -> Any:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(block_tables, torch.Tensor):
        return block_tables.new_empty((total,), dtype=torch.int32)
    return _arrays.empty((total,), INT32, device)
