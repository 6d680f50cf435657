"""One adapter per segment of consecutive rows (prefill): shrink to the rank, expand from it."""

from __future__ import annotations

from typing import Any

from . import _env, _jit, _loop, reference
from ._arrays import CPU, Array, check_no_overlap, check_shape, same_device, stream_for
from ._lora_checks import (
    check_mix,
    check_rank,
    check_segments,
    debug_slots,
    host_copy,
    indices,
    integer,
    real,
    rows,
    stacked,
)
from .bgmv import check_expand
from .reference.lora import segment_slots


def sgmv_shrink(
    inputs: Any,
    lora_a_weights: Any,
    output_tensor: Any,
    b_seq_start_loc: Any,
    seq_len_tensor: Any,
    lora_indices_tensor: Any,
    batches: int,
    max_seq_length: int,
    scaling: float,
) -> Any:
    """Project the rows of each segment down to its adapter's rank.

    ``output[t] = scaling * inputs[t] @ A[slot].T`` for the rows ``start : start + length`` of each segment.

    Parameters
    ----------
    inputs : (num_tokens, in_features) array, float16 or bfloat16
        Rows may be any distance apart.
    lora_a_weights : (n, rank, in_features) or (n, 1, rank, in_features) array, dtype of ``inputs``
        Contiguous; rank 1 to 1024.
    output_tensor : (num_tokens, rank) array, dtype of the weights or float32
        Overwritten; zeros in segments without an adapter; rows of no segment are left alone.
    b_seq_start_loc, seq_len_tensor, lora_indices_tensor : (batches,) arrays, int32 or int64
        First row, number of rows (0 is fine) and adapter of each segment; a negative
        adapter: none, as is one of ``n`` or more (an error under ``CUPY_LORA_DEBUG=1``).
        Segments do not overlap. Where the arrays are in host memory segments are checked;
        on a device, what lies beyond the rows is skipped.
    batches : int
        Number of segments.
    max_seq_length : int
        A hint for sizing: one too small is slower, never wrong.
    scaling : float
        Applied in float32.

    Returns
    -------
    array
        ``output_tensor``.

    Raises
    ------
    TypeError
        For a wrong type or dtype.
    ValueError
        For shapes that disagree, weights that are not contiguous, arrays on different
        devices, an output that overlaps an input, segments that overlap or leave the
        rows. Nothing is written then.
    """
    x = rows("inputs", inputs)
    a = stacked("lora_a_weights", lora_a_weights)
    y = rows("output_tensor", output_tensor)
    check_mix("inputs", x, "lora_a_weights", a.dtype, also_float32=False)
    check_mix("output_tensor", y, "lora_a_weights", a.dtype, also_float32=True)
    rank, width = a.shape[-2:]
    check_rank("lora_a_weights", rank)
    check_shape("inputs", x, ("num_tokens", width))
    check_shape("output_tensor", y, (x.shape[0], rank))
    scaling = real("scaling", scaling)
    starts, lengths, slots, max_seq_length = _segments(
        b_seq_start_loc, seq_len_tensor, lora_indices_tensor, batches, max_seq_length
    )
    check_no_overlap(
        "output_tensor",
        y,
        inputs=x,
        lora_a_weights=a,
        b_seq_start_loc=starts,
        seq_len_tensor=lengths,
        lora_indices_tensor=slots,
    )
    device = same_device(
        inputs=x,
        lora_a_weights=a,
        output_tensor=y,
        b_seq_start_loc=starts,
        seq_len_tensor=lengths,
        lora_indices_tensor=slots,
    )
    _check_values(starts, lengths, slots, x.shape[0], a.shape[0])
    if device == CPU and (_env.DISABLE_SGMV.on or not _jit.has_host_runner()):
        reference.sgmv_shrink(
            x.numpy(),
            a.numpy(),
            y.numpy(),
            starts.numpy(),
            lengths.numpy(),
            slots.numpy(),
            batches,
            max_seq_length,
            scaling,
        )
        return output_tensor
    stream = stream_for(device, inputs, lora_a_weights, output_tensor, lora_indices_tensor)
    if _env.DISABLE_SGMV.on:
        per_row, covered = segment_slots(host_copy(starts), host_copy(lengths), host_copy(slots), x.shape[0])
        _loop.shrink(x, a, y, per_row, covered, scaling, stream)
    elif x.shape[0] and batches:
        from . import _lora_plan

        facts = _jit.device_facts(device)
        launch = _lora_plan.sgmv_shrink(x, a, y, starts, lengths, slots, max_seq_length, scaling, facts)
        _jit.run(launch, device, stream)
    return output_tensor


def sgmv_expand(
    inputs: Any,
    lora_b_weights: Any,
    output_tensor: Any,
    b_seq_start_loc: Any,
    seq_len_tensor: Any,
    lora_indices_tensor: Any,
    batches: int,
    max_seq_length: int,
    add_inputs: bool = False,
) -> Any:
    """Project the rows of each segment up from its adapter's rank: ``output[t] (+)= inputs[t] @ B[slot].T``.

    Parameters
    ----------
    inputs : (num_tokens, rank) array, dtype of the weights or float32
        Rows may be any distance apart.
    lora_b_weights : (n, out_features, rank) or (n, 1, out_features, rank) array, float16 or bfloat16
        Contiguous; rank 1 to 1024.
    output_tensor : (num_tokens, out_features) array, dtype of the weights or float32
        Rows without an adapter are left alone, whatever ``add_inputs``.
    b_seq_start_loc, seq_len_tensor, lora_indices_tensor, batches, max_seq_length
        As for :func:`sgmv_shrink`.
    add_inputs : bool
        Add to the output; False: overwrite it.

    Returns
    -------
    array
        ``output_tensor``.

    Raises
    ------
    TypeError, ValueError
        As for :func:`sgmv_shrink`.
    """
    b = stacked("lora_b_weights", lora_b_weights)
    y = rows("output_tensor", output_tensor)
    check_shape("output_tensor", y, ("num_tokens", b.shape[-2]))
    segments = (b_seq_start_loc, seq_len_tensor, lora_indices_tensor, batches, max_seq_length)
    _expand(inputs, b, y, segments, 0, b.shape[-2], add_inputs)
    return output_tensor


def sgmv_expand_slice(
    inputs: Any,
    lora_b_weights: Any,
    output_tensor: Any,
    b_seq_start_loc: Any,
    seq_len_tensor: Any,
    lora_indices_tensor: Any,
    batches: int,
    max_seq_length: int,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = False,
) -> Any:
    """As :func:`sgmv_expand`, into the columns ``slice_offset : slice_offset + slice_size`` of the output.

    Parameters
    ----------
    inputs, lora_b_weights, b_seq_start_loc, seq_len_tensor, lora_indices_tensor, batches, max_seq_length, add_inputs
        As for :func:`sgmv_expand`.
    output_tensor : (num_tokens, width) array, dtype of the weights or float32
        ``width`` is at least ``slice_offset + slice_size``; the other columns are left alone.
    slice_offset : int
        First column of the slice.
    slice_size : int
        Columns of the slice: ``out_features`` of the weights.

    Returns
    -------
    array
        ``output_tensor``.

    Raises
    ------
    TypeError, ValueError
        As for :func:`sgmv_shrink`, and for a slice that leaves the output's row.
    """
    b = stacked("lora_b_weights", lora_b_weights)
    y = rows("output_tensor", output_tensor)
    segments = (b_seq_start_loc, seq_len_tensor, lora_indices_tensor, batches, max_seq_length)
    _expand(inputs, b, y, segments, slice_offset, slice_size, add_inputs)
    return output_tensor


def _segments(
    starts: Any, lengths: Any, slots: Any, batches: Any, max_seq_length: Any
) -> tuple[Array, Array, Array, int]:
    """The segment arrays, each of length ``batches``, and the checked hint."""
    count = integer("batches", batches, 0)
    hint = integer("max_seq_length", max_seq_length, 0)
    seg_slots = indices("lora_indices_tensor", slots)
    if seg_slots.shape[0] != count:
        raise ValueError(f"batches: expected the length of lora_indices_tensor ({seg_slots.shape[0]}), got {count}")
    seg_starts = indices("b_seq_start_loc", starts, count)
    seg_lengths = indices("seq_len_tensor", lengths, count)
    return seg_starts, seg_lengths, seg_slots, hint


def _check_values(starts: Array, lengths: Array, slots: Array, num_rows: int, count: int) -> None:
    """What the segments hold: always checked in host memory, under the debug switch on a device."""
    if starts.device == CPU or _env.DEBUG.on:
        check_segments("b_seq_start_loc", host_copy(starts), "seq_len_tensor", host_copy(lengths), num_rows)
    debug_slots("lora_indices_tensor", slots, count)


def _expand(
    inputs: Any,
    b: Array,
    y: Array,
    segments: tuple[Any, Any, Any, Any, Any],
    slice_offset: int,
    slice_size: int,
    add_inputs: bool,
) -> None:
    x = rows("inputs", inputs)
    slice_offset = integer("slice_offset", slice_offset, 0)
    slice_size = integer("slice_size", slice_size, 0)
    check_expand(x, b, y, slice_offset, slice_size, add_inputs)
    starts, lengths, slots, hint = _segments(*segments)
    inputs_by_name = {
        "inputs": x,
        "lora_b_weights": b,
        "b_seq_start_loc": starts,
        "seq_len_tensor": lengths,
        "lora_indices_tensor": slots,
    }
    check_no_overlap("output_tensor", y, **inputs_by_name)
    device = same_device(**inputs_by_name, output_tensor=y)
    _check_values(starts, lengths, slots, x.shape[0], b.shape[0])
    add_inputs = bool(add_inputs)
    if device == CPU and (_env.DISABLE_SGMV.on or not _jit.has_host_runner()):
        reference.sgmv_expand_slice(
            x.numpy(),
            b.numpy(),
            y.numpy(),
            starts.numpy(),
            lengths.numpy(),
            slots.numpy(),
            slots.shape[0],
            hint,
            slice_offset,
            slice_size,
            add_inputs,
        )
        return
    stream = stream_for(device, inputs, b.obj, y.obj, slots.obj)
    if _env.DISABLE_SGMV.on:
        columns = slice(slice_offset, slice_offset + slice_size)
        per_row, _ = segment_slots(host_copy(starts), host_copy(lengths), host_copy(slots), x.shape[0])
        _loop.expand(x, b, y, per_row, add_inputs, columns, stream)
    elif x.shape[0] and slots.shape[0]:
        from . import _lora_plan

        facts = _jit.device_facts(device)
        launch = _lora_plan.sgmv_expand(
            x, b, y, starts, lengths, slots, hint, slice_offset, slice_size, add_inputs, facts
        )
        _jit.run(launch, device, stream)
