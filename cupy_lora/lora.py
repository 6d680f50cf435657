"""The whole LoRA update of a layer in one launch: shrink, expand, every slice, every rank."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from . import _env, _jit, _loop, reference
from ._arrays import CPU, Array, check_no_overlap, check_shape, same_device, stream_for, view
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
    ya, xa = view("y", y), view("x", x)
    scale = real("scale", scale)
    # All that the checks and the plan depend on, but for the addresses: one look-up stands for both.
    key = (
        batch,
        batch.num_tokens,
        batch.tile_counts,
        config,
        scale,
        (ya.shape, ya.strides, ya.dtype, ya.device, ya.ptr % 16),
        (xa.shape, xa.strides, xa.dtype, xa.device, xa.ptr % 16),
    )
    launch = weights.launches.get(key)
    if launch is None:
        _check(ya, xa, weights, batch)
        check_no_overlap("y", ya, x=xa)
    elif abs(ya.ptr - xa.ptr) < launch.reach:
        check_no_overlap("y", ya, x=xa)
    device = weights.device
    if device == CPU and (_env.DISABLE_SGMV.on or not _jit.has_host_runner()):
        reference.add_lora(ya.numpy(), xa.numpy(), weights, batch, scale=scale)
        return y
    if xa.shape[0] == 0:
        return y
    stream = stream_for(device, y, x)
    if _env.DISABLE_SGMV.on:
        if not batch.has_indices:
            raise ValueError("batch: expected an update since DISABLE_SGMV was set, got one from before")
        _loop.add_lora(ya, xa, weights, batch, scale, stream)
    else:
        if launch is None:
            launch = _plan(key, ya, xa, weights, batch, scale, config)
        _jit.run(_jit.Launch(launch.kernel, launch.grid, (xa, ya, *launch.args)), device, stream)
    weights.used_on(stream)
    return y


_MOST_LAUNCHES = 1024  # kept per layer: a server's batch sizes, not every one a program ever used


@dataclass(frozen=True)
class _Planned:
    """A launch without the caller's two arrays, which it must not keep alive.

    Attributes
    ----------
    reach : int
        Bytes that the larger of the two spans: arrays further apart do not overlap.
    """

    kernel: _jit.Kernel
    grid: tuple[int, int, int]
    args: tuple[Any, ...]
    reach: int


def _plan(
    key: Hashable,
    y: Array,
    x: Array,
    weights: LoraWeights,
    batch: LoraBatch,
    scale: float,
    config: LoraConfig | None,
) -> _Planned:
    """The launch for such arrays, kept by the weights until their ranks change."""
    from . import _lora_plan

    launch = _lora_plan.add_lora(y, x, weights, batch, scale, _jit.device_facts(weights.device), config)
    assert launch.args[0] is x
    assert launch.args[1] is y
    reach = max(high - low for low, high in (x.span, y.span))
    planned = _Planned(launch.kernel, launch.grid, launch.args[2:], reach)
    if len(weights.launches) >= _MOST_LAUNCHES:
        weights.launches.clear()
    weights.launches[key] = planned
    return planned


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
