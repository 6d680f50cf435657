"""RMS norm over NumPy: float64 inside, one rounding when the result is stored (the residual sum: float32 inside)."""

from __future__ import annotations

import numpy as np


def rms_norm(input: np.ndarray, weight: np.ndarray, epsilon: float = 1e-6, out: np.ndarray | None = None) -> np.ndarray:
    """See :func:`cupy_lora.rms_norm`."""
    x = input.astype(np.float64)
    scale = 1.0 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + epsilon)
    with np.errstate(invalid="ignore"):  # inf / inf is NaN, as on the device
        normed = x * scale * weight.astype(np.float64)
    if out is None:
        out = np.empty(input.shape, input.dtype)
    out[...] = normed.astype(out.dtype)
    return out


def fused_add_rms_norm(
    input: np.ndarray, residual: np.ndarray, weight: np.ndarray, epsilon: float = 1e-6
) -> tuple[np.ndarray, np.ndarray]:
    """See :func:`cupy_lora.fused_add_rms_norm`."""
    # float32, as the kernel: the stored sum must be the same bits, since the norm is taken of it.
    residual[...] = (residual.astype(np.float32) + input.astype(np.float32)).astype(residual.dtype)
    rms_norm(residual, weight, epsilon, input)
    return input, residual
