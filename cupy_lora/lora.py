"""The whole LoRA update of a layer in one launch: shrink, expand, every slice, every rank."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from . import _env, _jit, _loop, reference
from ._arrays import CPU, Array, check_no_overlap, check_shape, read, same_device, stream_of, view, views
from ._lora_checks import check_mix, real, rows
from ._plans import Kept
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
    layout, pointers, objs, on_torch = read(_NAMES, (y, x))
    # All that the checks and the plan depend on, but for the addresses: one look-up stands for both. The scale's type
    # is in it because True is no scale.
    key: Hashable = (batch, batch.num_tokens, batch.tile_counts, config, scale, type(scale), *layout)
    try:
        kept = weights.launches.get(key)
    except TypeError:  # what cannot be hashed: the checks will name it
        kept, key = None, None
    loop = _env.DISABLE_SGMV.on
    if kept is None or loop or not kept.clear(pointers) or (kept.device == CPU and not _jit.has_host_runner()):
        ya, xa = views(_NAMES, objs)
        scale = real("scale", scale)
        _check(ya, xa, weights, batch)
        check_no_overlap("y", ya, x=xa)
        if weights.device == CPU and (loop or not _jit.has_host_runner()):
            reference.add_lora(ya.numpy(), xa.numpy(), weights, batch, scale=scale)
            return y
        if xa.shape[0] == 0:
            return y
        if loop:
            if not batch.has_indices:
                raise ValueError("batch: expected an update since DISABLE_SGMV was set, got one from before")
            stream = stream_of(weights.device, on_torch)
            _loop.add_lora(ya, xa, weights, batch, scale, stream)
            weights.used_on(stream.ptr, on_torch)
            return y
        from . import _lora_plan

        launch = _lora_plan.add_lora(ya, xa, weights, batch, scale, _jit.device_facts(weights.device), config)
        kept = Kept(launch, (ya, xa), ((0, 1),))
        if key is not None:
            if len(weights.launches) >= _MOST_LAUNCHES:
                weights.launches.clear()
            weights.launches[key] = kept
    weights.used_on(kept.run(pointers, objs, on_torch), on_torch)
    return y


_NAMES = ("y", "x")
_MOST_LAUNCHES = 1024  # kept per layer: a server's batch sizes, not every one a program ever used


def _check(y: Array, x: Array, weights: LoraWeights, batch: LoraBatch) -> None:
    rows("y", y)
    rows("x", x)
    check_mix("x", x, "weights", weights.dtype, also_float32=False)
    check_mix("y", y, "weights", weights.dtype, also_float32=True)
    check_shape("x", x, ("num_tokens", weights.in_features))
    count = x.shape[0]
    check_shape("y", y, (count, weights.width))
    for name, array in (("x", x), ("y", y)):
        if count > 1 and array.strides[0] >= 2**32:  # what the kernel's 32-bit row distance holds
            raise ValueError(f"{name}: expected rows less than 2^32 elements apart, got {array.strides[0]}")
    same_device(y=y, x=x, weights=weights.table_view, batch=view("batch", batch.indices))
    if count != batch.num_tokens:
        raise ValueError(f"y: expected the {batch.num_tokens} rows of the batch, got {count}")
    if batch.max_adapters > weights.max_adapters:
        raise ValueError(
            f"batch: expected at most the {weights.max_adapters} adapters of weights, got {batch.max_adapters}"
        )
