"""One adapter per segment of consecutive rows (prefill): shrink to the rank, expand from it."""

from __future__ import annotations

from typing import Any

from . import _halves


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
    objs = inputs, lora_a_weights, output_tensor, b_seq_start_loc, seq_len_tensor, lora_indices_tensor
    _halves.shrink(_halves.BY_SEGMENT, objs, (batches, max_seq_length), scaling)
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
    objs = inputs, lora_b_weights, output_tensor, b_seq_start_loc, seq_len_tensor, lora_indices_tensor
    _halves.expand(_halves.BY_SEGMENT, objs, (batches, max_seq_length), None, add_inputs)
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
    objs = inputs, lora_b_weights, output_tensor, b_seq_start_loc, seq_len_tensor, lora_indices_tensor
    _halves.expand(_halves.BY_SEGMENT, objs, (batches, max_seq_length), (slice_offset, slice_size), add_inputs)
    return output_tensor
