"""Batches for the tests of attention: random ones, their result in float64, and how far off one may be."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import tolerance
from engines import Engine

import cupy_lora
from cupy_lora import _arrays, _attention_plan

BF16, F16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
UNMAPPED = 0x10  # aligned, and nobody's
LAYERS, LAYER = 2, 1


@dataclass(frozen=True)
class Case:
    """A batch: ``queries`` per sequence, None for decode. ``shared``: all pages of a sequence are one page."""

    lengths: tuple[int, ...]
    queries: tuple[int, ...] | None = None
    heads: int = 2
    group: int = 4
    dim: int = 64
    page: int = 16
    dtype: np.dtype = BF16
    rope: str | None = None
    theta: float = 1e4
    rope_scale: float = 1.0
    sm_scale: float | None = None
    causal: bool = True
    window: int | None = None
    soft_cap: float | None = None
    shared: bool = False
    amplitude: float = 1.0

    @property
    def counts(self) -> tuple[int, ...]:
        return (1,) * len(self.lengths) if self.queries is None else self.queries

    @property
    def options(self) -> dict[str, Any]:
        named = {"rope": self.rope, "rope_theta": self.theta, "rope_scale": self.rope_scale, "sm_scale": self.sm_scale}
        named |= {"window": self.window, "soft_cap": self.soft_cap}
        return named if self.queries is None else {**named, "causal": self.causal}


@dataclass
class Data:
    """A case's values on the host, and its arrays on an engine."""

    case: Case
    keys: list[np.ndarray]  # (length, heads, dim) of each sequence
    values: list[np.ndarray]
    q: np.ndarray
    pages: Any
    q_array: Any
    indptr: Any
    tables: tuple[Any, Any, Any]


def build(engine: Engine, case: Case, seed: int = 0) -> Data:
    """Pages in random order in a pool that holds NaN wherever no sequence has a token, dead pointers at both ends."""
    rng = np.random.default_rng(seed)
    counts = [-(-length // case.page) for length in case.lengths]
    owned = [min(count, 1) if case.shared else count for count in counts]
    pool = np.full((sum(owned) + 1, LAYERS, 2, case.heads, case.page, case.dim), np.nan, case.dtype)
    order = rng.permutation(pool.shape[0]).tolist()
    keys, values, used = [], [], []
    for length, count, pages in zip(case.lengths, counts, owned, strict=True):
        own = [order.pop() for _ in range(pages)] * (count if case.shared else 1)
        used += own
        # All of a sequence's tokens are random values of their own, or those of its one page over and over.
        own_tokens = min(length, case.page) if case.shared else length
        k, v = (rng.standard_normal((2, own_tokens, case.heads, case.dim)) * case.amplitude).astype(case.dtype)
        for token in range(own_tokens):
            page, offset = divmod(token, case.page)
            pool[own[page], LAYER, :, :, offset] = k[token], v[token]
        positions = np.arange(length) % case.page if case.shared else np.arange(length)
        keys.append(k[positions])
        values.append(v[positions])
    q = (rng.standard_normal((sum(case.counts), case.heads * case.group, case.dim)) * case.amplitude).astype(case.dtype)
    pages_array = engine.array(pool)
    base, size = _arrays.view("pages", pages_array).ptr, pool[0].nbytes
    pointers = np.array([UNMAPPED, *(base + page * size for page in used), UNMAPPED], np.int64)
    indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32) + 1
    last = [
        length - (count - 1) * case.page if count else 0 for length, count in zip(case.lengths, counts, strict=True)
    ]
    tables = engine.array(pointers), engine.array(indptr.astype(np.int32)), engine.array(np.array(last, np.int32))
    starts = np.concatenate([[0], np.cumsum(case.counts)]).astype(np.int32)
    return Data(case, keys, values, q, pages_array, engine.array(q), engine.array(starts), tables)


def call(data: Data, **more: Any) -> Any:
    case = data.case
    sizes = LAYERS, LAYER, case.heads, case.page
    options = {**case.options, **more}
    if case.queries is None:
        return cupy_lora.batch_decode(data.q_array, *data.tables, *sizes, **options)
    return cupy_lora.batch_prefill(data.q_array, data.indptr, *data.tables, *sizes, **options)


def turned(x: np.ndarray, positions: np.ndarray, case: Case) -> np.ndarray:
    """Rows (n, dim) with their pairs as complex numbers turned by position times frequency."""
    half = case.dim // 2
    frequencies = np.array([case.theta ** (-2 * d / case.dim) for d in range(half)]) / case.rope_scale
    pairs = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * np.outer(positions, frequencies))
    return np.concatenate([pairs.real, pairs.imag], axis=1)


@dataclass
class Exact:
    """float64 results, and how far a kernel may be from them."""

    out: np.ndarray
    lse: np.ndarray
    allowed: np.ndarray
    allowed_lse: np.ndarray


def exact(data: Data) -> Exact:
    """Row by row, head by head.

    Allowed are: one rounding of each weight to the dtype before its product with the value, and of the output;
    errors of float32 in a score (of the sum over dim, of the exponent) and, with RoPE, of rounding rotated queries
    and keys (independent of each other: six standard deviations), each of which changes a weight in proportion.
    The logarithm's error is that of a score, that of the sum of the weights (2**-22 of each by ex2.approx, 2**-24 by
    its argument, 2**-23 by a compensated sum of any length: together less than the 2**-20 of a score) and the
    rounding of the result and of the two terms that it is the sum of, each of about its own size: 2**-22 of it.
    """
    case, unit = data.case, tolerance.unit(data.case.dtype)
    scale = 1 / math.sqrt(case.dim) if case.sm_scale is None else case.sm_scale
    out, mag, slack = (np.zeros(data.q.shape) for _ in range(3))
    lse, lse_slack = np.full(data.q.shape[:2], -np.inf), np.zeros(data.q.shape[:2])
    row = 0
    for sequence, count in enumerate(case.counts):
        length = case.lengths[sequence]
        earliest = 0 if case.window is None else max(length - count - case.window, 0)  # no row sees what is before it
        positions = np.arange(earliest, length)
        for head in range(case.heads * case.group):
            k = data.keys[sequence][earliest:, head // case.group].astype(np.float64)
            v = data.values[sequence][earliest:, head // case.group].astype(np.float64)
            q = data.q[row : row + count, head].astype(np.float64)
            if case.rope:
                k, q = turned(k, positions, case), turned(q, length - count + np.arange(count), case)
            for i in range(count):
                at = length - count + i
                seen = np.full(positions.shape, at >= 0)
                if case.causal:
                    seen &= positions <= at
                if case.window is not None:
                    seen &= positions > at - case.window
                if not seen.any():
                    continue
                products = q[i] * k[seen]
                scores = products.sum(axis=1) * scale
                error = 2 * math.sqrt(case.dim) * 2.0**-24 * np.abs(products).sum(axis=1).max() * scale
                if case.rope:
                    error += 6 * unit * np.sqrt((products**2).sum(axis=1).max()) * scale
                if case.soft_cap is not None:
                    error += case.soft_cap * 2.0**-21
                    scores = case.soft_cap * np.tanh(scores / case.soft_cap)
                error += 2.0**-20 + np.abs(scores).max() * 2.0**-22
                total = np.log(np.exp(scores - scores.max()).sum()) + scores.max()
                weights = np.exp(scores - total)
                out[row + i, head] = weights @ v[seen]
                mag[row + i, head] = weights @ np.abs(v[seen])
                # Weights below the smallest normal float16 are rounded to multiples of 2**-24.
                tiny = 2.0**-25 * np.abs(v[seen]).sum(axis=0) * np.exp(scores.max() - total) if case.dtype == F16 else 0
                slack[row + i, head] = error * (mag[row + i, head] + np.abs(out[row + i, head])) + tiny
                lse[row + i, head] = total
                lse_slack[row + i, head] = error + 2.0**-22 * abs(total)
        row += count
    allowed = tolerance.bound(case.dtype, out, mag, max(case.lengths, default=1)) + unit * mag + slack
    return Exact(out, lse, allowed, lse_slack)


def assert_right(got: np.ndarray, lse: np.ndarray, want: Exact) -> None:
    error = np.abs(got.astype(np.float64) - want.out)
    assert got.shape == want.out.shape
    bad = ~(error <= want.allowed)
    if bad.any():
        place = np.unravel_index(np.argmax(np.where(np.isnan(error), np.inf, error) / want.allowed), error.shape)
        raise AssertionError(
            f"{int(bad.sum())} of {bad.size} elements are off; the worst at {[int(p) for p in place]}: got "
            f"{float(got[place])}, exact {want.out[place]}, error {error[place]:.3g}, allowed {want.allowed[place]:.3g}"
        )
    assert lse.dtype == np.float32
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(want.lse))
    there = np.isfinite(want.lse)
    off = np.abs(lse.astype(np.float64)[there] - want.lse[there])
    assert (off <= want.allowed_lse[there]).all(), f"lse is off by up to {off.max():.3g}"


def check(engine: Engine, case: Case, seed: int = 0) -> None:
    data = build(engine, case, seed)
    out, lse = call(data, return_lse=True)
    assert_right(engine.numpy(out), engine.numpy(lse), exact(data))


def workspace(engine: Engine, chunks: int, case: Case) -> Any:
    """One that holds this many chunks of partial results."""
    heads = case.heads * case.group
    return engine.array(np.zeros(4 * _attention_plan.COUNTERS + chunks * heads * (case.dim + 4) * 4, np.uint8))
