"""The benchmark of a LoRA layer: its cases, the bytes that they must move, and checks that can fail."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bench import bench_lora, bench_lora_batch, targets
from bench.bench_lora import Layer
from bench.harness import BFLOAT16, DryRig


@pytest.mark.parametrize("name", targets.LORA)
def test_lora_bytes_are_those_of_record(name):
    case = {case.name: case for case in bench_lora.cases()}[name]
    record = targets.LORA_MB[name]
    assert case.nbytes / 1e6 == pytest.approx(record, abs=0.06 if record < 100 else 0.6)
    assert case.quick
    assert case.target == targets.LORA[name].target


def test_layer_bytes_by_hand():
    # 4 rows of adapters 0, 0, 1, none; ranks 8 and 16; two slices.
    layer = Layer(4, (8, 16), "half uniform 2", 32, (48, 16))
    slots = bench_lora.slots_of(layer)
    assert sorted(slots) == [-1, -1, 0, 0]  # every second token of 0, 1, 0, 1 keeps slot 0
    weights = 8 * (2 * 32) + (48 + 16) * 8
    rows = 2 * (32 + 2 * 64)
    assert bench_lora.layer_bytes(layer) == 2 * (weights + rows)


@pytest.mark.parametrize(
    ("pattern", "tokens", "sizes"),
    [
        ("distinct", 5, [1] * 5),
        ("one", 5, [5]),
        ("none", 5, []),
        ("uniform 3", 7, [3, 2, 2]),
        ("zipf", 64, [1, 2, 3, 4, 6, 8, 12, 18, 10]),
        ("seq 4", 10, [4, 4, 2]),
        ("half seq 2", 8, [2, 2]),
        ("half distinct", 6, [1, 1, 1]),
    ],
)
def test_patterns(pattern, tokens, sizes):
    slots = bench_lora.slots_of(Layer(tokens, pattern=pattern))
    assert slots.shape == (tokens,)
    assert slots.dtype == np.int32
    counts = np.bincount(slots[slots >= 0]).tolist()
    assert counts == sizes
    if not pattern.startswith("half") and pattern != "none":
        assert slots.min() == 0
    assert np.array_equal(slots, bench_lora.slots_of(Layer(tokens, pattern=pattern)))


def test_prefill_rows_are_contiguous_and_decode_rows_are_not():
    assert (np.diff(bench_lora.slots_of(Layer(64, pattern="seq 16"))) >= 0).all()
    assert (np.diff(bench_lora.slots_of(Layer(64, pattern="uniform 8"))) < 0).any()


def test_an_unknown_pattern_is_an_error():
    with pytest.raises(ValueError, match="pattern: expected one of"):
        bench_lora.slots_of(Layer(4, pattern="random"))


def test_the_case_list_covers_the_shapes_that_matter():
    layers = [case.params for case in bench_lora.cases()]
    for width in (2048, 3584, 5120, 8192, 11008, 14336):
        assert any(layer.in_features == width and layer.out_features == (4096,) for layer in layers)
        assert any(layer.in_features == 4096 and layer.out_features == (width,) for layer in layers)
    assert {4, 8, 16, 32, 64, 128, 256} <= {rank for layer in layers for rank in layer.ranks}
    assert {1, 512} <= {layer.tokens for layer in layers if "seq" not in layer.pattern}
    assert {128, 16384} <= {layer.tokens for layer in layers if "seq" in layer.pattern}
    assert any(len(set(layer.ranks)) > 1 for layer in layers)
    kinds = {layer.pattern.split(" ")[0] for layer in layers}
    assert {"distinct", "uniform", "zipf", "one", "half", "none", "seq"} <= kinds
    updates = bench_lora_batch.cases()
    assert {case.params.tokens for case in updates} >= {1, 64, 256, 8192}
    assert all(case.target == (3.0 if case.params.tokens <= 256 else 6.0) for case in updates if case.quick)


# -- correctness checks can fail


def _broken(layer: Layer, spoil):
    rig = DryRig()
    data = bench_lora.build_set(layer, rig, bench_lora.build_batch(layer, rig))
    call = bench_lora.layer_calls([data])[0]

    def spoiled():
        call()
        spoil(data.y)

    return rig, data, call, spoiled


def test_the_layer_check_sees_one_wrong_element():
    layer = Layer(6, (4, 8), "distinct", 64, (48, 16))

    def spoil(y):
        y[5, 60] += BFLOAT16.type(0.05)

    rig, data, call, spoiled = _broken(layer, spoil)
    assert bench_lora.check_layer(layer, rig, data, call) <= 1.0
    assert bench_lora.check_layer(layer, rig, data, spoiled) > 1.0


def test_the_layer_check_sees_nan_and_touched_idle_rows():
    layer = Layer(6, (4,), "half distinct", 64, (48,))
    slots = bench_lora.slots_of(layer)

    def nan(y):
        y[np.flatnonzero(slots >= 0)[0], 0] = np.nan

    def touch(y):
        y[np.flatnonzero(slots < 0)[0], 0] += BFLOAT16.type(1)

    rig, data, _, spoiled = _broken(layer, nan)
    assert bench_lora.check_layer(layer, rig, data, spoiled) == math.inf
    rig, data, _, spoiled = _broken(layer, touch)
    with pytest.raises(AssertionError, match="without an adapter changed"):
        bench_lora.check_layer(layer, rig, data, spoiled)


def test_the_loose_check_allows_a_rounded_delta_and_no_more():
    layer = Layer(6, (16,), "one", 64, (48,))

    def check(change):
        rig, data, _, _ = _broken(layer, None)
        a, b = (data_[0][0].astype(np.float64) for data_ in (data.a, data.b))
        delta = bench_lora.scale_of(0) * (data.x.astype(np.float64) @ a.T) @ b.T

        def call():
            data.y[...] = data.y + change(delta).astype(BFLOAT16)

        return bench_lora.check_layer_loosely(layer, rig, data, call)

    assert check(lambda delta: delta) <= 1.0
    assert check(lambda delta: delta * 1.1) > 1.0
    assert check(lambda delta: delta * 0) > 1.0
