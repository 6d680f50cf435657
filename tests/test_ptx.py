"""Each wrapper of cuda_src/ptx.cuh and ptx_barriers.cuh, on the GPU and by its CPU body, against NumPy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import engines
import ml_dtypes
import numpy as np
import pytest

from cupy_lora import _jit, _paths
from cupy_lora._arrays import CPU, view

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
KERNELS = Path(__file__).with_suffix("").parent / "ptx_kernels.cu"


def launch(
    engine: engines.Engine,
    symbol: str,
    *args: Any,
    grid: int = 1,
    block: int = 32,
    shared: int = 0,
    blocks: int = 0,
) -> None:
    device = CPU if engine.name == "simt" else 0
    defines = (("BLOCKS", blocks),) if blocks else ()
    kernel = _jit.Kernel("../tests/ptx_kernels", symbol, defines, block, shared, max(blocks, 1))
    passed = tuple(arg if isinstance(arg, np.generic) else view("argument", arg) for arg in args)
    _jit.run(_jit.Launch(kernel, (grid, 1, 1), passed), device)


def floats() -> np.ndarray:
    """Every sign and exponent with the fractions that decide the rounding to 16 bits and tf32, and a random rest."""
    tie = [1 << bit for bit in (11, 12, 13, 14, 15, 16)]
    fractions = {0, 1, (1 << 23) - 1}
    for t in tie:
        fractions |= {t - 1, t, t + 1, 3 * t - 1, 3 * t, 3 * t + 1, (1 << 23) - t, (1 << 23) - t - 1, (1 << 23) - t + 1}
    exponents = np.arange(256, dtype=np.uint32) << 23
    bits = exponents[:, None] | np.array(sorted(fractions), np.uint32)[None, :]
    bits = np.concatenate([bits.ravel(), bits.ravel() | np.uint32(1 << 31)])
    rest = np.random.default_rng(5).integers(0, 1 << 32, 20000, dtype=np.uint32)
    return np.concatenate([bits, rest]).view(np.float32)


def assert_same_halves(got: np.ndarray, expected: np.ndarray) -> None:
    """Equal bits; any NaN for a NaN."""
    nan = np.isnan(expected.astype(np.float32))
    assert np.isnan(got[nan].astype(np.float32)).all()
    np.testing.assert_array_equal(got[~nan].view(np.uint16), expected[~nan].view(np.uint16))


def test_floats_are_rounded_to_halves_and_tf32(kernels: engines.Engine) -> None:
    values = floats()
    # CuPy flushes float32 subnormals to zero (-ftz=true); the CPU does not.
    values = values[(np.abs(values) >= np.finfo(np.float32).tiny) | (values == 0) | np.isnan(values)]
    values = values[: len(values) // 2 * 2]
    pairs = len(values) // 2
    bf, half = (kernels.array(np.zeros(pairs, np.uint32)) for _ in range(2))
    tf32 = kernels.array(np.zeros_like(values))
    x = kernels.array(values)
    launch(kernels, "halves_from_floats", x, bf, half, tf32, np.int32(pairs), grid=-(-pairs // 128), block=128)
    with np.errstate(over="ignore", invalid="ignore"):
        assert_same_halves(kernels.numpy(bf).view(BFLOAT16), values.astype(BFLOAT16))
        assert_same_halves(kernels.numpy(half).view(np.float16), values.astype(np.float16))
    got, finite = kernels.numpy(tf32), np.isfinite(values)
    # Quiet NaNs, the only ones that arithmetic makes: of others the GPU may keep no bit that says NaN.
    quiet = np.isnan(values) & (values.view(np.uint32) & 0x400000 != 0)
    assert np.isnan(got[quiet]).all()
    np.testing.assert_array_equal(got[np.isinf(values)], values[np.isinf(values)])
    # Ties away from zero: add half of the last place kept to the magnitude, cut the 13 bits below it.
    expected = (values.view(np.uint32).astype(np.uint64) + 0x1000 & ~np.uint64(0x1FFF)).astype(np.uint32)
    np.testing.assert_array_equal(got[finite].view(np.uint32), expected[finite])


def test_every_half_becomes_its_float(kernels: engines.Engine) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    out = kernels.array(np.zeros(1 << 16, np.float32))
    launch(kernels, "floats_from_f16", kernels.array(bits), out, grid=1 << 8, block=1 << 8)
    expected, got = bits.view(np.float16).astype(np.float32), kernels.numpy(out)
    nan = np.isnan(expected)
    assert np.isnan(got[nan]).all()
    np.testing.assert_array_equal(got[~nan].view(np.uint32), expected[~nan].view(np.uint32))


@pytest.mark.parametrize("symbol", ["mma_bf16", "mma_f16", "mma_tf32"])
def test_mma_puts_every_element_where_the_isa_says(kernels: engines.Engine, symbol: str) -> None:
    dtype = {"mma_bf16": BFLOAT16, "mma_f16": np.dtype(np.float16), "mma_tf32": np.dtype(np.float32)}[symbol]
    depth = 8 if symbol == "mma_tf32" else 16
    rng = np.random.default_rng(7)
    # Small integers: every product and sum is exact in float32, so a single misplaced element shows.
    a, b = rng.integers(-8, 9, (16, depth)).astype(dtype), rng.integers(-8, 9, (depth, 8)).astype(dtype)
    c = rng.integers(-100, 101, (16, 8)).astype(np.float32)
    out = kernels.array(c)
    raw = np.uint16 if dtype.itemsize == 2 else np.float32
    launch(kernels, symbol, kernels.array(a.view(raw)), kernels.array(b.view(raw)), out)
    np.testing.assert_array_equal(kernels.numpy(out), c + a.astype(np.float32) @ b.astype(np.float32))


@pytest.mark.parametrize("symbol", ["mma_bf16", "mma_f16", "mma_tf32"])
def test_mma_accumulates_in_float32(kernels: engines.Engine, symbol: str) -> None:
    dtype = {"mma_bf16": BFLOAT16, "mma_f16": np.dtype(np.float16), "mma_tf32": np.dtype(np.float32)}[symbol]
    depth = 8 if symbol == "mma_tf32" else 16
    rng = np.random.default_rng(8)
    a, b = rng.standard_normal((16, depth)).astype(dtype), rng.standard_normal((depth, 8)).astype(dtype)
    if symbol == "mma_tf32":  # what the tensor core does not look at
        a, b = ((v.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32) for v in (a, b))
    c = rng.standard_normal((16, 8)).astype(np.float32)
    out = kernels.array(c)
    raw = np.uint16 if dtype.itemsize == 2 else np.float32
    launch(kernels, symbol, kernels.array(a.view(raw)), kernels.array(b.view(raw)), out)
    wide = [v.astype(np.float64) for v in (a, b, c)]
    # The tensor core aligns the products of one step to the largest and cuts what falls below 2**-24 of it or
    # so: a few units in the last place of the sum of magnitudes.
    bound = (np.abs(wide[0]) @ np.abs(wide[1]) + np.abs(wide[2])) * 2.0**-22
    assert (np.abs(kernels.numpy(out) - (wide[0] @ wide[1] + wide[2])) <= bound).all()


def test_mma_tf32_ignores_the_low_bits(kernels: engines.Engine) -> None:
    rng = np.random.default_rng(9)
    a, b = rng.integers(1, 9, (16, 8)).astype(np.float32), rng.integers(1, 9, (8, 8)).astype(np.float32)
    dirty = [(v.view(np.uint32) | np.uint32(0x1FFF)).view(np.float32) for v in (a, b)]
    out = kernels.array(np.zeros((16, 8), np.float32))
    launch(kernels, "mma_tf32", *(kernels.array(v) for v in dirty), out)
    np.testing.assert_array_equal(kernels.numpy(out), a @ b)


def test_loads_that_keep_out_of_l1(kernels: engines.Engine) -> None:
    values = np.random.default_rng(10).integers(0, 1 << 32, (64, 4), dtype=np.uint32)
    out = kernels.array(np.zeros_like(values))
    launch(kernels, "load_once", kernels.array(values), out)
    np.testing.assert_array_equal(kernels.numpy(out), values)


def test_powers_of_two(kernels: engines.Engine) -> None:
    rng = np.random.default_rng(13)
    values = np.concatenate([[-np.inf, 0, 1, -1, -125, 127], rng.uniform(-125, 127, 2042)]).astype(np.float32)
    out = kernels.array(np.zeros_like(values))
    launch(kernels, "powers_of_two", kernels.array(values), out, grid=len(values) // 256, block=256)
    exact = np.exp2(values.astype(np.float64))
    got = kernels.numpy(out)
    np.testing.assert_array_equal(got[:4], [0, 1, 2, 0.5])
    assert (np.abs(got - exact) <= 2.0**-21 * exact).all()


def test_matrices_come_as_fragments(kernels: engines.Engine) -> None:
    values = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)  # matrix, row, column
    out = kernels.array(np.zeros((2, 4, 8, 4), np.uint32))
    launch(kernels, "matrices", kernels.array(values.view(np.uint32).reshape(32, 4)), out, shared=512)
    got = kernels.numpy(out).view(np.uint16).reshape(2, 4, 8, 8)  # g, then both elements of each t
    np.testing.assert_array_equal(got[0], values)
    np.testing.assert_array_equal(got[1], values.transpose(0, 2, 1))


@pytest.mark.parametrize("blocks", [1, 7, 300])
def test_the_last_block_sees_what_the_others_wrote(kernels: engines.Engine, blocks: int) -> None:
    parts, arrived = kernels.array(np.zeros((blocks, 4), np.float32)), kernels.array(np.zeros(1, np.int32))
    out = kernels.array(np.zeros(1, np.float32))
    for _ in range(2):
        launch(kernels, "last_adds", parts, arrived, out, grid=blocks, shared=16)
        assert kernels.numpy(out)[0] == blocks * (blocks + 1) / 2
        assert kernels.numpy(arrived)[0] == 0


def test_loads_of_integers(kernels: engines.Engine) -> None:
    values = np.random.default_rng(13).integers(-(1 << 31), 1 << 31, 64).astype(np.int32)
    out = kernels.array(np.zeros(96, np.int32))
    launch(kernels, "load_ints", kernels.array(values), out)
    np.testing.assert_array_equal(kernels.numpy(out), np.concatenate([values, values[::2]]))


@pytest.mark.parametrize(("steps", "valid"), [(1, 1), (2, 1), (7, 7), (8, 5), (3, 0)])
def test_asynchronous_copies(kernels: engines.Engine, steps: int, valid: int) -> None:
    width = 64
    # Only the rows that are read exist: an array's end is at a guard page.
    values = np.random.default_rng(11).integers(0, 1 << 32, (valid, width, 4), dtype=np.uint32)
    out = kernels.array(np.full((steps, width, 4), 0xABABABAB, np.uint32))
    args = (kernels.array(values), out, np.int32(steps), np.int32(valid))
    launch(kernels, "copy_async", *args, block=width, shared=3 * width * 16)
    expected = np.zeros((steps, width, 4), np.uint32)
    expected[:valid] = np.roll(values, -1, axis=1)
    np.testing.assert_array_equal(kernels.numpy(out), expected)


@pytest.mark.parametrize(
    ("symbol", "steps", "valid"),
    [
        ("relay_pieces", 1, 1),
        ("relay_pieces", 9, 9),
        ("relay_pieces", 9, 6),
        ("relay_bulk", 1, 1),
        ("relay_bulk", 9, 9),
    ],
)
def test_copies_that_a_barrier_counts(kernels: engines.Engine, symbol: str, steps: int, valid: int) -> None:
    if symbol == "relay_bulk" and kernels.name == "gpu" and _jit.device_facts(0).arch < 90:
        pytest.skip("bulk copies need compute capability 9.0")
    values = np.random.default_rng(14).integers(0, 1 << 32, (valid, 32, 4), dtype=np.uint32)
    out = kernels.array(np.full((steps, 32, 4), 0xABABABAB, np.uint32))
    args = (kernels.array(values), out, np.int32(steps), np.int32(valid))
    launch(kernels, symbol, *args, block=64, shared=1024 + 32, blocks=1 if symbol == "relay_bulk" else 0)
    expected = np.zeros((steps, 32, 4), np.uint32)
    expected[:valid] = np.roll(values, -1, axis=1)
    np.testing.assert_array_equal(kernels.numpy(out), expected)


@pytest.mark.parametrize("blocks", [1, 2, 4, 8])
@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_exchange_through_the_cluster(kernels: engines.Engine, blocks: int, rounds: int) -> None:
    if kernels.name == "gpu" and _jit.device_facts(0).arch < 90:
        pytest.skip("clusters need compute capability 9.0")
    width, clusters = 32, 2
    values = np.random.default_rng(12).integers(0, 1 << 30, (blocks, width, 4), dtype=np.uint32)
    out = kernels.array(np.zeros((blocks, rounds, blocks, width, 4), np.uint32))
    args = (kernels.array(values), out, np.int32(rounds))
    shared = 128 + 2 * blocks * width * 16
    launch(kernels, "exchange", *args, grid=clusters * blocks, block=width, shared=shared, blocks=blocks)
    expected = np.broadcast_to(values, out.shape).copy()
    expected[..., 0] += np.arange(rounds, dtype=np.uint32)[None, :, None, None]
    np.testing.assert_array_equal(kernels.numpy(out), expected)


@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_parts_of_a_block_take_turns(kernels: engines.Engine, rounds: int) -> None:
    out = kernels.array(np.zeros(64, np.int32))
    launch(kernels, "turns", out, np.int32(rounds), block=192, shared=64 * 4)
    expected = np.arange(64, dtype=np.int32)
    for _ in range(rounds):
        expected = (expected * 3 + 2) * 3 + 1
    np.testing.assert_array_equal(kernels.numpy(out), expected)


def test_a_launch_waits_for_the_one_before(kernels: engines.Engine) -> None:
    values = kernels.array(np.arange(1000, dtype=np.int32))
    for _ in range(50):
        launch(kernels, "add_one", values, np.int32(1000), grid=8, block=128)
    np.testing.assert_array_equal(kernels.numpy(values), np.arange(1000) + 50)


def test_every_wrapper_is_tested() -> None:
    sources = "".join((_paths.cuda_src() / name).read_text() for name in ("ptx.cuh", "ptx_barriers.cuh"))
    wrappers = set(re.findall(r"^CUPY_LORA_DEVICE \w+ (\w+)\(", sources, re.M))
    wrappers.discard("shared_address")  # only inside the others
    assert len(wrappers) > 10
    assert wrappers <= set(re.findall(r"ptx::(\w+)", KERNELS.read_text()))
