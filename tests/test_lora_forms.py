"""The LoRA kernels as GPUs of another kind run them: no clusters, blocks that walk over many tiles. Same bits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from simt.devices import on_cpu

import cupy_lora

pytestmark = pytest.mark.simt

Run = Callable[..., np.ndarray]


def add_lora(rank: int, **device: int) -> np.ndarray:
    rng = np.random.default_rng(21)
    wide, outs, adapters, tokens = 264, (136, 64), 3, 44
    slots = rng.integers(-1, adapters, tokens)
    a = rng.standard_normal((adapters, len(outs), rank, wide)).astype(np.float16)
    b = [rng.standard_normal((adapters, n, rank)).astype(np.float16) for n in outs]
    x, y = rng.standard_normal((tokens, wide)).astype(np.float16), rng.standard_normal((tokens, sum(outs)))
    with on_cpu(**device) as engine:
        weights = cupy_lora.LoraWeights(wide, outs, max_adapters=adapters, dtype="float16", device="cpu")
        for slot in range(adapters):
            weights.load(
                slot, [engine.array(m) for m in a[slot]], [engine.array(m[slot]) for m in b], scale=0.5, copy=False
            )
        batch = cupy_lora.LoraBatch(tokens, max_adapters=adapters, device="cpu")
        batch.update(engine.array(slots))
        out = engine.array(y.astype(np.float32))
        cupy_lora.add_lora(out, engine.array(x), weights, batch)
    return np.array(out)


def bgmv(rank: int, **device: int) -> np.ndarray:
    rng = np.random.default_rng(22)
    tokens, wide, adapters = 5, 264, 3
    a = rng.standard_normal((adapters, rank, wide)).astype(np.float16)
    b = rng.standard_normal((adapters, wide, rank)).astype(np.float16)
    x, slots = rng.standard_normal((tokens, wide)).astype(np.float16), rng.integers(-1, adapters, tokens)
    with on_cpu(**device) as engine:
        v, y = engine.array(np.zeros((tokens, rank), np.float32)), engine.array(x.copy())
        cupy_lora.bgmv_shrink(engine.array(x), engine.array(a), v, engine.array(slots))
        cupy_lora.bgmv_expand(v, engine.array(b), y, engine.array(slots))
    return np.concatenate([v.ravel(), y.astype(np.float32).ravel()])


def sgmv(rank: int, **device: int) -> np.ndarray:
    rng = np.random.default_rng(23)
    lengths, wide, adapters = np.array([19, 0, 3, 11, 1], np.int64), 264, 3
    starts, slots = np.cumsum(lengths) - lengths, np.array([2, 0, 1, 2, -1])
    tokens = int(lengths.sum())
    a = rng.standard_normal((adapters, rank, wide)).astype(np.float16)
    b = rng.standard_normal((adapters, wide, rank)).astype(np.float16)
    x = rng.standard_normal((tokens, wide)).astype(np.float16)
    with on_cpu(**device) as engine:
        v, y = engine.array(np.zeros((tokens, rank), np.float32)), engine.array(x.copy())
        segments = [engine.array(part) for part in (starts, lengths, slots)]
        cupy_lora.sgmv_shrink(engine.array(x), engine.array(a), v, *segments, len(lengths), 19, 1.0)
        cupy_lora.sgmv_expand(v, engine.array(b), y, *segments, len(lengths), 19, add_inputs=True)
    return np.concatenate([v.ravel(), y.astype(np.float32).ravel()])


@pytest.mark.parametrize("rank", [16, 40, 100])
@pytest.mark.parametrize(
    ("op", "device"),
    [
        (add_lora, {"arch": 80}),
        (add_lora, {"clusters": 1}),
        (add_lora, {"arch": 80, "clusters": 1}),
        (bgmv, {"arch": 80}),
        (sgmv, {"arch": 80}),
        (sgmv, {"clusters": 1}),
        (sgmv, {"arch": 80, "clusters": 1}),
    ],
    ids=lambda value: getattr(value, "__name__", None) or "-".join(f"{k}{v}" for k, v in value.items()),
)
def test_same_bits_on_every_kind_of_gpu(op: Run, device: dict[str, int], rank: int) -> None:
    np.testing.assert_array_equal(op(rank, **device).view(np.uint32), op(rank).view(np.uint32))
