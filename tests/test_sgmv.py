"""sgmv_shrink, sgmv_expand, sgmv_expand_slice on every engine."""

from __future__ import annotations

import cases
import engines
import numpy as np
import pytest
import tolerance
from hypothesis import given, settings
from hypothesis import strategies as st

from cupy_lora import reference, sgmv_expand, sgmv_expand_slice, sgmv_shrink

CASES = cases.STACKED + cases.STACKED_LARGE


def shrink(engine: engines.Engine, case: cases.Stacked, hint: int, scaling: float = -1.5) -> None:
    rng = case.rng
    x = cases.normal(rng, (case.tokens, case.wide), case.dtype)
    a = case.weights(rng, case.rank, case.wide)
    indices = cases.index_pattern(case.pattern, case.tokens, case.adapters, rng)
    parts = cases.segments(indices, case.index if case.pattern != "out_of_range" else "int64")
    poison = np.full((case.tokens, case.rank), np.nan, cases.DTYPES[case.other])
    inputs = engines.frame(engine, x, *case.pad)
    output = engines.frame(engine, poison, *case.pad)
    on_engine = [engine.array(part) for part in parts]
    got = sgmv_shrink(inputs.view, engine.array(a), output.view, *on_engine, len(parts[2]), hint, scaling)
    assert got is output.view
    y = output.check(engine)
    cases.assert_shrunk(
        case,
        y,
        indices,
        lambda sign, out: reference.sgmv_shrink(sign(x), sign(a), out, *parts, len(parts[2]), hint, scaling),
    )


def expand(engine: engines.Engine, case: cases.Stacked, hint: int, add_inputs: bool, sliced: bool) -> None:
    rng = case.rng
    v = cases.normal(rng, (case.tokens, case.rank), case.other)
    b = case.weights(rng, case.wide, case.rank)
    indices = cases.index_pattern(case.pattern, case.tokens, case.adapters, rng)
    parts = cases.segments(indices, case.index if case.pattern != "out_of_range" else "int64")
    left, right = (5, 2) if sliced else (0, 0)
    before = cases.normal(rng, (case.tokens, left + case.wide + right), case.dtype)
    bare = ~cases.valid(indices, case.adapters)
    if not add_inputs:
        before[~bare, left : left + case.wide] = np.nan
    output = engines.frame(engine, before, *case.pad)
    args = (engine.array(v), engine.array(b), output.view, *map(engine.array, parts), len(parts[2]), hint)
    if sliced:
        got = sgmv_expand_slice(*args, left, case.wide, add_inputs)
    else:
        got = sgmv_expand(*args, add_inputs)
    assert got is output.view
    y = output.check(engine)
    cases.assert_expanded(
        case,
        y,
        before,
        indices,
        left,
        lambda sign, out: reference.sgmv_expand(sign(v), sign(b), out, *parts, len(parts[2]), hint, add_inputs),
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_shrink(engine: engines.Engine, case: cases.Stacked) -> None:
    engines.skip_large(engine, case.small)
    shrink(engine, case, case.tokens)


@pytest.mark.parametrize("add_inputs", [True, False], ids=["add", "overwrite"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_expand(engine: engines.Engine, case: cases.Stacked, add_inputs: bool) -> None:
    engines.skip_large(engine, case.small)
    expand(engine, case, case.tokens, add_inputs, sliced=False)


@pytest.mark.parametrize("add_inputs", [True, False], ids=["add", "overwrite"])
@pytest.mark.parametrize("case", CASES[:8], ids=lambda case: case.id)
def test_expand_slice(engine: engines.Engine, case: cases.Stacked, add_inputs: bool) -> None:
    expand(engine, case, case.tokens, add_inputs, sliced=True)


@pytest.mark.parametrize("hint", [0, 1, 7, 10_000])
def test_max_seq_length_is_a_hint(engine: engines.Engine, hint: int) -> None:
    case = cases.Stacked(37, 128, 32, pattern="runs")
    shrink(engine, case, hint)
    expand(engine, case, hint, add_inputs=True, sliced=False)


def test_rows_of_no_segment_are_left_alone(engine: engines.Engine) -> None:
    rng = np.random.default_rng(4)
    x, a = cases.normal(rng, (9, 64), "bfloat16"), cases.normal(rng, (2, 16, 64), "bfloat16")
    starts, lengths, slots = np.array([6, 1, 4]), np.array([2, 2, 0]), np.array([1, 0, 1])
    before = np.full((9, 16), np.nan, np.float32)
    y = engine.array(before)
    sgmv_shrink(
        engine.array(x), engine.array(a), y, engine.array(starts), engine.array(lengths), engine.array(slots), 3, 2, 1.0
    )
    result = engine.numpy(y)
    tolerance.assert_same_bits(result[[0, 3, 4, 5, 8]], before[[0, 3, 4, 5, 8]])
    exact = x[[1, 2]].astype(np.float64) @ a[0].astype(np.float64).T
    magnitude = np.abs(x[[1, 2]]).astype(np.float64) @ np.abs(a[0]).astype(np.float64).T
    tolerance.assert_close(result[[1, 2]], exact, magnitude, 64)
    assert np.isfinite(result[[6, 7]]).all()


@given(data=st.data())
def test_fuzz(data: st.DataObject) -> None:
    case = cases.draw_stacked(data)
    with engines.running("numpy") as engine:
        shrink(engine, case, data.draw(st.integers(0, 80)))
        expand(engine, case, data.draw(st.integers(0, 80)), data.draw(st.booleans()), data.draw(st.booleans()))


@pytest.mark.gpu
@settings(max_examples=40)
@given(data=st.data())
def test_fuzz_on_the_gpu(data: st.DataObject) -> None:
    case = cases.draw_stacked(data)
    with engines.running("gpu") as engine:
        shrink(engine, case, data.draw(st.integers(0, 80)))
        expand(engine, case, data.draw(st.integers(0, 80)), data.draw(st.booleans()), data.draw(st.booleans()))


@pytest.mark.gpu
def test_segments_beyond_the_rows_are_skipped_on_the_device(gpu: engines.Engine) -> None:
    """Values on a device are not checked by the host: the kernel must not leave the rows."""
    rng = np.random.default_rng(5)
    x, a = cases.normal(rng, (8, 64), "float16"), cases.normal(rng, (1, 16, 64), "float16")
    starts = np.array([6, -2, 100, 2**31 - 2, 0])
    lengths = np.array([50, 2, 3, 2**31 - 1, -5])
    output = engines.frame(gpu, np.full((8, 16), np.nan, np.float32), 16, 16)
    args = [gpu.array(part) for part in (starts, lengths, np.zeros(5, np.int64))]
    sgmv_shrink(gpu.array(x), gpu.array(a), output.view, *args, 5, 50, 1.0)
    y = output.check(gpu)
    assert np.isnan(y[:6]).all()
    exact = x[6:].astype(np.float64) @ a[0].astype(np.float64).T
    tolerance.assert_close(y[6:], exact, np.abs(x[6:]).astype(np.float64) @ np.abs(a[0]).astype(np.float64).T, 64)


def test_documented_call(engine: engines.Engine) -> None:
    """The calls as LoRAX users write them, with every argument by keyword."""
    rng = np.random.default_rng(2)
    x = cases.normal(rng, (6, 64), "float16")
    a, b = cases.normal(rng, (2, 1, 8, 64), "float16"), cases.normal(rng, (2, 1, 48, 8), "float16")
    segments = {
        "b_seq_start_loc": engine.array(np.array([0, 4])),
        "seq_len_tensor": engine.array(np.array([4, 2])),
        "lora_indices_tensor": engine.array(np.array([1, 0])),
        "batches": 2,
        "max_seq_length": 4,
    }
    buffer = engine.array(np.zeros((6, 8), np.float32))
    y = engine.array(np.full((6, 48), np.nan, np.float16))
    wide = engine.array(np.zeros((6, 100), np.float16))
    sgmv_shrink(inputs=engine.array(x), lora_a_weights=engine.array(a), output_tensor=buffer, **segments, scaling=0.5)
    sgmv_expand(inputs=buffer, lora_b_weights=engine.array(b), output_tensor=y, **segments, add_inputs=False)
    sgmv_expand_slice(
        inputs=buffer,
        lora_b_weights=engine.array(b),
        output_tensor=wide,
        **segments,
        slice_offset=50,
        slice_size=48,
        add_inputs=True,
    )
    result = engine.numpy(y)
    for rows, slot in ((slice(0, 4), 1), (slice(4, 6), 0)):
        v = 0.5 * x[rows].astype(np.float64) @ a[slot, 0].astype(np.float64).T
        magnitude = 0.5 * np.abs(x[rows]).astype(np.float64) @ np.abs(a[slot, 0]).astype(np.float64).T
        exact, size = v @ b[slot, 0].astype(np.float64).T, magnitude @ np.abs(b[slot, 0]).astype(np.float64).T
        tolerance.assert_close(result[rows], exact, size, 64 + 8)
    tolerance.assert_same_bits(engine.numpy(wide)[:, 50:98], result)
    assert not engine.numpy(wide)[:, :50].any()
    assert not engine.numpy(wide)[:, 98:].any()
