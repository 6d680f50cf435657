"""LoraBatch: the tiles that every engine builds, against the indices they came from; bad input."""

from __future__ import annotations

from typing import Any

import cases
import engines
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cupy_lora import LoraBatch, add_lora
from cupy_lora.lora_batch import TILE_HEADER, tile_capacity, tile_heights


def check_tiles(engine: engines.Engine, batch: LoraBatch, indices: np.ndarray, slots: int) -> None:
    """Each row with an adapter is in exactly one tile, of its slot; the order is fixed."""
    counters = engine.numpy(batch.counters)
    valid = cases.valid(indices, slots)
    for at, height in enumerate(batch.heights):
        count = int(counters[at])
        tiles = engine.numpy(batch.tiles[height])[:count]
        assert tiles.shape == (count, TILE_HEADER + height)
        occurring, number = np.unique(indices[valid], return_counts=True)
        assert count == int((-(-number // height)).sum())
        assert (np.diff(tiles[:, 0]) >= 0).all()
        seen = []
        for tile in tiles:
            slot, rows = int(tile[0]), int(tile[1])
            assert 1 <= rows <= height
            listed = tile[TILE_HEADER:]
            assert (indices[listed[:rows]] == slot).all()
            seen += listed[:rows].tolist()
        assert sorted(seen) == np.flatnonzero(valid).tolist()
        for slot in occurring:
            own = [row for tile in tiles if tile[0] == slot for row in tile[TILE_HEADER : TILE_HEADER + tile[1]]]
            assert own == sorted(own)
            full = [tile[1] for tile in tiles if tile[0] == slot][:-1]
            assert all(rows == height for rows in full)


@pytest.mark.parametrize("pattern", cases.PATTERNS)
@pytest.mark.parametrize(("tokens", "slots"), [(1, 1), (13, 5), (64, 64), (200, 3), (300, 40)])
def test_tiles(kernels: engines.Engine, pattern: str, tokens: int, slots: int) -> None:
    indices = cases.index_pattern(pattern, tokens, slots, np.random.default_rng(tokens))
    batch = LoraBatch(tokens + 3, max_adapters=slots, device=kernels.device)
    batch.update(kernels.array(indices.astype(np.int32)))
    check_tiles(kernels, batch, indices, slots)
    assert batch.num_tokens == tokens


@pytest.mark.parametrize("side", ["host", "device"])
@pytest.mark.parametrize("index", ["int32", "int64"])
def test_updates_of_any_size_in_turn(kernels: engines.Engine, side: str, index: str) -> None:
    """Larger, smaller, empty: nothing of an earlier batch is left over."""
    rng = np.random.default_rng(3)
    batch = LoraBatch(300, max_adapters=9, device=kernels.device)
    lists = dict(batch.tiles)
    for tokens in (300, 7, 0, 65, 1, 300, 0):
        indices = rng.integers(-2, 11, tokens).astype(index)
        batch.update(indices if side == "host" else kernels.array(indices))
        check_tiles(kernels, batch, indices.astype(np.int64), 9)
        assert batch.num_tokens == tokens
    for height, tiles in lists.items():
        assert batch.tiles[height] is tiles


def test_segments(kernels: engines.Engine) -> None:
    batch = LoraBatch(400, max_adapters=6, device=kernels.device)
    cases_of = [
        ([0, 10, 10, 25, 300], [2, 5, -1, 0]),
        ([0, 1], [3]),
        ([5, 9, 260, 400], [1, 1, 7]),
        ([0], []),
        ([0, 0, 0], [1, 2]),
        ([0, 8, 16, 24, 32], [0, 0, 0, 0]),
        ([0, 16, 32], [1, 0]),  # a row past the last segment would begin a tile of its own
        ([0, 4, 20, 36, 40], [6, 0, 6, 1]),
    ]
    for indptr, slots in cases_of:
        rows = indptr[-1]
        per_row = np.full(rows, -1)
        for i, slot in enumerate(slots):
            per_row[indptr[i] : indptr[i + 1]] = slot
        for index in ("int32", "int64"):
            pointers, owners = np.array(indptr, index), np.array(slots, index)
            batch.update_segments(pointers, owners)
            check_tiles(kernels, batch, per_row, 6)
            assert batch.num_tokens == rows
            batch.update_segments(kernels.array(pointers), kernels.array(owners), num_tokens=rows)
            check_tiles(kernels, batch, per_row, 6)
            batch.update_segments(pointers, owners, num_tokens=400)
            check_tiles(kernels, batch, np.append(per_row, np.full(400 - rows, -1)), 6)


@settings(max_examples=40)
@given(st.data())
@pytest.mark.gpu
def test_fuzz_on_the_gpu(data: st.DataObject) -> None:
    fuzz("gpu", data, 9000)


@settings(max_examples=25)
@given(st.data())
@pytest.mark.simt
def test_fuzz_on_the_cpu_runner(data: st.DataObject) -> None:
    fuzz("simt", data, 700)


def fuzz(name: str, data: st.DataObject, most: int) -> None:
    tokens = data.draw(st.integers(0, most), "tokens")
    slots = data.draw(st.integers(1, 300), "slots")
    pattern = data.draw(st.sampled_from(cases.PATTERNS), "pattern")
    indices = cases.index_pattern(pattern, tokens, slots, np.random.default_rng(data.draw(st.integers(0, 99), "seed")))
    with engines.running(name) as engine:
        batch = LoraBatch(most, max_adapters=slots, device=engine.device)
        batch.update(engine.array(indices))
        check_tiles(engine, batch, indices, slots)


@given(tokens=st.integers(1, 10_000), slots=st.integers(1, 3000), height=st.sampled_from((8, 16, 32, 64)))
def test_capacity_holds_the_worst_case(tokens: int, slots: int, height: int) -> None:
    """Most tiles: as many slots as can be with one row more than full tiles."""
    used = min(tokens, slots)
    worst = used + (tokens - used) // height
    assert worst <= tile_capacity(tokens, slots, height) <= tokens


def test_heights_are_ascending() -> None:
    for tokens in (1, 8, 255, 256, 257, 8192):
        heights = tile_heights(tokens)
        assert heights[0] == 8
        assert list(heights) == sorted(heights)


def test_numpy_indices() -> None:
    batch = LoraBatch(6, max_adapters=3, device="cpu")
    assert batch.num_tokens == 0
    batch.update(np.array([0, -5, 2, 3, 2**40, 1]))
    assert batch.indices.tolist() == [0, -1, 2, -1, -1, 1]
    batch.update(np.array([1, 2], np.int32))
    assert batch.num_tokens == 2
    assert batch.indices[:2].tolist() == [1, 2]
    batch.update_segments(np.array([1, 3, 4]), np.array([2, -1]), num_tokens=6)
    assert batch.num_tokens == 6
    assert batch.indices.tolist() == [-1, 2, 2, -1, -1, -1]


def test_host_indices_may_change_after_the_call(engine: engines.Engine) -> None:
    case = cases.Case(12, 128, (64,), (16, 16, 16), "random")
    data = cases.build(case)
    weights, batch = cases.load(data, engine.device, engine.array)
    indices = np.array(data.indices)
    batch.update(indices)
    indices[:] = 99
    y = engine.array(data.y)
    add_lora(y, engine.array(data.x), weights, batch)
    cases.assert_added(engine.numpy(y), data)


def test_debug_names_the_bad_row(engine: engines.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = LoraBatch(8, max_adapters=4, device=engine.device)
    good, bad = np.array([0, 3, -1, 2]), np.array([0, 3, 4, 7])
    batch.update(engine.array(bad))
    monkeypatch.setenv("CUPY_LORA_DEBUG", "1")
    batch.update(engine.array(good))
    with pytest.raises(ValueError, match=r"indices: expected slots below 4 .*, got 4 in row 2"):
        batch.update(engine.array(bad))
    with pytest.raises(ValueError, match=r"slots: expected slots below 4 .*, got 9 in row 1"):
        batch.update_segments(engine.array(np.array([0, 1, 2])), engine.array(np.array([0, 9])), num_tokens=2)
    assert batch.num_tokens == 4


@pytest.mark.gpu
def test_host_indices_are_refused_during_capture(gpu: engines.Engine) -> None:
    import cupy

    batch = LoraBatch(8, max_adapters=4, device=0)
    batch.update(np.zeros(8, np.int32))
    with cupy.cuda.Stream(non_blocking=True) as stream:
        stream.begin_capture()
        try:
            with pytest.raises(ValueError, match="indices: expected an array on the device while a graph is captured"):
                batch.update(np.zeros(8, np.int32))
        finally:
            stream.end_capture()


def test_more_adapters_than_a_block_can_count() -> None:
    """Refused when the device side is made, not by a launch that fails."""
    LoraBatch(1024, max_adapters=4096, device="cpu").prepare()
    with pytest.raises(ValueError, match="max_adapters: expected at most about 4224 on a GPU, got 5000"):
        LoraBatch(1024, max_adapters=5000, device="cpu").prepare()


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"max_tokens": 0}, ValueError, "max_tokens: expected an integer in 1 .. 2147483647, got 0"),
        ({"max_tokens": 2.5}, TypeError, "max_tokens: expected an integer, got float"),
        ({"max_adapters": -1}, ValueError, "max_adapters: expected an integer in 1 .. 2147483647, got -1"),
        ({"device": "gpu"}, ValueError, "device: expected None, 'cpu' or the number of a GPU, got 'gpu'"),
    ],
)
def test_batch_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    args = {"max_tokens": 4, "max_adapters": 2, "device": "cpu"} | change
    with pytest.raises(error, match=message):
        LoraBatch(args.pop("max_tokens"), **args)


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        (np.zeros(5, np.int32), ValueError, r"indices: expected at most 4 rows \(max_tokens of the batch\), got 5"),
        (np.zeros(4, np.float32), TypeError, "indices: expected dtype int32 or int64, got float32"),
        (np.zeros(4, np.uint8), TypeError, "indices: expected dtype int32 or int64, got uint8"),
        (np.zeros((2, 2), np.int32), ValueError, r"indices: expected shape \(n\), got \(2, 2\)"),
        (np.zeros(8, np.int32)[::2], ValueError, "indices: expected a C-contiguous array"),
        ([0, 1], TypeError, "indices: expected an array .*, got list"),
    ],
)
def test_update_arguments(engine: engines.Engine, indices: Any, error: type[Exception], message: str) -> None:
    batch = LoraBatch(4, max_adapters=2, device=engine.device)
    batch.update(engine.array(np.array([1, 0], np.int32)))
    before = engine.numpy(batch.indices).tobytes()
    with pytest.raises(error, match=message):
        batch.update(indices)
    assert batch.num_tokens == 2
    assert engine.numpy(batch.indices).tobytes() == before


@pytest.mark.parametrize(
    ("indptr", "slots", "options", "error", "message"),
    [
        ([0, 2, 5], [0, 1], {}, ValueError, r"indptr: expected at most 4 rows \(max_tokens of the batch\), got 5"),
        ([0, 2, 1], [0, 1], {}, ValueError, "indptr: expected entries that do not decrease, got 2 then 1 at 1"),
        ([-1, 2, 3], [0, 1], {}, ValueError, "indptr: expected a first entry of at least 0, got -1"),
        ([0, 2], [0, 1], {}, ValueError, r"indptr: expected one entry more than slots \(3\), got 2"),
        ([0, 0, 0, 0, 0, 1], [0] * 5, {}, ValueError, r"slots: expected at most 4 segments \(max_tokens\), got 5"),
        ([0, 2, 3], [0.0, 1.0], {}, TypeError, "slots: expected dtype int32 or int64, got float64"),
        ([0.0, 2.0, 3.0], [0, 1], {}, TypeError, "indptr: expected dtype int32 or int64, got float64"),
        ([0, 2, 3], [0, 1], {"num_tokens": 2}, ValueError, r"indptr: expected at most num_tokens \(2\) rows, got 3"),
        ([0, 2, 3], [0, 1], {"num_tokens": 5}, ValueError, "num_tokens: expected an integer in 0 .. 4, got 5"),
    ],
)
def test_update_segments_arguments(
    engine: engines.Engine,
    indptr: list[Any],
    slots: list[Any],
    options: dict[str, int],
    error: type[Exception],
    message: str,
) -> None:
    batch = LoraBatch(4, max_adapters=2, device=engine.device)
    batch.update(engine.array(np.array([1, 0], np.int32)))
    with pytest.raises(error, match=message):
        batch.update_segments(np.array(indptr), np.array(slots), **options)
    assert batch.num_tokens == 2


@pytest.mark.gpu
def test_update_on_the_wrong_side(gpu: engines.Engine) -> None:
    on_host = LoraBatch(4, max_adapters=2, device="cpu")
    with pytest.raises(ValueError, match=r"indices: expected an array on the same device as batch \(the host\)"):
        on_host.update(gpu.array(np.zeros(4, np.int32)))
    batch = LoraBatch(4, max_adapters=2, device=0)
    indptr, slots = np.array([0, 2, 3]), np.array([0, 1])
    with pytest.raises(ValueError, match="slots: expected an array on the same device as indptr"):
        batch.update_segments(gpu.array(indptr), slots)
    with pytest.raises(ValueError, match="num_tokens: expected the number of rows"):
        batch.update_segments(gpu.array(indptr), gpu.array(slots))
