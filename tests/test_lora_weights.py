"""LoraWeights: what load and unload put where, in memory of the right size, in time; bad input."""

from __future__ import annotations

from typing import Any

import cases
import engines
import numpy as np
import pytest
import tolerance

from cupy_lora import LoraBatch, LoraWeights, _arrays, add_lora
from cupy_lora.lora_weights import ALIGNMENT, RECORD


def matrices(rng: np.random.Generator, rank: int, width: int, out: int, dtype: str = "bfloat16") -> list[np.ndarray]:
    return [cases.normal(rng, (rank, width), dtype), cases.normal(rng, (out, rank), dtype)]


def records(engine: engines.Engine, weights: LoraWeights) -> np.ndarray:
    """The table as the kernels read it: [slot, slice]."""
    table = engine.numpy(weights.table)
    return np.ascontiguousarray(table).view(RECORD)[..., 0]


def test_a_record_is_32_bytes() -> None:
    assert RECORD.itemsize == 32
    assert [RECORD.fields[name][1] for name in ("a", "b", "rank", "scale", "spare")] == [0, 8, 16, 20, 24]


def test_a_new_table_is_empty(engine: engines.Engine) -> None:
    weights = LoraWeights(64, (32, 16), max_adapters=3, dtype="float16", device=engine.device)
    assert weights.table.shape == (3, 2, 4)
    assert not engine.numpy(weights.table).any()
    assert weights.ranks == ((0, 0),) * 3
    assert weights.rank_set == frozenset()
    assert weights.nbytes == 3 * 2 * 32
    assert weights.slices == (32, 16)
    assert weights.out_features == (32, 16)


@pytest.mark.parametrize("dtype", ["float16", np.float16, np.dtype(np.float16), "bfloat16", cases.DTYPES["bfloat16"]])
def test_dtype_by_name_or_object(dtype: object) -> None:
    weights = LoraWeights(8, 8, max_adapters=1, dtype=dtype, device="cpu")
    assert weights.dtype.name in ("float16", "bfloat16")
    assert weights.dtype == np.dtype(dtype)


def test_load_fills_the_record(engine: engines.Engine) -> None:
    rng = np.random.default_rng(0)
    weights = LoraWeights(23, 41, max_adapters=4, dtype="bfloat16", device=engine.device)
    a, b = matrices(rng, 5, 23, 41)  # A is no multiple of 16 bytes, B must still start at one
    weights.load(2, engine.array(a), engine.array(b), scale=0.3)
    assert weights.ranks == (0, 0, 5, 0)
    assert weights.rank_set == {5}
    table = records(engine, weights)
    assert not table[[0, 1, 3]]["rank"].any()
    (part,) = weights.slot(2)
    record = table[2, 0]
    assert record["rank"] == 5
    assert record["scale"] == np.float32(0.3)
    assert record["a"] == _arrays.view("a", part.a).ptr
    assert record["b"] == _arrays.view("b", part.b).ptr
    assert record["a"] % ALIGNMENT == 0
    assert record["b"] % ALIGNMENT == 0
    tolerance.assert_same_bits(engine.numpy(part.a), a)
    tolerance.assert_same_bits(engine.numpy(part.b), b)


def test_each_slot_and_slice_has_its_own_record(engine: engines.Engine) -> None:
    rng = np.random.default_rng(1)
    weights = LoraWeights(16, (8, 24, 8), max_adapters=2, dtype="float16", device=engine.device)
    parts = [matrices(rng, rank, 16, out, "float16") for rank, out in ((4, 8), (9, 24))]
    weights.load(1, [parts[0][0], parts[1][0], None], [parts[0][1], parts[1][1], None], scale=[2.0, 3.0, 9.0])
    assert weights.ranks == ((0, 0, 0), (4, 9, 0))
    assert weights.rank_set == {4, 9}
    table = records(engine, weights)
    assert table["rank"].tolist() == [[0, 0, 0], [4, 9, 0]]
    assert table["scale"].tolist() == [[0, 0, 0], [2, 3, 0]]
    assert table[1, 2]["a"] == table[1, 2]["b"] == 0


def test_one_a_for_all_slices_is_stored_once(engine: engines.Engine) -> None:
    """PEFT has one A for a fused projection; B is cut at the slices."""
    rng = np.random.default_rng(2)
    weights = LoraWeights(64, (32, 16, 16), max_adapters=1, dtype="bfloat16", device=engine.device)
    a, b = matrices(rng, 8, 64, 64)
    weights.load(0, engine.array(a), engine.array(b))
    table = records(engine, weights)
    assert len(set(table[0]["a"].tolist())) == 1
    assert len(set(table[0]["b"].tolist())) == 3
    assert weights.nbytes == 3 * 32 + a.nbytes + b.nbytes
    for part, rows in zip(weights.slot(0), (slice(0, 32), slice(32, 48), slice(48, 64)), strict=True):
        tolerance.assert_same_bits(engine.numpy(part.b), b[rows])


@pytest.mark.parametrize("source", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_load_converts(engine: engines.Engine, source: str, dtype: str) -> None:
    rng = np.random.default_rng(3)
    weights = LoraWeights(20, 12, max_adapters=1, dtype=dtype, device=engine.device)
    a, b = matrices(rng, 3, 20, 12, source)
    weights.load(0, engine.array(a), engine.array(b))
    (part,) = weights.slot(0)
    tolerance.assert_same_bits(engine.numpy(part.a), a.astype(cases.DTYPES[dtype]))
    tolerance.assert_same_bits(engine.numpy(part.b), b.astype(cases.DTYPES[dtype]))


def test_load_takes_float64_and_any_strides(engine: engines.Engine) -> None:
    rng = np.random.default_rng(4)
    weights = LoraWeights(20, 12, max_adapters=1, dtype="float16", device=engine.device)
    a, b = rng.standard_normal((20, 6)), rng.standard_normal((24, 3)).astype(np.float32)
    weights.load(0, engine.array(a).T[::2], engine.array(b)[::2])
    (part,) = weights.slot(0)
    tolerance.assert_same_bits(engine.numpy(part.a), a.T[::2].astype(np.float16))
    tolerance.assert_same_bits(engine.numpy(part.b), b[::2].astype(np.float16))


def test_loaded_copies_do_not_follow_the_source(engine: engines.Engine) -> None:
    weights = LoraWeights(8, 8, max_adapters=1, dtype="float16", device=engine.device)
    a, b = engine.array(np.ones((2, 8), np.float16)), engine.array(np.ones((8, 2), np.float16))
    weights.load(0, a, b)
    a.fill(7)
    (part,) = weights.slot(0)
    assert (engine.numpy(part.a) == 1).all()


def test_without_a_copy_the_callers_memory_is_used(engine: engines.Engine) -> None:
    rng = np.random.default_rng(5)
    weights = LoraWeights(32, 16, max_adapters=2, dtype="bfloat16", device=engine.device)
    a, b = (engine.array(matrix) for matrix in matrices(rng, 8, 32, 16))
    weights.load(1, a, b, copy=False)
    table = records(engine, weights)
    assert table[1, 0]["a"] == _arrays.view("a", a).ptr
    assert table[1, 0]["b"] == _arrays.view("b", b).ptr
    assert weights.nbytes == 2 * 32
    x = cases.normal(rng, (3, 32), "bfloat16")
    batch = LoraBatch(3, max_adapters=2, device=engine.device)
    batch.update(engine.array(np.array([1, -1, 1])))
    before = engine.numpy(b)
    b[...] = engine.array((before.astype(np.float32) * 2).astype(before.dtype))
    y = engine.array(np.zeros((3, 16), np.float32))
    add_lora(y, engine.array(x), weights, batch)
    v = x.astype(np.float64) @ engine.numpy(a).astype(np.float64).T
    exact = v @ (2 * before.astype(np.float64)).T
    exact[1] = 0
    magnitude = np.abs(x).astype(np.float64) @ np.abs(engine.numpy(a)).astype(np.float64).T
    magnitude = magnitude @ (2 * np.abs(before).astype(np.float64)).T
    tolerance.assert_close(engine.numpy(y), exact, magnitude, 32 + 8)


def test_memory_is_the_adapters_true_size(engine: engines.Engine) -> None:
    """Every adapter at its own rank, the table under one percent."""
    rng = np.random.default_rng(6)
    weights = LoraWeights(512, 512, max_adapters=4, dtype="float16", device=engine.device)
    total = 0
    for slot, rank in enumerate((4, 8, 64, 7)):
        a, b = matrices(rng, rank, 512, 512, "float16")
        weights.load(slot, a, b)
        total += a.nbytes + b.nbytes
    assert total <= weights.nbytes <= total * 1.01
    weights.unload(2)
    assert weights.nbytes <= total * 1.01 - 2 * 64 * 512 * 2


def output(engine: engines.Engine, weights: LoraWeights, x: np.ndarray) -> np.ndarray:
    """y of one row per slot, from zero."""
    slots = weights.max_adapters
    batch = LoraBatch(slots, max_adapters=slots, device=engine.device)
    batch.update(engine.array(np.arange(slots)))
    y = engine.array(np.zeros((slots, weights.width), np.float32))
    add_lora(y, engine.array(np.repeat(x, slots, axis=0)), weights, batch)
    return engine.numpy(y)


def test_unload_and_load_again(engine: engines.Engine) -> None:
    rng = np.random.default_rng(7)
    x = cases.normal(rng, (1, 48), "float16")
    weights = LoraWeights(48, 24, max_adapters=3, dtype="float16", device=engine.device)
    pairs = [matrices(rng, rank, 48, 24, "float16") for rank in (16, 8, 3)]
    for slot, (a, b) in enumerate(pairs):
        weights.load(slot, a, b)
    all_loaded = output(engine, weights, x)
    assert all_loaded.any(axis=1).all()
    weights.unload(1)
    assert weights.ranks == (16, 0, 3)
    without = output(engine, weights, x)
    assert not without[1].any()
    tolerance.assert_same_bits(without[[0, 2]], all_loaded[[0, 2]])
    weights.unload(1)
    weights.load(1, *pairs[1])
    tolerance.assert_same_bits(output(engine, weights, x), all_loaded)
    weights.load(1, *pairs[2])
    replaced = output(engine, weights, x)
    tolerance.assert_same_bits(replaced[1], all_loaded[2])
    tolerance.assert_same_bits(replaced[[0, 2]], all_loaded[[0, 2]])


def test_slot_scale_is_float32_in_the_kernel(engine: engines.Engine) -> None:
    """A scale that no 16-bit weight could carry, times the call's."""
    weights = LoraWeights(16, 8, max_adapters=1, dtype="bfloat16", device=engine.device)
    ones = np.ones((4, 16)), np.ones((8, 4))
    weights.load(0, *ones, scale=1.0009765625)
    batch = LoraBatch(1, max_adapters=1, device=engine.device)
    batch.update(engine.array(np.zeros(1, np.int32)))
    y = engine.array(np.zeros((1, 8), np.float32))
    add_lora(y, engine.array(np.ones((1, 16), cases.DTYPES["bfloat16"])), weights, batch, scale=0.5)
    assert engine.numpy(y)[0].tolist() == [16 * 4 * 1.0009765625 * 0.5] * 8


def test_a_refused_load_changes_nothing(engine: engines.Engine) -> None:
    rng = np.random.default_rng(8)
    weights = LoraWeights(48, (24, 8), max_adapters=2, dtype="float16", device=engine.device)
    a, b = matrices(rng, 8, 48, 32, "float16")
    weights.load(0, a, b)
    before = engine.numpy(weights.table).copy()
    with pytest.raises(ValueError, match=r"b\[1\]: expected shape"):
        weights.load(0, [a, a], [b[:24], b[:5]])
    assert (engine.numpy(weights.table) == before).all()
    assert weights.ranks == ((8, 8), (0, 0))


@pytest.mark.gpu
def test_replaced_memory_waits_for_its_readers(gpu: engines.Engine) -> None:
    """Loading over an adapter that queued work on another stream reads must not free it before that work is done."""
    import cupy

    rng = np.random.default_rng(9)
    weights = LoraWeights(1024, 1024, max_adapters=1, dtype="float16", device=0)
    a, b = matrices(rng, 64, 1024, 1024, "float16")
    weights.load(0, a, b)
    batch = LoraBatch(64, max_adapters=1, device=0)
    batch.update(np.zeros(64, np.int32))
    x, y = gpu.array(cases.normal(rng, (64, 1024), "float16")), gpu.array(np.zeros((64, 1024), np.float32))
    cupy.cuda.Device().synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        for _ in range(200):
            add_lora(y, x, weights, batch)
        weights.unload(0)
        assert weights.ranks == (0,)
        assert len(weights._retired) == 1
        memory, events = weights._retired[0]
        assert memory[0] is not None
        assert events
    stream.synchronize()
    assert all(event.done for event in events)
    weights.unload(0)
    assert weights._retired == []


@pytest.mark.gpu
def test_load_from_torch_and_host(gpu: engines.Engine) -> None:
    torch = pytest.importorskip("torch")
    weights = LoraWeights(32, 16, max_adapters=3, dtype="bfloat16", device=0)
    a, b = torch.randn(8, 32), torch.randn(16, 8)
    weights.load(0, a, b)
    weights.load(1, a.cuda(), b.cuda())
    weights.load(2, a.cuda().bfloat16(), b.bfloat16())
    torch.cuda.synchronize()
    first = [gpu.numpy(part) for part in (weights.slot(0)[0].a, weights.slot(0)[0].b)]
    for slot in (1, 2):
        (part,) = weights.slot(slot)
        tolerance.assert_same_bits(gpu.numpy(part.a), first[0])
        tolerance.assert_same_bits(gpu.numpy(part.b), first[1])


@pytest.mark.gpu
def test_load_is_refused_during_capture(gpu: engines.Engine) -> None:
    import cupy

    weights = LoraWeights(32, 16, max_adapters=1, dtype="float16", device=0)
    a, b = gpu.array(np.ones((8, 32), np.float16)), gpu.array(np.ones((16, 8), np.float16))
    weights.load(0, a, b)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        stream.begin_capture()
        try:
            with pytest.raises(ValueError, match="stream: expected one that captures no graph"):
                weights.load(0, a, b)
            with pytest.raises(ValueError, match="stream: expected one that captures no graph"):
                weights.unload(0)
        finally:
            stream.end_capture()
    assert weights.ranks == (8,)


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dtype": "float32"}, TypeError, "dtype: expected float16 or bfloat16, got float32"),
        ({"dtype": "half-ish"}, TypeError, "dtype: expected float16 or bfloat16, got 'half-ish'"),
        ({"in_features": 0}, ValueError, "in_features: expected an integer of at least 1, got 0"),
        ({"in_features": 8.0}, TypeError, "in_features: expected an integer, got float"),
        ({"out_features": (8, 0)}, ValueError, r"out_features\[1\]: expected an integer of at least 1, got 0"),
        ({"out_features": ()}, ValueError, "out_features: expected at least one slice, got none"),
        ({"max_adapters": 0}, ValueError, "max_adapters: expected an integer of at least 1, got 0"),
        ({"device": "cuda"}, ValueError, "device: expected None, 'cpu' or the number of a GPU, got 'cuda'"),
        ({"device": 1.0}, TypeError, "device: expected an integer, got float"),
        ({"device": 99}, ValueError, "device: expected .*, got 99"),
    ],
)
def test_weights_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    args = {"in_features": 8, "out_features": 8, "max_adapters": 2, "dtype": "float16", "device": "cpu"} | change
    with pytest.raises(error, match=message):
        LoraWeights(args.pop("in_features"), args.pop("out_features"), **args)


def half(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float16)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"slot": 3}, ValueError, "slot: expected an integer in 0 .. 2, got 3"),
        ({"slot": -1}, ValueError, "slot: expected an integer in 0 .. 2, got -1"),
        ({"slot": 1.0}, TypeError, "slot: expected an integer, got float"),
        ({"a": half(4, 31)}, ValueError, r"a: expected shape \(rank, 32\), got \(4, 31\)"),
        ({"a": half(4)}, ValueError, r"a: expected shape \(rank, 32\), got \(4,\)"),
        ({"b": half(16, 5)}, ValueError, r"b: expected shape \(16, 4\), got \(16, 5\)"),
        ({"b": half(15, 4)}, ValueError, r"b: expected shape \(16, 4\), got \(15, 4\)"),
        ({"a": half(0, 32), "b": half(16, 0)}, ValueError, "a: expected a rank of 1 to 1024, got 0"),
        ({"a": half(1025, 32), "b": half(16, 1025)}, ValueError, "a: expected a rank of 1 to 1024, got 1025"),
        ({"a": np.ones((4, 32), np.int32)}, TypeError, "a: expected dtype .*, got int32"),
        ({"a": 1.0}, TypeError, "a: expected an array .*, got float"),
        ({"a": [half(4, 32), half(4, 32)]}, ValueError, r"a: expected one array \(or None\) per slice \(1\), got 2"),
        ({"a": [None]}, ValueError, r"a\[0\]: expected an array, as b\[0\] is one, got None"),
        ({"b": [None]}, ValueError, r"b\[0\]: expected an array, as a\[0\] is one, got None"),
        ({"scale": "1"}, TypeError, "scale: expected a real number, got str"),
        ({"scale": [1.0, 2.0]}, ValueError, r"scale: expected one per slice \(1\), got 2"),
        ({"a": np.ones((4, 32), np.float32), "copy": False}, TypeError, "a: expected dtype float16, got float32"),
        ({"a": half(32, 4).T, "copy": False}, ValueError, "a: expected a C-contiguous array"),
        ({"b": half(17, 4).reshape(-1)[1:65].reshape(16, 4), "copy": False}, ValueError, "b: expected memory aligned"),
    ],
)
def test_load_arguments(engine: engines.Engine, change: dict[str, Any], error: type[Exception], message: str) -> None:
    weights = LoraWeights(32, 16, max_adapters=3, dtype="float16", device=engine.device)
    weights.load(1, half(4, 32), half(16, 4))
    before = engine.numpy(weights.table).tobytes()
    args = {"slot": 1, "a": half(4, 32), "b": half(16, 4)} | change
    if engine.name == "gpu" and args.get("copy") is False:
        args = {key: engine.array(value) if isinstance(value, np.ndarray) else value for key, value in args.items()}
        if not change.keys() & {"b"} and "C-contiguous" in message:
            args["a"] = args["a"].T.copy().T
        if "aligned" in message:
            args["b"] = engine.array(half(17, 4)).reshape(-1)[1:65].reshape(16, 4)
    with pytest.raises(error, match=message):
        weights.load(args.pop("slot"), args.pop("a"), args.pop("b"), **args)
    assert engine.numpy(weights.table).tobytes() == before
    assert weights.ranks == (0, 4, 0)


@pytest.mark.parametrize(("slot", "error"), [(3, ValueError), (-1, ValueError), ("0", TypeError), (None, TypeError)])
def test_unload_arguments(slot: Any, error: type[Exception]) -> None:
    weights = LoraWeights(32, 16, max_adapters=3, dtype="float16", device="cpu")
    with pytest.raises(error, match="slot: expected an integer"):
        weights.unload(slot)
