"""prepare_decode_step: what it does at once is what the separate calls do, on every engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from engines import Engine
from metadata_cases import I32, I64, NEVER, WIDTHS, cumulative, table_of

import cupy_lora
from cupy_lora import metadata


@pytest.mark.parametrize("dtype", WIDTHS)
@pytest.mark.parametrize("speculative", [0, 3])
def test_decode_step_is_the_separate_calls(engine: Engine, speculative: int, dtype: np.dtype):
    rng = np.random.default_rng(speculative)
    batch, width = 37, 2100
    cached = rng.integers(0, width - speculative, batch).tolist()
    new = rng.integers(1, 2 + speculative, batch).tolist()
    table = table_of(rng, batch, width, I32)
    cu_slots = cumulative([width] * batch, dtype)
    tokens, total = sum(new), sum(new) + sum(cached)
    positions, indices = (engine.array(np.full(tokens + 2, NEVER, d)) for d in (I32, dtype))
    ragged = engine.array(np.full(total + 5, NEVER, I32))
    sums = [engine.array(np.full(batch + 1, NEVER, I32)) for _ in range(2)]
    lengths = [engine.array(np.array(part, dtype)) for part in (new, cached)]
    metadata.prepare_decode_step(
        block_tables=engine.array(table), input_lengths=lengths[0], cache_lengths=lengths[1],
        cu_slots=engine.array(cu_slots), position_ids=positions, slot_indices=indices, block_tables_ragged=ragged,
        max_current_length=width, cu_seqlen=sums[0], ragged_indptr=sums[1],
    )  # fmt: skip
    assert engine.numpy(sums[0]).tolist() == cumulative(new, I64).tolist()
    assert engine.numpy(sums[1]).tolist() == cumulative([n + c for n, c in zip(new, cached, strict=True)], I64).tolist()
    expected_positions, expected_slots, expected_ragged = [], [], []
    for b in range(batch):
        for i in range(new[b]):
            expected_positions.append(cached[b] + i)
            expected_slots.append(int(cu_slots[b]) + cached[b] + i)
        expected_ragged += table[b, : new[b] + cached[b]].tolist()
    assert engine.numpy(positions).tolist() == [*expected_positions, NEVER, NEVER]
    assert engine.numpy(indices).tolist() == [*expected_slots, NEVER, NEVER]
    assert engine.numpy(ragged).tolist() == expected_ragged + [NEVER] * 5


@pytest.mark.parametrize("dtype", WIDTHS)
@pytest.mark.parametrize("sequences", [3, 300])
def test_decode_step_sets_the_batch_as_its_update_does(engine: Engine, sequences: int, dtype: np.dtype):
    """The schedule in the same launch: the tiles of LoraBatch.update, bit for bit, call after call."""
    rng = np.random.default_rng(sequences)
    alone, fused = (cupy_lora.LoraBatch(512, max_adapters=7, device=engine.device) for _ in range(2))
    table, ones = engine.array(table_of(rng, sequences, 40, I32)), engine.array(np.ones(sequences, I32))
    cu_slots = engine.array(cumulative([40] * sequences, I64))
    for _ in range(2):
        cached = rng.integers(0, 39, sequences)
        slots = engine.array(rng.integers(-2, 9, sequences).astype(dtype))
        positions, indices = (engine.array(np.full(sequences, NEVER, I64)) for _ in range(2))
        ragged = engine.array(np.full(int(cached.sum()) + sequences, NEVER, I32))
        alone.update(slots)
        metadata.prepare_decode_step(
            block_tables=table, input_lengths=ones, cache_lengths=engine.array(cached.astype(I32)), cu_slots=cu_slots,
            position_ids=positions, slot_indices=indices, block_tables_ragged=ragged, max_current_length=40,
            batch=fused, adapter_indices=slots,
        )  # fmt: skip
        assert fused.num_tokens == sequences
        assert fused.tile_counts == alone.tile_counts
        if engine.name == "numpy":
            assert (engine.numpy(fused.indices) == engine.numpy(alone.indices)).all()
        else:
            counts = engine.numpy(alone.counters)
            assert counts[: len(alone.heights)].tolist() == engine.numpy(fused.counters)[: len(alone.heights)].tolist()
            for at, height in enumerate(alone.heights):
                one, two = (engine.numpy(b.tiles[height])[: counts[at]] for b in (alone, fused))
                for tile, other in zip(one, two, strict=True):
                    assert tile[:2].tolist() == other[:2].tolist()
                    assert tile[8 : 8 + tile[1]].tolist() == other[8 : 8 + tile[1]].tolist()
        assert engine.numpy(positions).tolist() == cached.tolist()
        assert NEVER not in engine.numpy(ragged)


def test_decode_step_sets_the_batch_after_a_time_without_kernels(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    """What a call kept while the environment turned the LoRA kernels off is not what a later one runs."""
    batch = cupy_lora.LoraBatch(8, max_adapters=4, device=engine.device)
    slots = engine.array(np.array([3, 1, -1], I32))
    arrays = {
        "block_tables": engine.array(np.zeros((3, 4), I32)), "input_lengths": engine.array(np.ones(3, I32)),
        **{name: engine.array(np.zeros(3, I32)) for name in ("cache_lengths", "cu_slots", "position_ids")},
        **{name: engine.array(np.zeros(3, I32)) for name in ("slot_indices", "block_tables_ragged")},
    }  # fmt: skip

    def step() -> None:
        metadata.prepare_decode_step(**arrays, max_current_length=1, batch=batch, adapter_indices=slots)

    with monkeypatch.context() as patch:
        patch.setenv("DISABLE_SGMV", "1")
        step()
        assert engine.numpy(batch.indices)[:3].tolist() == [3, 1, -1]
    step()
    if engine.name != "numpy":
        assert engine.numpy(batch.counters)[: len(batch.heights)].tolist() == [2] * len(batch.heights)


def test_decode_step_names_what_is_wrong_with_the_batch():
    batch = cupy_lora.LoraBatch(2, max_adapters=2, device="cpu")
    three = np.zeros(3, I32)
    arguments: dict[str, Any] = {
        "block_tables": np.zeros((3, 4), I32), "input_lengths": three, "cache_lengths": three, "cu_slots": three,
        "position_ids": three.copy(), "slot_indices": three.copy(), "block_tables_ragged": three.copy(),
        "max_current_length": 4,
    }  # fmt: skip
    with pytest.raises(ValueError, match="batch and adapter_indices: expected both or none"):
        metadata.prepare_decode_step(**arguments, batch=batch)
    with pytest.raises(ValueError, match="indices: expected at most 2 rows"):
        metadata.prepare_decode_step(**arguments, batch=batch, adapter_indices=three)
    with pytest.raises(TypeError, match="adapter_indices: expected dtype int32 or int64, got float32"):
        metadata.prepare_decode_step(**arguments, batch=batch, adapter_indices=np.zeros(2, np.float32))
    with pytest.raises(TypeError, match="max_current_length: expected an integer"):
        metadata.prepare_decode_step(**{**arguments, "max_current_length": 4.0}, batch=batch, adapter_indices=three[:2])
    assert batch.num_tokens == 0


def test_decode_step_without_the_sums_and_with_short_outputs(engine: Engine):
    """Outputs that are too short are filled and not overrun."""
    positions, indices, ragged = (engine.array(np.full(n, NEVER, I32)) for n in (2, 2, 4))
    metadata.prepare_decode_step(
        block_tables=engine.array(np.arange(9, dtype=I32).reshape(3, 3)), input_lengths=engine.array(np.ones(3, I32)),
        cache_lengths=engine.array(np.array([1, 2, 0], I32)), cu_slots=engine.array(np.array([0, 10, 20], I32)),
        position_ids=positions, slot_indices=indices, block_tables_ragged=ragged, max_current_length=3,
    )  # fmt: skip
    assert engine.numpy(positions).tolist() == [1, 2]
    assert engine.numpy(indices).tolist() == [1, 12]
    assert engine.numpy(ragged).tolist() == [0, 1, 3, 4]


@pytest.mark.gpu
def test_a_whole_step_is_captured_once_and_follows_its_inputs(gpu: Engine):
    import cupy

    batch, width = 8, 64
    rng = np.random.default_rng(6)
    table = gpu.array(table_of(rng, batch, width, I32))
    ones, cached = gpu.array(np.ones(batch, I32)), gpu.array(np.zeros(batch, I32))
    cu_slots = gpu.array(cumulative([width] * batch, I64))
    positions, indices = cupy.zeros(batch, I32), cupy.zeros(batch, I64)
    ragged = cupy.zeros(batch * width, I32)

    def step() -> None:
        metadata.prepare_decode_step(
            block_tables=table, input_lengths=ones, cache_lengths=cached, cu_slots=cu_slots, position_ids=positions,
            slot_indices=indices, block_tables_ragged=ragged, max_current_length=width,
        )  # fmt: skip

    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        step()
        stream.begin_capture()
        step()
        graph = stream.end_capture()
        for length in (3, 40):
            cached.fill(length)
            graph.launch(stream)
            stream.synchronize()
            assert (positions.get() == length).all()
            assert (ragged.get()[: batch * (length + 1)].reshape(batch, -1) == table.get()[:, : length + 1]).all()
