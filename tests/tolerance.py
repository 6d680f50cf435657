"""How far a result may be from the exact one: what rounding allows, element by element."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np

FLOAT32_UNIT = 2.0**-24


def unit(dtype: np.dtype) -> float:
    """Largest relative error of rounding to ``dtype`` once (half a unit in the last place)."""
    return float(ml_dtypes.finfo(dtype).eps) / 2


def bound(dtype: np.dtype, exact: np.ndarray, magnitude: np.ndarray, terms: int) -> np.ndarray:
    """Allowed absolute error of each element.

    ``magnitude`` is the sum of the absolute values of the terms that make up each element and
    ``terms`` their number: float32 sums of that many terms err by about sqrt(terms) units of it
    (twice that is allowed), then one rounding to ``dtype`` follows.
    """
    sums = 2 * math.sqrt(max(terms, 1)) * FLOAT32_UNIT * magnitude
    # Below the smallest normal number rounding is absolute; float32 subnormals are flushed to zero (-ftz=true).
    info = ml_dtypes.finfo(dtype)
    least = float(info.smallest_subnormal) / 2 if dtype == np.float16 else float(info.tiny)
    return sums + unit(dtype) * (np.abs(exact) + sums) + least


def assert_close(
    actual: np.ndarray, exact: np.ndarray, magnitude: np.ndarray, terms: int, what: str = "result"
) -> None:
    """Fail with the worst element and its place if one is further from ``exact`` than :func:`bound`."""
    assert actual.shape == exact.shape, f"{what}: shape {actual.shape}, expected {exact.shape}"
    if actual.size == 0:
        return
    allowed = bound(actual.dtype, exact, magnitude, terms)
    error = np.abs(actual.astype(np.float64) - exact)
    excess = np.where(np.isnan(error), np.inf, error) / allowed
    off = int((excess > 1).sum())
    worst = np.unravel_index(int(np.argmax(excess)), excess.shape)
    if off:
        place = tuple(int(i) for i in worst)
        raise AssertionError(
            f"{what}: {off} of {excess.size} elements are off; the worst at {place}: "
            f"got {float(actual[worst])!r}, exact {float(exact[worst])!r}, "
            f"error {float(error[worst]):.3g}, allowed {float(allowed[worst]):.3g}"
        )


def assert_same_bits(actual: np.ndarray, expected: np.ndarray, what: str = "result") -> None:
    """Fail with the first element whose bits differ."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    raw = np.dtype(f"u{actual.dtype.itemsize}")
    one, two = np.ascontiguousarray(actual).view(raw), np.ascontiguousarray(expected).view(raw)
    if not np.array_equal(one, two):
        place = tuple(int(i) for i in np.argwhere(one != two)[0])
        raise AssertionError(
            f"{what}: the bits of {int((one != two).sum())} of {one.size} elements differ, first at {place}: "
            f"got {float(actual[place])!r}, expected {float(expected[place])!r}"
        )
