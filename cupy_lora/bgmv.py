"""One adapter per row (decode): shrink to the rank, expand from it."""

from __future__ import annotations

from typing import Any

from . import _halves


def bgmv_shrink(
    inputs: Any,
    lora_a_weights: Any,
    output_tensor: Any,
    lora_indices_tensor: Any,
    scaling: float = 1.0,
    override_config: object = None,
) -> Any:
    """Project each row down to its adapter's rank: ``output[t] = scaling * inputs[t] @ A[index[t]].T``.

    Parameters
    ----------
    inputs : (num_tokens, in_features) array, float16 or bfloat16
        Rows may be any distance apart.
    lora_a_weights : (n, rank, in_features) or (n, 1, rank, in_features) array, dtype of ``inputs``
        Contiguous; rank 1 to 1024.
    output_tensor : (num_tokens, rank) array, dtype of the weights or float32
        Overwritten; zeros where the row has no adapter.
    lora_indices_tensor : (num_tokens,) array, int32 or int64
        Adapter of each row; negative: none. A value of ``n`` or more counts as none
        (and is an error under ``CUPY_LORA_DEBUG=1``).
    scaling : float
        Applied in float32.
    override_config : object
        Accepted for compatibility, not used.

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
        devices, an output that overlaps an input. Nothing is written then.
    """
    objs = inputs, lora_a_weights, output_tensor, lora_indices_tensor
    _halves.shrink(_halves.BY_ROW, objs, (), scaling)
    return output_tensor


def bgmv_expand(
    inputs: Any,
    lora_b_weights: Any,
    output_tensor: Any,
    lora_indices_tensor: Any,
    add_inputs: bool = True,
    override_config: object = None,
) -> Any:
    """Project each row up from its adapter's rank: ``output[t] (+)= inputs[t] @ B[index[t]].T``.

    Parameters
    ----------
    inputs : (num_tokens, rank) array, dtype of the weights or float32
        Rows may be any distance apart.
    lora_b_weights : (n, out_features, rank) or (n, 1, out_features, rank) array, float16 or bfloat16
        Contiguous; rank 1 to 1024.
    output_tensor : (num_tokens, out_features) array, dtype of the weights or float32
        Rows without an adapter are left alone, whatever ``add_inputs``.
    lora_indices_tensor : (num_tokens,) array, int32 or int64
        As for :func:`bgmv_shrink`.
    add_inputs : bool
        Add to the output; False: overwrite it.
    override_config : object
        Accepted for compatibility, not used.

    Returns
    -------
    array
        ``output_tensor``.

    Raises
    ------
    TypeError, ValueError
        As for :func:`bgmv_shrink`.
    """
    objs = inputs, lora_b_weights, output_tensor, lora_indices_tensor
    _halves.expand(_halves.BY_ROW, objs, (), None, add_inputs)
    return output_tensor


def bgmv_expand_slice(
    inputs: Any,
    lora_b_weights: Any,
    output_tensor: Any,
    lora_indices_tensor: Any,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = True,
    override_config: object = None,
) -> Any:
    """As :func:`bgmv_expand`, into the columns ``slice_offset : slice_offset + slice_size`` of the output.

    Parameters
    ----------
    inputs, lora_b_weights, lora_indices_tensor, add_inputs, override_config
        As for :func:`bgmv_expand`.
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
        As for :func:`bgmv_shrink`, and for a slice that leaves the output's row.
    """
    objs = inputs, lora_b_weights, output_tensor, lora_indices_tensor
    _halves.expand(_halves.BY_ROW, objs, (), (slice_offset, slice_size), add_inputs)
    return output_tensor
