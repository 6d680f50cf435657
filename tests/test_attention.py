"""batch_decode and batch_prefill: against float64 loops of their own, on every engine; bits, splits, arrays."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import tolerance
from attention_cases import (
    BF16,
    F16,
    Case,
    assert_right,
    build,
    call,
    check,
    exact,
    workspace,
)
from engines import Engine, Numpy
from hypothesis import given, settings
from hypothesis import strategies as st

import cupy_lora
from cupy_lora import _arrays, _attention_plan, _jit, _plans, attention

SHAPES = [  # heads, group, head_dim, page
    (2, 4, 128, 16),
    (1, 1, 64, 1),
    (2, 2, 64, 7),
    (1, 3, 96, 16),
    (1, 5, 128, 5),
    (1, 6, 64, 32),
    (2, 7, 128, 16),
    (1, 8, 128, 64),
    (1, 16, 64, 16),
    (1, 20, 64, 16),
    (1, 4, 256, 16),
    (1, 16, 256, 8),
    (3, 1, 32, 4),
    (1, 2, 80, 3),
    (1, 2, 144, 4),
]


@pytest.mark.parametrize("rope", [None, "llama"])
@pytest.mark.parametrize(("heads", "group", "dim", "page"), SHAPES)
def test_decode(engine: Engine, heads: int, group: int, dim: int, page: int, rope: str | None):
    lengths = (1, 0, page, page + 1, 70, 3 * page, 33)
    dtype = F16 if (heads + group + dim) % 2 else BF16
    check(engine, Case(lengths, None, heads, group, dim, page, dtype, rope))


@pytest.mark.parametrize("rope", [None, "llama"])
@pytest.mark.parametrize(("heads", "group", "dim", "page"), SHAPES)
def test_prefill(engine: Engine, heads: int, group: int, dim: int, page: int, rope: str | None):
    """Whole prompts, chunks after what is there, one token, none at all."""
    lengths, queries = (1, 40, 0, page + 1, 75, 33), (1, 40, 0, 1, 9, 0)
    dtype = BF16 if (heads + group + dim) % 2 else F16
    check(engine, Case(lengths, queries, heads, group, dim, page, dtype, rope))


def test_prefill_over_several_tiles(engine: Engine):
    """More rows than a block has, more keys than a tile, warps whose rows are past the last."""
    check(engine, Case((150, 70), (101, 70), 1, 4, 64, 16))
    check(engine, Case((300,), (37,), 1, 4, 128, 16, rope="llama"))
    check(engine, Case((150,), (101,), 1, 4, 128, 16, rope="llama", window=60, soft_cap=5.0))


OPTIONS = [
    {"window": 1},
    {"window": 50},
    {"window": 1000},
    {"soft_cap": 3.0, "amplitude": 2.0},
    {"soft_cap": 30.0, "window": 33, "rope": "llama"},
    {"sm_scale": 0.7},
    {"rope": "llama", "theta": 5e5, "rope_scale": 4.0},
    {"amplitude": 4.0},  # one weight nearly 1, the others far below
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("queries", [None, (60, 2, 90)], ids=["decode", "prefill"])
def test_options(engine: Engine, queries: tuple[int, ...] | None, options: dict[str, Any]):
    check(engine, Case((130, 65, 90), queries, 1, 4, 64, 16, **options))


@pytest.mark.parametrize("window", [None, 20])
def test_not_causal(engine: Engine, window: int | None):
    check(engine, Case((90, 64, 5), (40, 64, 5), 1, 2, 64, 16, causal=False, window=window, rope="llama"))


@pytest.mark.parametrize("causal", [True, False])
def test_queries_before_the_first_position_see_nothing(engine: Engine, causal: bool):
    check(engine, Case((5, 0), (9, 3), 1, 2, 64, 16, causal=causal, rope="llama"))


@pytest.mark.parametrize("queries", [None, (5,)], ids=["decode", "prefill"])
def test_positions_to_a_million_are_rotated_exactly(engine: Engine, queries: tuple[int, ...] | None):
    """A long sequence whose pages are one page; the window keeps it short."""
    check(engine, Case((1_000_000,), queries, 1, 2, 64, 500, rope="llama", window=150, shared=True))


@pytest.mark.parametrize("length", [256, 257, 600, 1300])
def test_decode_of_several_chunks(engine: Engine, length: int):
    check(engine, Case((3, length, 40), None, 1, 4, 64, 16))


def test_errors_do_not_add_up_along_a_sequence(engine: Engine):
    """Rescaling a row by almost 1 in each step would show in its lse."""
    check(engine, Case((20_011,), (3,), 1, 1, 64, 64, shared=True))


@pytest.mark.gpu
@pytest.mark.parametrize("rope", [None, "llama"])
@pytest.mark.parametrize("length", [100_003, 1_000_000])
def test_long_sequences(gpu: Engine, length: int, rope: str | None):
    check(gpu, Case((7, length, 900), None, 1, 4, 64, 64, rope=rope, shared=True))
    check(gpu, Case((length, 40), (3, 40), 1, 1, 64, 64, rope=rope, shared=True))


# ---- bits ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("group", [4, 16])
def test_a_split_changes_no_bit(kernels: Engine, group: int):
    """With room for no chunk, for some sequences' and for all."""
    case = Case((700, 20, 900, 300), None, 1, group, 64, 16)
    data = build(kernels, case)
    results, spaces = [], []
    for chunks in (0, 3, 7, 100):
        space = workspace(kernels, chunks, case)
        results.append([kernels.numpy(array) for array in call(data, return_lse=True, workspace=space)])
        spaces.append(kernels.numpy(space))
    for result, space in zip(results, spaces, strict=True):
        for one, other in zip(result, results[0], strict=True):
            tolerance.assert_same_bits(one, other)
        assert not space[: 4 * _attention_plan.COUNTERS].any(), "the counters are left at 0"
    assert_right(*results[0], exact(data))
    assert not spaces[0][4 * _attention_plan.COUNTERS :].any()
    assert spaces[3][4 * _attention_plan.COUNTERS :].any(), "expected a split"


@pytest.mark.parametrize("rope", [None, "llama"])
@pytest.mark.parametrize("queries", [None, (33, 1, 70)], ids=["decode", "prefill"])
def test_bits_do_not_depend_on_the_batch(kernels: Engine, queries: tuple[int, ...] | None, rope: str | None):
    case = Case((600, 5, 70), queries, 1, 4, 64, 16, rope=rope)
    data = build(kernels, case)
    whole, lse = (kernels.numpy(array) for array in call(data, return_lse=True))
    again = kernels.numpy(call(data))
    tolerance.assert_same_bits(again, whole)
    starts = np.concatenate([[0], np.cumsum(case.counts)])
    pointers, bounds, last = (kernels.numpy(table) for table in data.tables)
    for picked in ([0], [2, 0], [1], [2, 1, 0, 0, 2]):
        rows = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in picked])
        entries = np.concatenate([pointers[bounds[s] : bounds[s + 1]] for s in picked])
        sizes = np.cumsum([0, *(bounds[s + 1] - bounds[s] for s in picked)]).astype(np.int32)
        part = dataclasses.replace(
            data,
            q_array=kernels.array(data.q[rows]),
            indptr=kernels.array(np.cumsum([0, *(case.counts[s] for s in picked)]).astype(np.int32)),
            tables=tuple(kernels.array(table) for table in (entries, sizes, last[picked])),
        )
        got, logs = (kernels.numpy(array) for array in call(part, return_lse=True))
        tolerance.assert_same_bits(got, whole[rows], f"sequences {picked}")
        tolerance.assert_same_bits(logs, lse[rows], f"lse of sequences {picked}")


@pytest.mark.parametrize("rope", [None, "llama"])
@pytest.mark.parametrize(("group", "dim"), [(4, 64), (4, 128), (16, 128), (20, 64)])
def test_blocks_that_take_many_units(
    kernels: Engine, group: int, dim: int, rope: str | None, monkeypatch: pytest.MonkeyPatch
):
    """On one multiprocessor: sequences of one tile, of none and of several chunks behind each other in a block."""
    lengths = (1, 0, 70, 3, 300, 0, 0, 5, 64, 65, 700, 2, 9, 0)
    data = build(kernels, Case(lengths, None, 2, group, dim, 16, rope=rope))
    roomy = [kernels.numpy(array) for array in call(data, return_lse=True)]
    facts = _jit.device_facts

    def one(device: int) -> _jit.DeviceFacts:
        return dataclasses.replace(facts(device), sm_count=1)

    monkeypatch.setattr(_jit, "device_facts", one)
    monkeypatch.setattr(attention, "_plans", _plans.Plans())
    for chunks in (0, 4, 100):
        space = workspace(kernels, chunks, data.case)
        crowded = [kernels.numpy(array) for array in call(data, return_lse=True, workspace=space)]
        for array, expected in zip(crowded, roomy, strict=True):
            tolerance.assert_same_bits(array, expected)
    assert_right(*roomy, exact(data))


@pytest.mark.parametrize("queries", [None, (9, 20)], ids=["decode", "prefill"])
def test_a_kept_plan_takes_other_arrays_and_still_checks(engine: Engine, queries: tuple[int, ...] | None):
    """The second call of a shape skips the checks that its key covers, and none else."""
    first, second = (build(engine, Case((40, 20), queries, 1, 4, 64, 16), seed) for seed in (0, 1))
    for data in (first, second, first):
        out, lse = call(data, return_lse=True)
        assert_right(engine.numpy(out), engine.numpy(lse), exact(data))
    out = engine.array(np.zeros(first.q.shape, BF16))
    for data in (first, second):
        assert call(data, out=out) is out
        np.testing.assert_array_less(np.abs(engine.numpy(out).astype(np.float64) - exact(data).out), 0.1)
        with pytest.raises(ValueError, match="out: expected memory of its own"):
            call(data, out=data.q_array)
    with pytest.raises(ValueError, match="soft_cap: expected"):
        call(first, soft_cap=-1.0)


# ---- arrays -------------------------------------------------------------------------------------
@pytest.mark.parametrize("pad", [8, 1])
@pytest.mark.parametrize("queries", [None, (9, 20)], ids=["decode", "prefill"])
def test_rows_any_distance_apart(engine: Engine, queries: tuple[int, ...] | None, pad: int):
    """Queries that are columns of a wider array, out that is too: 16-byte aligned rows or not."""
    data = build(engine, Case((40, 20), queries, 1, 4, 64, 16, rope="llama"))
    tokens, heads, dim = data.q.shape
    wide = np.full((tokens + 1, pad + heads * dim + pad), np.nan, BF16)
    wide[:tokens, pad:-pad] = data.q.reshape(tokens, -1)
    inside = (slice(0, tokens), slice(pad, pad + heads * dim))
    q = engine.array(wide)
    data.q_array = q[inside].reshape(tokens, heads, dim) if engine.name == "gpu" else heads_of(q[inside], heads)
    target = engine.array(wide)
    out = heads_of(target[inside], heads)
    got, lse = call(data, out=out, return_lse=True)
    assert got is out
    written = engine.numpy(target)
    assert_right(written[inside].reshape(data.q.shape), engine.numpy(lse), exact(data))
    written[inside] = wide[inside]
    tolerance.assert_same_bits(written, wide, "around the output")


def heads_of(rows: Any, heads: int) -> Any:
    """(tokens, heads, dim) over rows of a wider array, without a copy."""
    xp = np if isinstance(rows, np.ndarray) else __import__("cupy")
    tokens, width = rows.shape
    strides = rows.strides[0], width // heads * rows.itemsize, rows.itemsize
    return xp.lib.stride_tricks.as_strided(rows, (tokens, heads, width // heads), strides)


def test_pages_may_be_shared(engine: Engine):
    """Two sequences with the same first page."""
    data = build(engine, Case((16 + 5, 30), None, 1, 4, 64, 16))
    pointers, bounds = (engine.numpy(table).copy() for table in data.tables[:2])
    pointers[bounds[1]] = pointers[bounds[0]]
    data.keys[1][:16], data.values[1][:16] = data.keys[0][:16], data.values[0][:16]
    data.tables = engine.array(pointers), data.tables[1], data.tables[2]
    out, lse = call(data, return_lse=True)
    assert_right(engine.numpy(out), engine.numpy(lse), exact(data))


def test_empty_batches(engine: Engine):
    nothing = [np.empty(0, np.int64), np.zeros(1, np.int32), np.empty(0, np.int32)]
    q = engine.array(np.empty((0, 4, 64), F16))
    tables = [engine.array(table) for table in nothing]
    out, lse = cupy_lora.batch_decode(q, *tables, 1, 0, 2, 16, return_lse=True)
    assert (out.shape, lse.shape) == ((0, 4, 64), (0, 4))
    out = cupy_lora.batch_prefill(q, engine.array(np.zeros(1, np.int32)), *tables, 1, 0, 2, 16)
    assert out.shape == (0, 4, 64)


@pytest.mark.parametrize("queries", [None, (2, 3)], ids=["decode", "prefill"])
def test_sequences_without_pages(engine: Engine, queries: tuple[int, ...] | None):
    check(engine, Case((0, 0), queries, 1, 4, 64, 16))


def test_a_page_larger_than_2_to_the_31_bytes(engine: Engine):
    """The last layer of a page of 2.2 GB, of which the system backs only what is touched (on the host)."""
    layers, heads, page, dim = 8300, 8, 64, 128
    shape = (1, layers, 2, heads, page, dim)
    if engine.name == "gpu":
        import cupy

        pool = cupy.empty(shape, BF16)
    else:
        pool = np.empty(shape, BF16)
    case = Case((3,), None, heads, 1, dim, page)
    data = build(engine, case)
    for side, rows in enumerate((data.keys[0], data.values[0])):
        pool[0, -1, side, :, :3] = engine.array(np.ascontiguousarray(rows.transpose(1, 0, 2)))
    base = _arrays.view("pool", pool).ptr
    tables = np.array([base], np.int64), np.array([0, 1], np.int32), np.array([3], np.int32)
    arrays = [engine.array(table) for table in tables]
    out, lse = cupy_lora.batch_decode(
        data.q_array, *arrays, layers, layers - 1, heads, page, rope=None, return_lse=True
    )
    assert_right(engine.numpy(out), engine.numpy(lse), exact(data))


# ---- any batch ----------------------------------------------------------------------------------
@st.composite
def any_case(draw: st.DrawFn, longest: int = 90) -> Case:
    lengths = draw(st.lists(st.integers(0, longest), min_size=1, max_size=5))
    queries = None if draw(st.booleans()) else tuple(draw(st.integers(0, min(length, 40))) for length in lengths)
    return Case(
        tuple(lengths),
        queries,
        draw(st.integers(1, 3)),
        draw(st.integers(1, 9)),
        16 * draw(st.sampled_from([1, 2, 4, 5, 8])),
        draw(st.integers(1, 20)),
        draw(st.sampled_from([BF16, F16])),
        draw(st.sampled_from([None, "llama"])),
        causal=queries is None or draw(st.booleans()),
        window=draw(st.sampled_from([None, None, 1, 17])),
        soft_cap=draw(st.sampled_from([None, None, 5.0])),
    )


@given(case=any_case(), seed=st.integers(0, 99))
@settings(max_examples=40)
def test_any_batch(case: Case, seed: int):
    check(Numpy(), case, seed)


@pytest.mark.gpu
@given(case=any_case(longest=700), seed=st.integers(0, 99))
@settings(max_examples=40)
def test_any_batch_on_the_gpu(case: Case, seed: int):
    from engines import Gpu

    check(Gpu(), case, seed)
