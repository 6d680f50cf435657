"""The loop of matrix products: what serves the LoRA calls on a GPU when ``DISABLE_SGMV=1``.

One product per adapter through CuPy, no kernel of this library. It reads the indices on the host, so it waits
for the device and cannot be captured in a graph: a fallback to rule the kernels out with, not a fast path.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from . import _device
from ._arrays import Array
from ._lora_checks import on_device
from .reference import lora as reference

if TYPE_CHECKING:
    from .lora_batch import LoraBatch
    from .lora_weights import LoraWeights


def shrink(x: Array, a: Array, y: Array, slots: np.ndarray, covered: np.ndarray, scaling: float, stream: Any) -> None:
    """See :func:`cupy_lora.reference.lora.shrink_rows`."""
    with _device.on(x.device, stream) as cupy:
        reference.shrink_rows(cupy, np.float32, on_device(x), on_device(a), on_device(y), slots, covered, scaling)


def expand(x: Array, b: Array, y: Array, slots: np.ndarray, add_inputs: bool, columns: slice, stream: Any) -> None:
    """See :func:`cupy_lora.reference.lora.expand_rows`."""
    with _device.on(x.device, stream) as cupy:
        reference.expand_rows(cupy, np.float32, on_device(x), on_device(b), on_device(y), slots, add_inputs, columns)


def add_lora(y: Array, x: Array, weights: LoraWeights, batch: LoraBatch, scale: float, stream: Any) -> None:
    """See :func:`cupy_lora.reference.lora.add_rows`."""
    with _device.on(x.device, stream) as cupy:
        slots = batch.indices[: x.shape[0]].get(stream=stream)
        reference.add_rows(cupy, np.float32, on_device(y), on_device(x), weights, slots, scale)
