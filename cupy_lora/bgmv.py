"""One adapter per row (decode): shrink to the rank, expand from it."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import _env, _jit, _loop, reference
from ._arrays import CPU, Array, check_no_overlap, check_shape, same_device, stream_for
from ._lora_checks import check_mix, check_rank, debug_slots, host_copy, indices, integer, real, rows, stacked


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
    x = rows("inputs", inputs)
    a = stacked("lora_a_weights", lora_a_weights)
    y = rows("output_tensor", output_tensor)
    check_mix("inputs", x, "lora_a_weights", a.dtype, also_float32=False)
    check_mix("output_tensor", y, "lora_a_weights", a.dtype, also_float32=True)
    rank, width = a.shape[-2:]
    check_rank("lora_a_weights", rank)
    check_shape("inputs", x, ("num_tokens", width))
    check_shape("output_tensor", y, (x.shape[0], rank))
    slots = indices("lora_indices_tensor", lora_indices_tensor, x.shape[0])
    scaling = real("scaling", scaling)
    check_no_overlap("output_tensor", y, inputs=x, lora_a_weights=a, lora_indices_tensor=slots)
    device = same_device(inputs=x, lora_a_weights=a, output_tensor=y, lora_indices_tensor=slots)
    debug_slots("lora_indices_tensor", slots, a.shape[0])
    if device == CPU and (_env.DISABLE_SGMV.on or not _jit.has_host_runner()):
        reference.bgmv_shrink(x.numpy(), a.numpy(), y.numpy(), slots.numpy(), scaling)
        return output_tensor
    stream = stream_for(device, inputs, lora_a_weights, output_tensor, lora_indices_tensor)
    if _env.DISABLE_SGMV.on:
        host = host_copy(slots)
        _loop.shrink(x, a, y, host, np.ones(host.shape, np.bool_), scaling, stream)
    elif x.shape[0]:
        from . import _lora_plan

        _jit.run(_lora_plan.bgmv_shrink(x, a, y, slots, scaling, _jit.device_facts(device)), device, stream)
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
    b = stacked("lora_b_weights", lora_b_weights)
    y = rows("output_tensor", output_tensor)
    check_shape("output_tensor", y, ("num_tokens", b.shape[-2]))
    _expand(inputs, b, y, lora_indices_tensor, 0, b.shape[-2], add_inputs)
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
    b = stacked("lora_b_weights", lora_b_weights)
    y = rows("output_tensor", output_tensor)
    _expand(inputs, b, y, lora_indices_tensor, slice_offset, slice_size, add_inputs)
    return output_tensor


def check_expand(x: Array, b: Array, y: Array, slice_offset: int, slice_size: int, add_inputs: bool) -> None:
    """What both expands check about inputs, weights, output and slice."""
    check_mix("inputs", x, "lora_b_weights", b.dtype, also_float32=True)
    check_mix("output_tensor", y, "lora_b_weights", b.dtype, also_float32=True)
    out, rank = b.shape[-2:]
    check_rank("lora_b_weights", rank)
    check_shape("inputs", x, ("num_tokens", rank))
    check_shape("output_tensor", y, (x.shape[0], "width"))
    if slice_size != out:
        raise ValueError(f"slice_size: expected {out} (the rows of lora_b_weights), got {slice_size}")
    if slice_offset + slice_size > y.shape[1]:
        raise ValueError(
            f"slice_offset: expected a slice within the {y.shape[1]} columns of output_tensor, "
            f"got columns {slice_offset} to {slice_offset + slice_size}"
        )
    if not isinstance(add_inputs, (bool, np.bool_)):
        raise TypeError(f"add_inputs: expected a bool, got {type(add_inputs).__name__}")


def _expand(
    inputs: Any, b: Array, y: Array, lora_indices_tensor: Any, slice_offset: int, slice_size: int, add_inputs: bool
) -> None:
    x = rows("inputs", inputs)
    slice_offset = integer("slice_offset", slice_offset, 0)
    slice_size = integer("slice_size", slice_size, 0)
    check_expand(x, b, y, slice_offset, slice_size, add_inputs)
    slots = indices("lora_indices_tensor", lora_indices_tensor, x.shape[0])
    check_no_overlap("output_tensor", y, inputs=x, lora_b_weights=b, lora_indices_tensor=slots)
    device = same_device(inputs=x, lora_b_weights=b, output_tensor=y, lora_indices_tensor=slots)
    debug_slots("lora_indices_tensor", slots, b.shape[0])
    columns = slice(slice_offset, slice_offset + slice_size)
    if device == CPU and (_env.DISABLE_SGMV.on or not _jit.has_host_runner()):
        reference.bgmv_expand_slice(
            x.numpy(), b.numpy(), y.numpy(), slots.numpy(), slice_offset, slice_size, bool(add_inputs)
        )
        return
    stream = stream_for(device, inputs, b.obj, y.obj, lora_indices_tensor)
    if _env.DISABLE_SGMV.on:
        _loop.expand(x, b, y, host_copy(slots), bool(add_inputs), columns, stream)
    elif x.shape[0]:
        from . import _lora_plan

        facts = _jit.device_facts(device)
        launch = _lora_plan.bgmv_expand(x, b, y, slots, slice_offset, slice_size, bool(add_inputs), facts)
        _jit.run(launch, device, stream)
