"""The drop-in module: its nine names and their order of arguments, the three weight layouts, accumulation, bad data."""

from __future__ import annotations

import inspect
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tolerance
from engines import Engine, frame

from cupy_lora import _arrays, punica_kernels

BF16, F16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)
LAYERS = 2

TABLES = "kv_ptrs kv_indptr last_page_offset"
SIZES = "num_layers layer_idx num_kv_heads page_size"
PARAMETERS = {
    "batch_prefill": f"o q qo_indptr {TABLES} tmpbuf {SIZES}",
    "batch_decode": f"o q {TABLES} tmpbuf {SIZES}",
    "init_kv": f"{TABLES} k v seqlen_indptr {SIZES}",
    "append_kv": f"{TABLES} k v {SIZES}",
    "dispatch_bgmv": "y x w_ptr indicies layer_idx scale",
    "sgmv_cutlass": "y x w_ptr s_start s_end tmp layer_idx",
    "sgmv_cutlass_tmp_size": "num_problems",
    "sgmv_shrink": "y x w_ptr s_start s_end tmp layer_idx",
    "rms_norm": "output input weight epsilon",
}


def test_the_nine_names_and_the_order_of_their_arguments():
    assert sorted(punica_kernels.__all__) == sorted(PARAMETERS)
    for name, parameters in PARAMETERS.items():
        signature = inspect.signature(getattr(punica_kernels, name))
        assert list(signature.parameters) == parameters.split()
        assert all(p.default is p.empty for p in signature.parameters.values())


def test_tmp_size_is_the_originals():
    assert [punica_kernels.sgmv_cutlass_tmp_size(n) for n in (0, 1, 7)] == [0, 60, 420]


class Case:
    """Matrices of some adapters behind pointers, and y = y + scale * x W^T by loops in float64."""

    def __init__(self, engine: Engine, wide_in: int, wide_out: int, tokens: int, dtype: np.dtype, slots: int = 4):
        self.rng = np.random.default_rng(wide_in * 7 + wide_out)
        self.engine = engine
        self.x = self.rng.standard_normal((tokens, wide_in)).astype(dtype)
        self.y = self.rng.standard_normal((tokens, wide_out)).astype(dtype)
        self.weights = (self.rng.standard_normal((slots, LAYERS, wide_out, wide_in)) * 0.2).astype(dtype)

    def pointers(self, *, transposed: bool) -> np.ndarray:
        """One array per slot: [layers, out, in], or [layers, in, out]; the last layer ends at a guard page."""
        self.held = [self.engine.array(np.swapaxes(w, 1, 2) if transposed else w) for w in self.weights]
        return np.array([_arrays.view("w", w).ptr for w in self.held], np.int64)

    def check(self, actual: np.ndarray, slot_of: list[int], layer: int, scale: float = 1.0) -> None:
        x = self.x.astype(np.float64)
        exact, magnitude = self.y.astype(np.float64), np.abs(self.y.astype(np.float64))
        for row, slot in enumerate(slot_of):
            if slot >= 0:
                w = self.weights[slot, layer].astype(np.float64)
                exact[row] += scale * (w @ x[row])
                magnitude[row] += abs(scale) * (np.abs(w) @ np.abs(x[row]))
            else:
                tolerance.assert_same_bits(actual[row], self.y[row], f"row {row}, without an adapter")
        tolerance.assert_close(actual, exact, magnitude, self.x.shape[1] + 1)


# Ranks that the original has kernels for, and those between: 33 to 48, 65 to 80, 81 to 112; widths off its list.
WIDTHS = [(64, 16), (16, 64), (1024, 33), (40, 1000), (131, 77), (96, 96), (100, 7), (5, 130), (256, 112)]


@pytest.mark.parametrize("scale", [1.0, -0.3])
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize(("wide_in", "wide_out"), WIDTHS)
def test_dispatch_bgmv(engine: Engine, wide_in: int, wide_out: int, dtype: np.dtype, scale: float):
    case = Case(engine, wide_in, wide_out, 9, dtype)
    slots = [3, 0, -1, 1, 1, 99, 2, -(2**40), 0]
    y, x = frame(engine, case.y), engine.array(case.x)
    arrays = (engine.array(case.pointers(transposed=False)), engine.array(np.array(slots, np.int64)))
    assert punica_kernels.dispatch_bgmv(y.view, x, *arrays, 1, scale) is None
    case.check(y.check(engine), [slot if 0 <= slot < 4 else -1 for slot in slots], 1, scale)


SEGMENTS = {
    "one": ([0], [9]),
    "empty and absent": ([0, 3, -1, 3], [3, 3, -1, 9]),
    "out of order, with a gap": ([6, 0, -1, 2], [9, 1, -1, 5]),
    "past the end": ([0, 4, 9, 20], [4, 100, 12, 30]),
}


@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("function", ["sgmv_cutlass", "sgmv_shrink"])
@pytest.mark.parametrize(("wide_in", "wide_out"), WIDTHS)
def test_sgmv(engine: Engine, function: str, wide_in: int, wide_out: int, segments: str):
    starts, ends = SEGMENTS[segments]
    case = Case(engine, wide_in, wide_out, 9, F16, slots=len(starts))
    y = frame(engine, case.y, 3, 2)
    arrays = [
        case.pointers(transposed=function == "sgmv_cutlass"),
        np.array(starts, np.int32),
        np.array(ends, np.int32),
    ]
    arrays[0][np.array(ends) <= np.array(starts)] = 0  # as LoRAX passes them
    tmp = engine.array(np.zeros(0, np.uint8))
    getattr(punica_kernels, function)(y.view, engine.array(case.x), *(engine.array(a) for a in arrays), tmp, 1)
    slot_of = [-1] * 9
    for s, (start, end) in enumerate(zip(starts, ends, strict=True)):
        for row in range(max(start, 0), min(end, 9)):
            slot_of[row] = s
    case.check(y.check(engine), slot_of, 1)


def test_many_tokens_and_segments(engine: Engine):
    """Segments far longer than the mean: blocks walk over their rows."""
    case = Case(engine, 32, 8, 200, BF16, slots=5)
    starts, ends = [0, 1, 2, 3, 199], [1, 2, 3, 199, 200]
    y = engine.array(case.y)
    arrays = (case.pointers(transposed=False), np.array(starts, np.int32), np.array(ends, np.int32))
    punica_kernels.sgmv_shrink(y, engine.array(case.x), *(engine.array(a) for a in arrays), None, 0)
    slot_of = [s for s in range(5) for _ in range(starts[s], ends[s])]
    case.check(engine.numpy(y), slot_of, 0)


def test_a_float32_v_between_the_two(engine: Engine):
    """x float16 -> v float32 -> y float16: the weights have the 16-bit dtype."""
    down, up = Case(engine, 64, 16, 3, F16), Case(engine, 16, 64, 3, F16)
    slots = engine.array(np.array([0, 2, 1], np.int64))
    v = engine.array(np.zeros((3, 16), F32))
    punica_kernels.dispatch_bgmv(v, engine.array(down.x), engine.array(down.pointers(transposed=False)), slots, 0, 1.0)
    down.y = np.zeros((3, 16), F32)
    down.check(engine.numpy(v), [0, 2, 1], 0)
    up.x = engine.numpy(v)
    y = engine.array(up.y)
    punica_kernels.dispatch_bgmv(y, v, engine.array(up.pointers(transposed=False)), slots, 0, 2.0)
    up.check(engine.numpy(y), [0, 2, 1], 0, 2.0)


def test_the_same_delta_in_every_layout_and_in_bits(kernels: Engine):
    case = Case(kernels, 128, 24, 5, BF16, slots=1)
    outs = []
    for function in ("sgmv_cutlass", "sgmv_shrink", "dispatch_bgmv"):
        y, x = kernels.array(case.y), kernels.array(case.x)
        pointers = kernels.array(case.pointers(transposed=function == "sgmv_cutlass"))
        if function == "dispatch_bgmv":
            punica_kernels.dispatch_bgmv(y, x, pointers, kernels.array(np.zeros(5, np.int64)), 1, 1.0)
        else:
            bounds = (kernels.array(np.array([n], np.int32)) for n in (0, 5))
            getattr(punica_kernels, function)(y, x, pointers, *bounds, None, 1)
        outs.append(kernels.numpy(y))
    tolerance.assert_same_bits(outs[1], outs[0], "sgmv_shrink and sgmv_cutlass")
    tolerance.assert_same_bits(outs[2], outs[0], "dispatch_bgmv and sgmv_cutlass")


def test_bad_pointers_are_skipped_and_named_under_debug(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    case = Case(engine, 32, 8, 3, F16)
    pointers = case.pointers(transposed=False)
    pointers[1], pointers[2] = 0, pointers[2] + 2
    bounds = [engine.array(np.array(part, np.int32)) for part in ([0, 1, 2, -1], [1, 2, 3, -1])]
    table, slots = engine.array(pointers), engine.array(np.array([0, 1, 2], np.int64))
    for function, tables in (("dispatch_bgmv", (slots, 1, 1.0)), ("sgmv_shrink", (*bounds, None, 1))):
        y = engine.array(case.y)
        call = getattr(punica_kernels, function)
        call(y, engine.array(case.x), table, *tables)
        case.check(engine.numpy(y), [0, -1, -1], 1)
        with monkeypatch.context() as patch:
            patch.setenv("CUPY_LORA_DEBUG", "1")
            with pytest.raises(
                ValueError, match="w_ptr: expected addresses that are not 0 and multiples of 16, got 0 at 1"
            ):
                call(y, engine.array(case.x), table, *tables)
        case.check(engine.numpy(y), [0, -1, -1], 1)
    monkeypatch.setenv("CUPY_LORA_DEBUG", "1")
    with pytest.raises(ValueError, match="indicies: expected slots below 4"):
        punica_kernels.dispatch_bgmv(y, engine.array(case.x), table, engine.array(np.array([0, 4, 0])), 1, 1.0)
    overlapping = [engine.array(np.array(part, np.int32)) for part in ([0, 0, -1, -1], [2, 2, -1, -1])]
    with pytest.raises(ValueError, match="s_start: expected segments that do not overlap"):
        punica_kernels.sgmv_shrink(y, engine.array(case.x), table, *overlapping, None, 1)


def test_norm_and_kv_are_the_librarys(engine: Engine):
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((3, 40)).astype(F16), np.full(40, 2, F16)
    out = engine.array(np.zeros_like(x))
    assert punica_kernels.rms_norm(out, engine.array(x), engine.array(w), 1e-5) is None
    exact = x.astype(np.float64)
    exact = exact / np.sqrt((exact**2).mean(1, keepdims=True) + 1e-5) * 2
    tolerance.assert_close(engine.numpy(out), exact, np.abs(exact), 16)
    pages = engine.array(np.zeros((2, 1, 2, 1, 4, 8), F16))
    base = _arrays.view("pages", pages).ptr
    tables = [np.array([base, base + 128], np.int64), np.array([0, 2], np.int32), np.array([1], np.int32)]
    k, v = rng.standard_normal((2, 5, 1, 8)).astype(F16)
    starts = np.array([0, 5], np.int32)
    punica_kernels.init_kv(*(engine.array(t) for t in (*tables, k, v, starts)), 1, 0, 1, 4)
    punica_kernels.append_kv(*(engine.array(t) for t in (*tables, k[:1], v[:1])), 1, 0, 1, 4)
    held = engine.numpy(pages)
    tolerance.assert_same_bits(held[0, 0, :, 0], np.stack([k[:4, 0], v[:4, 0]]))
    tolerance.assert_same_bits(held[1, 0, :, 0, 0], np.stack([k[0, 0], v[0, 0]]))


def attention_by_loops(q: np.ndarray, keys: np.ndarray, values: np.ndarray, position: int) -> np.ndarray:
    """One query (heads, dim) at ``position`` over the keys up to it, rotated with theta 1e4, in float64."""
    heads, dim = q.shape
    half = dim // 2

    def rotated(x: np.ndarray, at: int) -> np.ndarray:
        angle = at / 1e4 ** (np.arange(half) / half)
        first, second = x[..., :half], x[..., half:]
        turned = (first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle))
        return np.concatenate(turned, axis=-1)

    out = np.empty((heads, dim))
    group = heads // keys.shape[1]
    for head in range(heads):
        query = rotated(q[head], position)
        scores = np.array([query @ rotated(keys[j, head // group], j) for j in range(position + 1)]) / dim**0.5
        weights = np.exp(scores - scores.max())
        out[head] = (weights / weights.sum()) @ values[: position + 1, head // group]
    return out


def test_attention_is_causal_and_rotated(engine: Engine):
    """Both functions over two sequences; the prefill's are the last 3 of 9 and all 4 of 4 positions."""
    rng = np.random.default_rng(1)
    heads, kv_heads, dim, page, lengths, new = 4, 2, 64, 4, [9, 4], [3, 4]
    keys, values = rng.standard_normal((2, sum(lengths), kv_heads, dim)).astype(F16)
    pages = engine.array(np.zeros((4, 2, 2, kv_heads, page, dim), F16))
    base, step = _arrays.view("pages", pages).ptr, 2 * 2 * kv_heads * page * dim * 2
    host = (np.array([base + step * at for at in (2, 0, 3, 1)], np.int64), np.array([0, 3, 4], np.int32))
    tables = [engine.array(table) for table in (*host, np.array([1, 4], np.int32))]
    sizes = (2, 1, kv_heads, page)
    starts = engine.array(np.array([0, 9, 13], np.int32))
    punica_kernels.init_kv(*tables, engine.array(keys), engine.array(values), starts, *sizes)
    q = rng.standard_normal((sum(new), heads, dim)).astype(F16)
    o, tmp = engine.array(np.full_like(q, np.nan)), engine.array(np.zeros(1, np.uint8))
    indptr = engine.array(np.array([0, 3, 7], np.int32))
    assert punica_kernels.batch_prefill(o, engine.array(q), indptr, *tables, tmp, *sizes) is None
    wide = [x.astype(np.float64) for x in (q, keys, values)]
    exact = np.empty(q.shape)
    for i, first in enumerate((0, 9)):
        for j in range(new[i]):
            row, position = (0, 3)[i] + j, lengths[i] - new[i] + j
            span = slice(first, first + lengths[i])
            exact[row] = attention_by_loops(wide[0][row], wide[1][span], wide[2][span], position)
    # Weights are rounded to 16 bits on the tensor cores: a unit of the largest value, not of the sum.
    magnitude = np.full(q.shape, float(np.abs(values).max()) * 2.0**12)
    tolerance.assert_close(engine.numpy(o), exact, magnitude, 1, "batch_prefill")
    last = q[[2, 6]]
    o = engine.array(np.full_like(last, np.nan))
    assert punica_kernels.batch_decode(o, engine.array(last), *tables, tmp, *sizes) is None
    tolerance.assert_close(engine.numpy(o), exact[[2, 6]], magnitude[:2], 1, "batch_decode")


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"y": np.zeros((3, 8), BF16)}, TypeError, "y: expected dtype float16 or float32, got bfloat16"),
        ({"y": np.zeros((3, 8), np.float64)}, TypeError, "y: expected dtype"),
        ({"x": np.zeros((3, 16), F32)}, TypeError, "x: expected dtype float16 or bfloat16, got float32"),
        ({"y": np.zeros((2, 8), F16)}, ValueError, r"y: expected shape \(3, out\), got \(2, 8\)"),
        ({"y": np.zeros((3, 16), F16)[:, ::2]}, ValueError, "y: expected contiguous rows"),
        ({"x": np.zeros((3, 2000), F16), "y": np.zeros((3, 1500), F16)}, ValueError, "x: expected a rank"),
        ({"w_ptr": np.zeros(4, np.int32)}, TypeError, "w_ptr: expected dtype int64, got int32"),
        ({"w_ptr": np.zeros((4, 1), np.int64)}, ValueError, "w_ptr: expected shape"),
        ({"indicies": np.zeros(2, np.int64)}, ValueError, r"indicies: expected shape \(3\), got \(2,\)"),
        ({"layer_idx": -1}, ValueError, "layer_idx: expected an integer of at least 0"),
        ({"scale": "1"}, TypeError, "scale: expected a real number"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], text: str):
    arguments = {
        "y": np.zeros((3, 8), F16), "x": np.zeros((3, 16), F16), "w_ptr": np.zeros(4, np.int64),
        "indicies": np.zeros(3, np.int64), "layer_idx": 0, "scale": 1.0,
    }  # fmt: skip
    with pytest.raises(error, match=text):
        punica_kernels.dispatch_bgmv(**{**arguments, **change})


def test_output_apart_from_input():
    x = np.zeros((2, 8), F16)
    with pytest.raises(ValueError, match="y: expected memory of its own, got memory that overlaps x"):
        punica_kernels.dispatch_bgmv(x, x, np.zeros(1, np.int64), np.zeros(2, np.int64), 0, 1.0)
    with pytest.raises(ValueError, match=r"s_end: expected shape \(1\), got \(2,\)"):
        punica_kernels.sgmv_shrink(
            np.zeros((2, 4), F16), x, np.zeros(1, np.int64), np.zeros(1, np.int32), np.zeros(2, np.int32), None, 0
        )
