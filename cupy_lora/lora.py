"""The whole LoRA update of a layer in one launch: shrink, expand, every slice, every rank."""

from __future__ import annotations

from typing import Any

from . import _env, _jit, _loop, reference
from ._arrays import CPU, check_no_overlap, check_shape, same_device, stream_for, view
from ._lora_checks import check_mix, real, rows
from .dispatch import LoraConfig
from .lora_batch import LoraBatch
from .lora_weights import LoraWeights


def add_lora(
    y: Any, x: Any, weights: LoraWeights, batch: LoraBatch, *, scale: float = 1.0, config: LoraConfig | None = None
) -> Any:
    """Add each row's own low-rank update: ``y[t] += scale * slot_scale * (x[t] @ A.T) @ B.T``.

    Parameters
    ----------
    y : (num_tokens, sum(out_features)) array, dtype of the weights or float32
        Updated in place; rows without an adapter, and slices that a row's adapter
        leaves out, are left alone. Rows may be any distance apart.
    x : (num_tokens, in_features) array, dtype of the weights
        Rows may be any distance apart.
    weights : LoraWeights
        The layer's adapters, on the device of the arrays.
    batch : LoraBatch
        Which adapter each row uses, on the device of the arrays.
    scale : float
        Multiplies every adapter's own scale, in float32.
    config : LoraConfig, optional
        Overrides the library's choice (:func:`cupy_lora.dispatch.choose_lora`): the same bits at another speed.

    Returns
    -------
    array
        ``y``.

    Raises
    ------
    TypeError
        For a wrong type or dtype.
    ValueError
        For shapes that disagree, a batch of another number of rows, arrays on
        different devices, a y that overlaps x. Nothing is written then.

    Notes
    -----
    Sums are in float32 in a fixed order and y is rounded once: the same row gives the
    same bits whatever else is in the batch.
    """
    if not isinstance(weights, LoraWeights):
        raise TypeError(f"weights: expected a LoraWeights, got {type(weights).__name__}")
    if not isinstance(batch, LoraBatch):
        raise TypeError(f"batch: expected a LoraBatch, got {type(batch).__name__}")
    ya = rows("y", y)
    xa = rows("x", x)
    check_mix("x", xa, "weights", weights.dtype, also_float32=False)
    check_mix("y", ya, "weights", weights.dtype, also_float32=True)
    check_shape("x", xa, ("num_tokens", weights.in_features))
    count = xa.shape[0]
    check_shape("y", ya, (count, weights.width))
    device = weights.device
    if xa.device != device or ya.device != device or batch.device != device:
        same_device(y=ya, x=xa, weights=weights.table_view, batch=view("batch", batch.indices))
    if count != batch.num_tokens:
        raise ValueError(f"y: expected the {batch.num_tokens} rows of the batch, got {count}")
    if batch.max_adapters > weights.max_adapters:
        raise ValueError(
            f"batch: expected at most the {weights.max_adapters} adapters of weights, got {batch.max_adapters}"
        )
    check_no_overlap("y", ya, x=xa)
    scale = real("scale", scale)
    if device == CPU and (_env.DISABLE_SGMV.on or not _jit.has_host_runner()):
        reference.add_lora(ya.numpy(), xa.numpy(), weights, batch, scale=scale)
        return y
    if count == 0:
        return y
    stream = stream_for(device, y, x)
    if _env.DISABLE_SGMV.on:
        if not batch.has_indices:
            raise ValueError("batch: expected an update since DISABLE_SGMV was set, got one from before")
        _loop.add_lora(ya, xa, weights, batch, scale, stream)
    else:
        from . import _lora_plan

        launch = _lora_plan.add_lora(ya, xa, weights, batch, scale, _jit.device_facts(device), config)
        _jit.run(launch, device, stream)
    weights.used_on(stream)
    return y
