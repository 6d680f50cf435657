"""batch_decode and batch_prefill: against float64 loops of their own, on every engine; bits, splits, bad tables."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tolerance
from engines import Engine, Numpy
from hypothesis import given, settings
from hypothesis import strategies as st

import cupy_lora
from cupy_lora import _arrays, _attention_plan, _jit, _plans, attention

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
def workspace(engine: Engine, chunks: int, case: Case) -> Any:
    """One that holds this many chunks of partial results."""
    heads = case.heads * case.group
    return engine.array(np.zeros(4 * _attention_plan.COUNTERS + chunks * heads * (case.dim + 4) * 4, np.uint8))


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


# ---- on the GPU alone ---------------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.parametrize("queries", [None, (3, 1, 20)], ids=["decode", "prefill"])
def test_a_captured_call_follows_the_tables(gpu: Engine, queries: tuple[int, ...] | None):
    """Replays with other pages and lengths in the same arrays, on a stream that was first met under capture."""
    import cupy

    cases = [Case(lengths, queries, 2, 4, 128, 16) for lengths in ((900, 30, 600), (20, 700, 40), (400, 200, 20))]
    batches = [build(gpu, case, seed) for seed, case in enumerate(cases)]
    most = max(data.tables[0].size for data in batches)
    pointers = cupy.full(most, UNMAPPED, np.int64)
    held = dataclasses.replace(batches[0])
    held.tables = pointers, batches[0].tables[1].copy(), batches[0].tables[2].copy()
    held.q_array = batches[0].q_array.copy()
    out = cupy.zeros_like(held.q_array)
    call(batches[0])
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.get_current_stream().synchronize()
    with stream:
        stream.begin_capture()
        _, lse = call(held, out=out, return_lse=True)
        graph = stream.end_capture()
        for data in (*batches, batches[0]):
            held.tables[0][: data.tables[0].size] = data.tables[0]
            held.tables[1][:], held.tables[2][:] = data.tables[1], data.tables[2]
            held.q_array[:] = data.q_array
            graph.launch(stream)
            stream.synchronize()
            assert_right(out.get(), lse.get(), exact(data))


@pytest.mark.gpu
def test_torch_agrees(gpu: Engine):
    torch = pytest.importorskip("torch")
    case = Case((130, 77), (130, 77), 2, 4, 128, 16)
    data = build(gpu, case)
    q = torch.from_numpy(data.q.view(np.int16)).view(torch.bfloat16).cuda()
    tables = [torch.as_tensor(table, device="cuda") for table in (data.indptr, *data.tables)]
    out = cupy_lora.batch_prefill(q, *tables, LAYERS, LAYER, case.heads, case.page, out=torch.empty_like(q), rope=None)
    assert isinstance(out, torch.Tensor)
    start = 0
    for keys, values, count in zip(data.keys, data.values, case.counts, strict=True):
        k, v = (torch.from_numpy(x.astype(np.float32)).cuda().transpose(0, 1)[None] for x in (keys, values))
        rows = q[start : start + count].float().transpose(0, 1)[None]
        want = torch.nn.functional.scaled_dot_product_attention(rows, k, v, is_causal=True, enable_gqa=True)
        torch.testing.assert_close(out[start : start + count].float(), want[0].transpose(0, 1), atol=0.02, rtol=0.02)
        start += count


@pytest.mark.gpu
@pytest.mark.parametrize("rope", [None, "llama"])
@pytest.mark.parametrize("queries", [None, (130, 20)], ids=["decode", "prefill"])
def test_flashinfer_agrees(gpu: Engine, queries: tuple[int, ...] | None, rope: str | None):
    """Its HND layout is one layer's slice of the pages."""
    torch = pytest.importorskip("torch")
    flashinfer = pytest.importorskip("flashinfer")
    case = Case((130, 600), queries, 2, 4, 128, 16, rope=rope)
    data = build(gpu, case)
    out, lse = call(data, return_lse=True)
    cache = torch.as_tensor(data.pages.view(np.int16), device="cuda").view(torch.bfloat16)[:, LAYER]
    base, size = data.pages.data.ptr, data.pages[0].nbytes
    order = torch.as_tensor((data.tables[0][1:-1] - base) // size, device="cuda").int()
    indptr, last = torch.as_tensor(data.tables[1] - 1, device="cuda"), torch.as_tensor(data.tables[2], device="cuda")
    q = torch.from_numpy(data.q.view(np.int16)).view(torch.bfloat16).cuda()
    space = torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")
    heads = (case.heads * case.group, case.heads, case.dim, case.page)
    more = {"pos_encoding_mode": "ROPE_LLAMA" if rope else "NONE", "q_data_type": torch.bfloat16}
    if queries is None:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(space, "HND")
        wrapper.plan(indptr, order, last, *heads, **more)
    else:
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(space, "HND", backend="fa2")
        starts = torch.as_tensor(data.indptr, device="cuda")
        wrapper.plan(starts, indptr, order, last, *heads, causal=True, **more)
    want, want_lse = wrapper.run(q, cache, return_lse=True)
    got = torch.as_tensor(out.view(np.int16), device="cuda").view(torch.bfloat16)
    torch.testing.assert_close(got.float(), want.float(), atol=0.03, rtol=0.03)
    got_lse = torch.as_tensor(lse, device="cuda")
    torch.testing.assert_close(got_lse, want_lse * math.log(2), atol=0.02, rtol=0.01)  # it takes logarithms to base 2


# ---- tables that are wrong ----------------------------------------------------------------------
BROKEN = {
    "pointer 0": (lambda t: t[0].__setitem__(2, 0), "kv_ptrs: expected an address that is not 0 .* at 2"),
    "pointer off by 8": (lambda t: t[0].__setitem__(2, t[0][2] + 8), "kv_ptrs: expected an address"),
    "offset 0": (lambda t: t[2].__setitem__(1, 0), "last_page_offset: expected 1 .. 16, got 0 for sequence 1"),
    "offset too large": (lambda t: t[2].__setitem__(1, 17), "last_page_offset: expected 1 .. 16, got 17"),
    "pages out of the table": (lambda t: t[1].__setitem__(-1, 99), "kv_indptr: expected ascending entries"),
    "pages negative": (lambda t: t[1].__setitem__(0, -1), "kv_indptr: expected ascending entries"),
    "pages descending": (lambda t: t[1].__setitem__(1, t[1][2] + 1), "kv_indptr: expected ascending entries"),
}


@pytest.mark.parametrize("fault", BROKEN)
@pytest.mark.parametrize("queries", [None, (2, 6, 3)], ids=["decode", "prefill"])
def test_wrong_tables_are_survived_and_named_under_debug(
    engine: Engine, queries: tuple[int, ...] | None, fault: str, monkeypatch: pytest.MonkeyPatch
):
    data = build(engine, Case((40, 20, 35), queries, 1, 2, 64, 16))
    tables = [engine.numpy(table).copy() for table in data.tables]
    tables[0][-1] = tables[0][-2]  # what a sequence may reach by a wrong table is memory that is there
    break_it, text = BROKEN[fault]
    break_it(tables)
    case = data.case
    lengths = []
    for i in range(3):
        first, end, last = int(tables[1][i]), int(tables[1][i + 1]), int(tables[2][i])
        fits = 0 <= first < end <= len(tables[0]) and 1 <= last <= case.page
        lengths.append((end - first - 1) * case.page + last if fits else 0)
    if "pointer" in fault:  # the second page of the first sequence counts as zeros
        data.keys[0][16:32], data.values[0][16:32] = 0, 0
    whole = [i for i in range(3) if lengths[i] in (0, case.lengths[i])]
    data.case = dataclasses.replace(case, lengths=tuple(lengths[i] if i in whole else 0 for i in range(3)))
    data.tables = tuple(engine.array(table) for table in tables)
    out, lse = call(data, return_lse=True)
    want, starts = exact(data), np.concatenate([[0], np.cumsum(case.counts)])
    rows = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in whole])
    picked = Exact(want.out[rows], want.lse[rows], want.allowed[rows], want.allowed_lse[rows])
    assert_right(engine.numpy(out)[rows], engine.numpy(lse)[rows], picked)
    monkeypatch.setenv("CUPY_LORA_DEBUG", "1")
    with pytest.raises(ValueError, match=text):
        call(data)


@pytest.mark.parametrize(
    "starts", [[0, 4, 2, 2], [3, 5, 7, 11], [0, 4, 8, 40], [-5, 4, 8, 11], [11, 8, 4, 0], [0, 0, 11, 11]]
)
def test_wrong_qo_indptr_never_leaves_the_queries(engine: Engine, starts: list[int], monkeypatch: pytest.MonkeyPatch):
    data = build(engine, Case((40, 9, 35), (2, 6, 3), 1, 2, 64, 16))
    data.indptr = engine.array(np.array(starts, np.int32))
    call(data, return_lse=True)  # the guard pages around the arrays of simt notice what leaves them
    monkeypatch.setenv("CUPY_LORA_DEBUG", "1")
    with pytest.raises(ValueError, match="qo_indptr: expected"):
        call(data)


def test_debug_accepts_what_is_right(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUPY_LORA_DEBUG", "1")
    check(engine, Case((40, 0, 35), None, 1, 2, 64, 16))
    check(engine, Case((40, 0, 35), (40, 0, 3), 1, 2, 64, 16))
    data = build(engine, Case((40,), None, 1, 2, 64, 16))
    dirty = engine.array(np.ones(1 << 17, np.uint8))
    with pytest.raises(ValueError, match="workspace: expected zeros in the first 65536 bytes"):
        call(data, workspace=dirty)


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


# ---- arguments ----------------------------------------------------------------------------------
def good() -> dict[str, Any]:
    return {
        "q": np.ones((2, 4, 64), BF16), "kv_ptrs": np.zeros(2, np.int64), "kv_indptr": np.array([0, 0, 0], np.int32),
        "last_page_offset": np.ones(2, np.int32), "num_layers": 2, "layer_idx": 1, "num_kv_heads": 2, "page_size": 4,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"q": np.ones((2, 4, 64), np.float32)}, TypeError, "q: expected dtype float16 or bfloat16, got float32"),
        ({"q": np.ones((2, 256), BF16)}, ValueError, r"q: expected shape \(tokens, num_heads, head_dim\)"),
        ({"q": np.ones((2, 4, 72), BF16)}, ValueError, "q: expected at least one head and a head_dim that is a multip"),
        ({"q": np.ones((2, 4, 272), BF16)}, ValueError, "q: expected .* up to 256"),
        ({"q": np.ones((2, 4, 128), BF16)[:, :, ::2]}, ValueError, "q: expected contiguous rows"),
        ({"q": np.ones((3, 4, 64), BF16)}, ValueError, r"kv_indptr: expected shape \(4\), got \(3,\)"),
        ({"q": np.ones((2, 5, 64), BF16)}, ValueError, "num_kv_heads: expected a divisor of the 5 heads of q, got 2"),
        ({"kv_ptrs": np.zeros(2, np.int32)}, TypeError, "kv_ptrs: expected dtype int64, got int32"),
        ({"kv_indptr": np.zeros(3, np.int64)}, TypeError, "kv_indptr: expected dtype int32, got int64"),
        ({"last_page_offset": np.ones(3, np.int32)}, ValueError, r"last_page_offset: expected shape \(2\)"),
        ({"layer_idx": 2}, ValueError, "layer_idx: expected an integer in 0 .. 1, got 2"),
        ({"page_size": 0}, ValueError, "page_size: expected an integer of at least 1"),
        ({"page_size": 2**30}, ValueError, r"kv_ptrs: expected pages of fewer than 2\*\*31 tokens"),
        ({"rope": "neox"}, ValueError, "rope: expected 'llama' or None, got 'neox'"),
        ({"rope": True}, TypeError, "rope: expected 'llama' or None, got bool"),
        ({"rope_theta": 0.0}, ValueError, "rope_theta: expected a finite number above 0, got 0.0"),
        ({"rope_scale": "1"}, TypeError, "rope_scale: expected a real number, got str"),
        ({"sm_scale": -1.0}, ValueError, "sm_scale: expected a finite number above 0, got -1.0"),
        ({"soft_cap": math.inf}, ValueError, "soft_cap: expected a finite number above 0, got inf"),
        ({"window": 0}, ValueError, "window: expected an integer of at least 1, got 0"),
        ({"window": 2.5}, TypeError, "window: expected an integer, got float"),
        ({"out": np.ones((2, 4, 64), F16)}, TypeError, "out: expected dtype bfloat16, got float16"),
        ({"out": np.ones((2, 4, 32), BF16)}, ValueError, r"out: expected shape \(2, 4, 64\)"),
        ({"workspace": np.zeros(1 << 17, np.int8)}, TypeError, "workspace: expected dtype uint8, got int8"),
        ({"workspace": np.zeros(100, np.uint8)}, ValueError, "workspace: expected at least 65536 bytes"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], text: str):
    with pytest.raises(error, match=text):
        cupy_lora.batch_decode(**{**good(), **change})


def test_output_apart_from_input():
    arguments = good()
    with pytest.raises(ValueError, match="out: expected memory of its own, got memory that overlaps q"):
        cupy_lora.batch_decode(**arguments, out=arguments["q"])


def test_prefill_checks_its_indptr():
    with pytest.raises(TypeError, match="qo_indptr: expected dtype int32, got int64"):
        cupy_lora.batch_prefill(**good(), qo_indptr=np.zeros(3, np.int64))
    with pytest.raises(ValueError, match=r"qo_indptr: expected shape \(3\), got \(4,\)"):
        cupy_lora.batch_prefill(**good(), qo_indptr=np.zeros(4, np.int32))
