"""The NumPy reference against loops over single numbers in float64, written independently of it."""

from __future__ import annotations

import cases
import numpy as np
import pytest
import tolerance
from hypothesis import given
from hypothesis import strategies as st

from cupy_lora import reference


def dot_rows(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """x @ w.T by three loops."""
    out = np.zeros((len(x), len(w)))
    for i, row in enumerate(x.astype(np.float64)):
        for j, column in enumerate(w.astype(np.float64)):
            total = 0.0
            for k in range(len(row)):
                total += row[k] * column[k]
            out[i, j] = total
    return out


def check(actual: np.ndarray, exact: np.ndarray) -> None:
    """Rounded once: the nearest number of the dtype, but for the last bits of the float64 sums."""
    error = np.abs(actual.astype(np.float64) - exact)
    # 2^-10: bfloat16 is rounded by way of float32, so a tie may go either way. 2^-25: float16 subnormals.
    least = 2.0**-25 if actual.dtype == np.float16 else 0.0
    assert np.all(
        error <= tolerance.unit(actual.dtype) * np.abs(exact) * (1 + 2**-10) + 1e-12 * (1 + np.abs(exact)) + least
    )


def one_row_weights(w: np.ndarray, slot: int) -> np.ndarray:
    return w[slot].reshape(w.shape[-2:])


SMALL = [
    cases.Stacked(7, 33, 5, pattern=pattern, dtype=dtype, other=other, layers=layers)
    for pattern in cases.PATTERNS
    for dtype, other, layers in (
        ("float16", "float16", False),
        ("bfloat16", "bfloat16", True),
        ("bfloat16", "float32", False),
    )
]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)
def test_bgmv_shrink(case: cases.Stacked) -> None:
    rng = case.rng
    x = cases.normal(rng, (case.tokens, case.wide), case.dtype)
    a = case.weights(rng, case.rank, case.wide)
    indices = cases.index_pattern(case.pattern, case.tokens, case.adapters, rng)
    y = np.full((case.tokens, case.rank), np.nan, cases.DTYPES[case.other])
    assert reference.bgmv_shrink(x, a, y, indices, 0.75) is y
    for t, slot in enumerate(indices):
        if 0 <= slot < case.adapters:
            check(y[t : t + 1], 0.75 * dot_rows(x[t : t + 1], one_row_weights(a, slot)))
        else:
            assert not y[t].any()


@pytest.mark.parametrize("add_inputs", [True, False])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)
def test_bgmv_expand(case: cases.Stacked, add_inputs: bool) -> None:
    rng = case.rng
    x = cases.normal(rng, (case.tokens, case.rank), case.other)
    b = case.weights(rng, case.wide, case.rank)
    indices = cases.index_pattern(case.pattern, case.tokens, case.adapters, rng)
    before = cases.normal(rng, (case.tokens, case.wide + 4), case.other)
    y = before.copy()
    reference.bgmv_expand_slice(x, b, y, indices, 3, case.wide, add_inputs)
    whole = before[:, 3:-1].copy()
    reference.bgmv_expand(x, b, whole, indices, add_inputs)
    tolerance.assert_same_bits(y[:, 3:-1], whole)
    tolerance.assert_same_bits(y[:, :3], before[:, :3])
    tolerance.assert_same_bits(y[:, -1:], before[:, -1:])
    for t, slot in enumerate(indices):
        if 0 <= slot < case.adapters:
            exact = dot_rows(x[t : t + 1], one_row_weights(b, slot))
            check(whole[t : t + 1], exact + (before[t : t + 1, 3:-1].astype(np.float64) if add_inputs else 0))
        else:
            tolerance.assert_same_bits(whole[t], before[t, 3:-1])


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)
def test_sgmv(case: cases.Stacked) -> None:
    """A segment is its rows, each with the segment's slot."""
    rng = case.rng
    indices = cases.index_pattern(case.pattern, case.tokens, case.adapters, rng)
    starts, lengths, slots = cases.segments(indices)
    x = cases.normal(rng, (case.tokens, case.wide), case.dtype)
    a = case.weights(rng, case.rank, case.wide)
    by_row = np.full((case.tokens, case.rank), np.nan, cases.DTYPES[case.other])
    by_segment = by_row.copy()
    reference.bgmv_shrink(x, a, by_row, indices, 2.0)
    reference.sgmv_shrink(x, a, by_segment, starts, lengths, slots, len(slots), 1, 2.0)
    tolerance.assert_same_bits(by_segment, by_row)

    v = cases.normal(rng, (case.tokens, case.rank), case.other)
    b = case.weights(rng, case.wide, case.rank)
    before = cases.normal(rng, (case.tokens, case.wide + 2), case.other)
    for add_inputs in (True, False):
        by_row, by_segment = before.copy(), before.copy()
        reference.bgmv_expand_slice(v, b, by_row, indices, 1, case.wide, add_inputs)
        reference.sgmv_expand_slice(v, b, by_segment, starts, lengths, slots, len(slots), 1, 1, case.wide, add_inputs)
        tolerance.assert_same_bits(by_segment, by_row)
        narrow = np.ascontiguousarray(before[:, 1:-1])
        reference.sgmv_expand(v, b, narrow, starts, lengths, slots, len(slots), 1, add_inputs)
        tolerance.assert_same_bits(narrow, by_row[:, 1:-1])


def test_sgmv_leaves_rows_of_no_segment_alone() -> None:
    x = np.ones((6, 4), np.float16)
    a = np.ones((1, 2, 4), np.float16)
    y = np.full((6, 2), np.nan, np.float16)
    reference.sgmv_shrink(x, a, y, np.array([1, 4]), np.array([2, 1]), np.array([0, -1]), 2, 2, 1.0)
    assert np.isnan(y[[0, 3, 5]]).all()
    assert (y[[1, 2]] == 4).all()
    assert (y[4] == 0).all()


SMALL_ADD = [case for case in cases.ADD_LORA if case.in_features * case.tokens * max(1, len(case.ranks)) < 30_000]


@pytest.mark.parametrize("case", SMALL_ADD, ids=lambda case: case.id)
def test_add_lora(case: cases.Case) -> None:
    data = cases.build(case)
    weights, batch = cases.load(data, "cpu")
    y = data.y.copy()
    assert reference.add_lora(y, data.x, weights, batch, scale=case.scale) is y
    exact = data.y.astype(np.float64)
    for t, slot in enumerate(data.indices):
        start = 0
        for part, width in enumerate(case.outs):
            if 0 <= slot < len(case.ranks) and data.a[slot][part] is not None:
                v = dot_rows(data.x[t : t + 1], data.a[slot][part])
                factor = float(np.float32(case.scale) * np.float32(data.scales[slot]))  # scales multiply in float32
                exact[t, start : start + width] += (dot_rows(v, data.b[slot][part]) * factor)[0]
            start += width
    check(y, exact)
    bare = ~cases.valid(data.indices, len(case.ranks))
    tolerance.assert_same_bits(y[bare], data.y[bare])


@given(data=st.data())
def test_add_lora_fuzz(data: st.DataObject) -> None:
    slots = data.draw(st.integers(1, 4))
    outs = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    rank = st.integers(0, 12)
    case = cases.Case(
        tokens=data.draw(st.integers(0, 8)),
        in_features=data.draw(st.integers(1, 20)),
        outs=outs,
        ranks=tuple(tuple(data.draw(rank) for _ in outs) for _ in range(slots)),
        pattern=data.draw(st.sampled_from(cases.PATTERNS)),
        dtype=data.draw(st.sampled_from(("float16", "bfloat16"))),
        scale=data.draw(st.sampled_from((1.0, -0.5, 3.0))),
    )
    case = cases.replace(case, out=data.draw(st.sampled_from((case.dtype, "float32"))))
    test_add_lora(case)


def test_magnitude_bounds_the_result() -> None:
    """The tolerance of every op's tests rests on this: the terms' absolute values add up to at least the result."""
    data = cases.build(cases.ADD_LORA[12])
    exact, magnitude = cases.exact_add(data)
    assert (np.abs(exact) <= magnitude * (1 + 1e-12)).all()
    assert (np.abs(exact - data.y.astype(np.float64)) > 0).any()
