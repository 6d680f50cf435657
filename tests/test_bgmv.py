"""bgmv_shrink, bgmv_expand, bgmv_expand_slice on every engine."""

from __future__ import annotations

import cases
import engines
import numpy as np
import pytest
import tolerance
from hypothesis import given, settings
from hypothesis import strategies as st

from cupy_lora import bgmv_expand, bgmv_expand_slice, bgmv_shrink, reference

CASES = cases.STACKED + cases.STACKED_LARGE


def shrink(engine: engines.Engine, case: cases.Stacked, scaling: float = 0.75) -> None:
    rng = case.rng
    x = cases.normal(rng, (case.tokens, case.wide), case.dtype)
    a = case.weights(rng, case.rank, case.wide)
    indices = cases.index_pattern(case.pattern, case.tokens, case.adapters, rng).astype(case.index)
    poison = np.full((case.tokens, case.rank), np.nan, cases.DTYPES[case.other])
    inputs = engines.frame(engine, x, *case.pad)
    output = engines.frame(engine, poison, *case.pad)
    assert bgmv_shrink(inputs.view, engine.array(a), output.view, engine.array(indices), scaling) is output.view
    y = output.check(engine)
    inputs.check(engine, "inputs")
    cases.assert_shrunk(
        case, y, indices, lambda sign, out: reference.bgmv_shrink(sign(x), sign(a), out, indices, scaling)
    )


def expand(engine: engines.Engine, case: cases.Stacked, add_inputs: bool, sliced: bool) -> None:
    rng = case.rng
    v = cases.normal(rng, (case.tokens, case.rank), case.other)
    b = case.weights(rng, case.wide, case.rank)
    indices = cases.index_pattern(case.pattern, case.tokens, case.adapters, rng).astype(case.index)
    left, right = (8, 16) if sliced else (0, 0)
    out = case.dtype if case.other == "float32" else "float32"
    before = cases.normal(rng, (case.tokens, left + case.wide + right), out)
    bare = ~cases.valid(indices, case.adapters)
    if not add_inputs:
        before[~bare, left : left + case.wide] = np.nan
    output = engines.frame(engine, before, *case.pad)
    inputs = engines.frame(engine, v, *case.pad)
    args = (inputs.view, engine.array(b), output.view, engine.array(indices))
    if sliced:
        got = bgmv_expand_slice(*args, left, case.wide, add_inputs)
    else:
        got = bgmv_expand(*args, add_inputs)
    assert got is output.view
    y = output.check(engine)
    cases.assert_expanded(
        case,
        y,
        before,
        indices,
        left,
        lambda sign, out: reference.bgmv_expand(sign(v), sign(b), out, indices, add_inputs),
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_shrink(engine: engines.Engine, case: cases.Stacked) -> None:
    engines.skip_large(engine, case.small)
    shrink(engine, case)


@pytest.mark.parametrize("add_inputs", [True, False], ids=["add", "overwrite"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_expand(engine: engines.Engine, case: cases.Stacked, add_inputs: bool) -> None:
    engines.skip_large(engine, case.small)
    expand(engine, case, add_inputs, sliced=False)


@pytest.mark.parametrize("add_inputs", [True, False], ids=["add", "overwrite"])
@pytest.mark.parametrize("case", CASES[:10], ids=lambda case: case.id)
def test_expand_slice(engine: engines.Engine, case: cases.Stacked, add_inputs: bool) -> None:
    expand(engine, case, add_inputs, sliced=True)


@given(data=st.data())
def test_fuzz(data: st.DataObject) -> None:
    case = cases.draw_stacked(data)
    with engines.running("numpy") as engine:
        shrink(engine, case)
        expand(engine, case, data.draw(st.booleans()), data.draw(st.booleans()))


@pytest.mark.gpu
@settings(max_examples=40)
@given(data=st.data())
def test_fuzz_on_the_gpu(data: st.DataObject) -> None:
    case = cases.draw_stacked(data)
    with engines.running("gpu") as engine:
        shrink(engine, case)
        expand(engine, case, data.draw(st.booleans()), data.draw(st.booleans()))


def test_documented_call(engine: engines.Engine) -> None:
    """The call as LoRAX users write it, with every argument by keyword."""
    rng = np.random.default_rng(1)
    x = cases.normal(rng, (4, 64), "float16")
    a, b = cases.normal(rng, (2, 1, 8, 64), "float16"), cases.normal(rng, (2, 1, 48, 8), "float16")
    slots = engine.array(np.array([1, -1, 0, 1]))
    buffer = engine.array(np.zeros((4, 8), np.float32))
    y = engine.array(np.zeros((4, 96), np.float16))
    bgmv_shrink(
        inputs=engine.array(x),
        lora_a_weights=engine.array(a),
        output_tensor=buffer,
        lora_indices_tensor=slots,
        scaling=0.5,
        override_config=None,
    )
    bgmv_expand_slice(
        inputs=buffer,
        lora_b_weights=engine.array(b),
        output_tensor=y,
        lora_indices_tensor=slots,
        slice_offset=48,
        slice_size=48,
        add_inputs=True,
        override_config=None,
    )
    result = engine.numpy(y).astype(np.float64)
    assert not result[:, :48].any()
    assert not result[1].any()
    for row, slot in ((0, 1), (2, 0), (3, 1)):
        v = 0.5 * x[row].astype(np.float64) @ a[slot, 0].astype(np.float64).T
        exact = v @ b[slot, 0].astype(np.float64).T
        magnitude = np.abs(0.5 * x[row]).astype(np.float64) @ np.abs(a[slot, 0]).astype(np.float64).T
        magnitude = magnitude @ np.abs(b[slot, 0]).astype(np.float64).T
        tolerance.assert_close(engine.numpy(y)[row, 48:], exact, magnitude, 64 + 8)


def test_a_row_alone_gives_the_bits_of_the_row_in_its_batch(kernels: engines.Engine) -> None:
    case = cases.Stacked(9, 256, 16, pattern="random", other="bfloat16")
    rng = case.rng
    x = cases.normal(rng, (9, 256), "bfloat16")
    a = case.weights(rng, 16, 256)
    indices = np.array([0, 1, 2, 2, -1, 1, 0, 0, 2])
    whole = kernels.array(np.full((9, 16), np.nan, np.float32))
    bgmv_shrink(kernels.array(x), kernels.array(a), whole, kernels.array(indices))
    for row in (0, 3, 8):
        one = kernels.array(np.full((1, 16), np.nan, np.float32))
        index = kernels.array(indices[row : row + 1])
        bgmv_shrink(kernels.array(x[row : row + 1]), kernels.array(a), one, index)
        tolerance.assert_same_bits(kernels.numpy(one)[0], kernels.numpy(whole)[row])
