"""Tables and lengths for the tests of metadata."""

from __future__ import annotations

import numpy as np
import pytest

I32, I64 = np.dtype(np.int32), np.dtype(np.int64)
WIDTHS = [pytest.param(I32, id="int32"), pytest.param(I64, id="int64")]
NEVER = -77  # what nothing may write over


def cumulative(lengths: list[int], dtype: np.dtype) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(dtype)


def table_of(rng: np.random.Generator, rows: int, width: int, dtype: np.dtype) -> np.ndarray:
    return rng.integers(0, 2**31 - 1, (rows, width)).astype(dtype)


def lengths_of(rng: np.random.Generator, batch: int, most: int) -> tuple[list[int], list[int]]:
    total = rng.integers(0, most + 1, batch)
    new = rng.integers(0, total + 1)
    return new.tolist(), (total - new).tolist()
