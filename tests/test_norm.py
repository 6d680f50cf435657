"""RMS norm: against float64, on every engine; strides, widths, in place, bits that do not depend on the batch."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tolerance
from engines import Engine
from hypothesis import given
from hypothesis import strategies as st

import cupy_lora
from cupy_lora import _arrays, _jit, norm

BF16, F16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)
DTYPES = [F16, BF16, F32]


def few_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan for a GPU so small that every block has several rows to walk over."""
    monkeypatch.setattr(_jit, "device_facts", lambda device: _jit.DeviceFacts(arch=90, sm_count=2))
    norm._plans.clear()


def numbers(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype, spread: float = 1.0) -> np.ndarray:
    return (rng.standard_normal(shape) * spread).astype(dtype)


def exact_norm(x: np.ndarray, weight: np.ndarray, epsilon: float) -> np.ndarray:
    """Row by row, element by element, in float64 (and independent of the reference's expressions)."""
    columns = x.shape[-1]
    rows = x.astype(np.float64).reshape(-1, columns)
    out = np.empty_like(rows)
    for r, row in enumerate(rows):
        mean = sum(float(v) ** 2 for v in row) / columns
        for c in range(columns):
            out[r, c] = row[c] / (mean + epsilon) ** 0.5 * float(weight[c])
    return out.reshape(x.shape)


def assert_norm(actual: np.ndarray, x: np.ndarray, weight: np.ndarray, epsilon: float = 1e-6) -> None:
    exact = exact_norm(x, weight, epsilon)
    # rsqrt is good to 2 units and two products follow; the error of the mean is averaged down: a few units of float32.
    tolerance.assert_close(actual, exact, np.abs(exact), 16, "norm")


@pytest.mark.parametrize("weight_dtype", ["same", "float32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (3, 7), (5, 8), (9, 64), (2, 100), (3, 128), (7, 513), (2, 1000), (3, 4096)]
)
def test_matches_float64(engine: Engine, rows: int, columns: int, dtype: np.dtype, weight_dtype: str):
    rng = np.random.default_rng(columns)
    x, w = numbers(rng, (rows, columns), dtype), numbers(rng, (columns,), dtype if weight_dtype == "same" else F32)
    out = engine.array(np.full_like(x, np.nan))
    assert cupy_lora.rms_norm(engine.array(x), engine.array(w), 1e-5, out) is out
    assert_norm(engine.numpy(out), x, w, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [16384, 16391, 40000, 65536, 65537])
def test_wide_rows(engine: Engine, columns: int, dtype: np.dtype):
    rng = np.random.default_rng(columns)
    x, w = numbers(rng, (2, columns), dtype), numbers(rng, (columns,), F32)
    residual = numbers(rng, (2, columns), dtype)
    assert_norm(engine.numpy(cupy_lora.rms_norm(engine.array(x), engine.array(w))), x, w)
    xe, re = engine.array(x), engine.array(residual)
    cupy_lora.fused_add_rms_norm(xe, re, engine.array(w))
    total = (x.astype(np.float32) + residual.astype(np.float32)).astype(dtype)
    tolerance.assert_same_bits(engine.numpy(re), total, "residual")
    assert_norm(engine.numpy(xe), total, w)


def test_rows_that_fit_nowhere_are_read_again(engine: Engine):
    columns = 120_001  # float32: 480 KB a row
    rng = np.random.default_rng(0)
    x, w = numbers(rng, (1, columns), F32), numbers(rng, (columns,), F32)
    residual = numbers(rng, (1, columns), F32)
    xe, re = engine.array(x), engine.array(residual)
    cupy_lora.fused_add_rms_norm(xe, re, engine.array(w))
    tolerance.assert_same_bits(engine.numpy(re), x + residual, "residual")
    assert_norm(engine.numpy(xe), x + residual, w)
    cupy_lora.rms_norm(re, engine.array(w), out=re)
    assert_norm(engine.numpy(re), x + residual, w)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(1, 4096), (6, 33), (40, 128), (11, 2048)])
def test_fused_add(engine: Engine, rows: int, columns: int, dtype: np.dtype):
    rng = np.random.default_rng(rows)
    x, residual = numbers(rng, (rows, columns), dtype), numbers(rng, (rows, columns), dtype, 3.0)
    w = numbers(rng, (columns,), dtype)
    xe, re = engine.array(x), engine.array(residual)
    returned = cupy_lora.fused_add_rms_norm(xe, re, engine.array(w), 1e-5)
    assert returned[0] is xe
    assert returned[1] is re
    total = (x.astype(np.float32) + residual.astype(np.float32)).astype(dtype)
    tolerance.assert_same_bits(engine.numpy(re), total, "residual")
    assert_norm(engine.numpy(xe), total, w, 1e-5)


def test_fused_is_the_two_steps_in_bits(kernels: Engine):
    rng = np.random.default_rng(1)
    x, residual, w = (numbers(rng, shape, BF16) for shape in ((5, 1536), (5, 1536), (1536,)))
    xe, re = kernels.array(x), kernels.array(residual)
    cupy_lora.fused_add_rms_norm(xe, re, kernels.array(w))
    alone = cupy_lora.rms_norm(re, kernels.array(w))
    tolerance.assert_same_bits(kernels.numpy(xe), kernels.numpy(alone))


@pytest.mark.parametrize("columns", [48, 129, 4096])
def test_out_may_be_the_input(engine: Engine, columns: int, monkeypatch: pytest.MonkeyPatch):
    few_multiprocessors(monkeypatch)
    rng = np.random.default_rng(2)
    x, w = numbers(rng, (43, columns), BF16), numbers(rng, (columns,), BF16)
    xe = engine.array(x)
    expected = engine.numpy(cupy_lora.rms_norm(xe, engine.array(w)))
    assert cupy_lora.rms_norm(xe, engine.array(w), out=xe) is xe
    tolerance.assert_same_bits(engine.numpy(xe), expected)


@pytest.mark.parametrize("columns", [64, 100, 640, 4095])
def test_a_rows_bits_do_not_depend_on_the_batch_or_the_alignment(kernels: Engine, columns: int):
    rng = np.random.default_rng(columns)
    x, w = numbers(rng, (37, columns), F16), numbers(rng, (columns,), F16)
    together = kernels.numpy(cupy_lora.rms_norm(kernels.array(x), kernels.array(w)))
    for r in (0, 17, 36):
        alone = kernels.numpy(cupy_lora.rms_norm(kernels.array(x[r : r + 1]), kernels.array(w)))
        tolerance.assert_same_bits(alone[0], together[r])
    shifted = kernels.array(np.full((37, columns + 3), np.nan, F16))
    shifted[:, 1 : columns + 1] = kernels.array(x)
    odd = kernels.numpy(cupy_lora.rms_norm(shifted[:, 1 : columns + 1], kernels.array(w)))
    tolerance.assert_same_bits(odd, together, "rows at odd addresses")


def test_column_slices_leave_their_neighbours_alone(engine: Engine):
    """q and k of a fused QKV output, split into heads, normed in place: two strides, poison between."""
    rng = np.random.default_rng(3)
    tokens, heads, dim, width = 5, 6, 64, 6 * 64 + 2 * 64
    qkv, w = numbers(rng, (tokens, width), BF16), numbers(rng, (dim,), F32)
    base = engine.array(qkv)
    q = base[:, : heads * dim].reshape(tokens, heads, dim)
    assert np.shares_memory(q, base) if isinstance(base, np.ndarray) else True
    cupy_lora.rms_norm(q, engine.array(w), out=q)
    after = engine.numpy(base)
    assert_norm(
        after[:, : heads * dim].reshape(tokens, heads, dim), qkv[:, : heads * dim].reshape(tokens, heads, dim), w
    )
    tolerance.assert_same_bits(after[:, heads * dim :], qkv[:, heads * dim :], "neighbours")
    # k into the columns beside it: the same buffer, apart from the input
    k, v = base[:, heads * dim : (heads + 1) * dim], base[:, (heads + 1) * dim :]
    cupy_lora.rms_norm(k, engine.array(w), out=v)
    assert_norm(engine.numpy(base)[:, (heads + 1) * dim :], qkv[:, heads * dim : (heads + 1) * dim], w)


def test_leading_shapes_and_empty_batches(engine: Engine):
    rng = np.random.default_rng(4)
    w = numbers(rng, (24,), F32)
    for shape in ((24,), (1, 1, 24), (2, 3, 4, 24)):
        x = numbers(rng, shape, F32)
        out = engine.numpy(cupy_lora.rms_norm(engine.array(x), engine.array(w)))
        assert_norm(out, x, w)
    for shape in ((0, 24), (3, 0, 24)):
        assert cupy_lora.rms_norm(engine.array(np.empty(shape, F32)), engine.array(w)).shape == shape


def test_many_rows_per_block(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    """More rows than the grid has blocks: every block walks over several, with a short last step."""
    few_multiprocessors(monkeypatch)
    rng = np.random.default_rng(5)
    for rows, columns, fused in ((1003, 16, True), (203, 1032, True), (11, 16400, False)):
        x, w = numbers(rng, (rows, columns), BF16), numbers(rng, (columns,), BF16)
        if fused:
            residual = np.zeros_like(x)
            out = engine.numpy(
                cupy_lora.fused_add_rms_norm(engine.array(x), engine.array(residual), engine.array(w))[0]
            )
        else:
            out = engine.numpy(cupy_lora.rms_norm(engine.array(x), engine.array(w)))
        assert_norm(out[::97], x[::97], w)
        assert_norm(out[-2:], x[-2:], w)
        assert not np.isnan(out.astype(np.float32)).any()


def test_extreme_values(engine: Engine):
    w = np.ones(64, F32)
    x = np.zeros((4, 64), F16)
    x[1] = 65504.0
    x[2, 5] = np.nan
    x[3, 7] = np.inf
    out = engine.numpy(cupy_lora.rms_norm(engine.array(x), engine.array(w)))
    assert (out[0] == 0).all()
    np.testing.assert_allclose(out[1].astype(np.float32), 1.0, rtol=1e-3)
    assert np.isnan(out[2]).all(), "a NaN belongs to its whole row"
    assert np.isnan(out[3, 7])
    assert (np.delete(out[3], 7) == 0).all()


@given(
    columns=st.integers(1, 700),
    rows=st.integers(1, 9),
    gap=st.integers(0, 9),
    dtype=st.sampled_from(DTYPES),
    same=st.booleans(),
)
def test_any_width_and_stride(columns: int, rows: int, gap: int, dtype: np.dtype, same: bool):
    rng = np.random.default_rng(columns)
    base, w = numbers(rng, (rows, columns + gap), dtype), numbers(rng, (columns,), dtype if same else F32)
    assert_norm(cupy_lora.rms_norm(base[:, :columns], w), base[:, :columns], w)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"input": np.zeros((2, 16), np.float64)}, TypeError, "input: expected dtype"),
        ({"input": [1.0, 2.0]}, TypeError, "input: expected an array"),
        ({"weight": np.zeros(16, np.float16)}, TypeError, "weight: expected dtype bfloat16 or float32, got float16"),
        ({"weight": np.zeros(17, BF16)}, ValueError, r"weight: expected shape \(16\), got \(17,\)"),
        ({"weight": np.zeros(32, BF16)[::2]}, ValueError, "weight: expected a C-contiguous array"),
        ({"input": np.zeros((2, 32), BF16)[:, ::2]}, ValueError, "input: expected a contiguous last axis"),
        ({"input": np.zeros((), BF16)}, ValueError, "input: expected at least one axis"),
        ({"input": np.zeros((2, 0), BF16), "weight": np.zeros(0, BF16)}, ValueError, "at least one column"),
        ({"out": np.zeros((2, 16), F16)}, TypeError, "out: expected dtype bfloat16"),
        ({"out": np.zeros((3, 16), BF16)}, ValueError, "out: expected the shape of input"),
        ({"out": np.broadcast_to(np.zeros(16, BF16), (2, 16))}, ValueError, "out: expected a writable array"),
        ({"epsilon": -1.0}, ValueError, "epsilon: expected a finite number"),
        ({"epsilon": float("nan")}, ValueError, "epsilon: expected a finite number"),
    ],
)
def test_bad_arguments_are_named_and_nothing_is_written(change: dict[str, Any], error: type[Exception], text: str):
    arguments: dict[str, Any] = {
        "input": np.ones((2, 16), BF16), "weight": np.ones(16, BF16), "epsilon": 1e-6, "out": np.full((2, 16), 7, BF16)
    }  # fmt: skip
    arguments.update(change)
    before = np.array(arguments["out"])
    with pytest.raises(error, match=text):
        cupy_lora.rms_norm(**arguments)
    assert (np.array(arguments["out"]) == before).all()


def test_overlaps_are_errors():
    base, w = np.ones(64, BF16), np.ones(16, BF16)
    rows = np.lib.stride_tricks.as_strided(base, (3, 16), (16, 2))
    with pytest.raises(ValueError, match="out: expected rows that do not overlap"):
        cupy_lora.rms_norm(np.ones((3, 16), BF16), w, out=rows)
    with pytest.raises(ValueError, match="out: expected memory apart from that of input or the array itself"):
        cupy_lora.rms_norm(base[0:32].reshape(2, 16), w, out=base[8:40].reshape(2, 16))
    x = np.ones((2, 16), BF16)
    with pytest.raises(ValueError, match="residual: expected memory apart from that of input"):
        cupy_lora.fused_add_rms_norm(x, x, w)
    with pytest.raises(ValueError, match="input: expected memory apart from that of weight"):
        cupy_lora.fused_add_rms_norm(x, np.ones((2, 16), BF16), x[0])
    with pytest.raises(ValueError, match="residual: expected the shape of input"):
        cupy_lora.fused_add_rms_norm(x, np.ones((1, 16), BF16), w)


@pytest.mark.parametrize("itemsize", [2, 4])
def test_choice_covers_every_width(itemsize: int):
    for columns in [*range(1, 3000), *range(3000, 200_000, 617), 65536]:
        config = norm.choose_rms_norm(columns, itemsize, 90)
        vecs = -(-columns * itemsize // 16)
        per_thread = config.register_vecs + config.shared_vecs + config.reread_vecs
        assert config.threads * per_thread >= vecs > config.threads * (per_thread - 1)
        assert config.block % 32 == 0
        assert config.block <= 1024
        assert config.threads == config.block or (config.threads <= 32 and config.block % config.threads == 0)
        assert 256 + 16 * config.threads * config.shared_vecs <= 227 * 1024
    for arch in (80, 90):
        assert norm.choose_rms_norm(65536, 2, arch).reread_vecs == 0
    assert norm.choose_rms_norm(65536, 4, 90).reread_vecs == 0


def plan(rows: int, *, fused: bool) -> _jit.Launch:
    x, residual = (_arrays.view("input", np.broadcast_to(np.ones((1, 4096), BF16), (rows, 4096))) for _ in range(2))
    w = _arrays.view("weight", np.ones(4096, BF16))
    launch = norm.plan_rms_norm(x, residual if fused else None, w, x, 1e-6, _jit.DeviceFacts(arch=90, sm_count=132))
    assert launch is not None
    return launch


def test_a_block_has_one_row_or_as_many_as_the_others():
    for rows in (1, 131, 2048, 8192):
        assert plan(rows, fused=False).grid == (rows, 1, 1)
    for rows in (1, 132 * 3, 8192):  # one wave of blocks; too much for the L2 cache
        assert plan(rows, fused=True).grid == (rows, 1, 1)
    for rows in (132 * 3 + 1, 1500, 2048):
        launch = plan(rows, fused=True)
        assert dict(launch.kernel.defines)["PREFETCH"] == 1
        each = -(-rows // launch.grid[0])
        assert launch.grid[0] <= 132 * 3
        assert rows > (launch.grid[0] - 1) * each


@pytest.mark.gpu
def test_torch_is_an_oracle_of_its_own():
    torch = pytest.importorskip("torch")
    for shape, dtype in (((64, 4096), torch.bfloat16), ((7, 1000), torch.float16), ((3, 5, 129), torch.float32)):
        x = torch.randn(shape, dtype=dtype, device="cuda")
        w = torch.randn(shape[-1], dtype=dtype, device="cuda")
        out = torch.empty_like(x)
        assert cupy_lora.rms_norm(x, w, 1e-5, out) is out
        exact = torch.nn.functional.rms_norm(x.double(), shape[-1:], w.double(), 1e-5)
        assert ((out.double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps * 0.51 + 1e-6).all()
