"""add_lora on every engine: values, bits, kept plans, bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cases
import engines
import numpy as np
import pytest
import tolerance
from hypothesis import given, settings
from hypothesis import strategies as st

from cupy_lora import LoraBatch, LoraWeights, add_lora

CASES = cases.ADD_LORA + cases.ADD_LORA_LARGE


def run(engine: engines.Engine, case: cases.Case) -> np.ndarray:
    """y after add_lora, checked against the exact result; what surrounds x and y is checked too."""
    data = cases.build(case)
    weights, batch = cases.load(data, engine.device, engine.array)
    x = cases.framed(engine, data.x, case)
    y = cases.framed(engine, data.y, case)
    assert add_lora(y.view, x.view, weights, batch, scale=case.scale) is y.view
    x.check(engine, "x")
    result = y.check(engine, "y")
    cases.assert_added(result, data)
    start = 0
    for part, width in enumerate(case.outs):
        has = np.array([bool(case.rank_of(slot, part)) for slot in range(len(case.ranks))])
        valid = cases.valid(data.indices, len(case.ranks))
        bare = ~(valid & has[np.where(valid, data.indices, 0)])
        columns = slice(start, start + width)
        tolerance.assert_same_bits(result[bare, columns], data.y[bare, columns], "rows without an adapter")
        start += width
    return result


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_add_lora(engine: engines.Engine, case: cases.Case) -> None:
    engines.skip_large(engine, case.small)
    run(engine, case)


def draw_case(data: st.DataObject, largest: int) -> cases.Case:
    slots = data.draw(st.integers(1, 6), "slots")
    outs = tuple(data.draw(st.lists(st.integers(1, largest), min_size=1, max_size=3), "outs"))
    rank = st.one_of(st.sampled_from((0, 8, 16, 32, 64)), st.integers(1, 256))
    dtype = data.draw(st.sampled_from(("float16", "bfloat16")), "dtype")
    return cases.Case(
        tokens=data.draw(st.integers(0, 90), "tokens"),
        in_features=data.draw(st.one_of(st.integers(1, largest), st.sampled_from((64, 128, 2048, 4096))), "in"),
        outs=outs,
        ranks=tuple(data.draw(st.tuples(*(rank for _ in outs))) for _ in range(slots)),
        pattern=data.draw(st.sampled_from(cases.PATTERNS), "pattern"),
        dtype=dtype,
        out=data.draw(st.sampled_from((dtype, "float32")), "out"),
        pad=data.draw(st.sampled_from(((0, 0), (8, 8), (1, 0), (0, 3))), "pad"),
        scale=data.draw(st.sampled_from((1.0, -0.25, 8.0)), "scale"),
        index=data.draw(st.sampled_from(("int32", "int64")), "index"),
    )


@given(data=st.data())
def test_fuzz(data: st.DataObject) -> None:
    with engines.running("numpy") as engine:
        run(engine, draw_case(data, 150))


@pytest.mark.gpu
@settings(max_examples=60)
@given(data=st.data())
def test_fuzz_on_the_gpu(data: st.DataObject) -> None:
    with engines.running("gpu") as engine:
        run(engine, draw_case(data, 700))


# ---------------------------------------------------------------------------------------- bits

BITS = [
    cases.Case(9, 256, (128,), (16, 16, 16), "random"),
    cases.Case(9, 256, (128,), (8, 16, 32, 64), "random", "float16", "float32"),
    cases.Case(40, 128, (64, 32), (16, 8), "runs", "float16", "float16"),
]
BITS_LARGE = [
    cases.Case(64, 4096, (4096,), (16,) * 8, "random", small=False),
    cases.Case(300, 4096, (1024, 512), (64, 16, 8, 33), "random", small=False),
]


def apply(
    engine: engines.Engine, data: cases.Data, rows: np.ndarray, weights: LoraWeights, out: np.ndarray | None = None
) -> np.ndarray:
    """add_lora over these rows only, in this order, in a batch of their own."""
    batch = LoraBatch(len(rows), max_adapters=len(data.case.ranks), device=engine.device)
    batch.update(engine.array(data.indices[rows]))
    y = engine.array(data.y[rows] if out is None else out)
    add_lora(y, engine.array(data.x[rows]), weights, batch, scale=data.case.scale)
    return engine.numpy(y)


@pytest.mark.parametrize("case", BITS + BITS_LARGE, ids=lambda case: case.id)
def test_a_row_does_not_depend_on_its_batch(kernels: engines.Engine, case: cases.Case) -> None:
    """Alone, reversed, doubled and at any place of a longer batch: the same bits."""
    engines.skip_large(kernels, case.small)
    data = cases.build(case)
    weights, _ = cases.load(data, kernels.device, kernels.array)
    every = np.arange(case.tokens)
    whole = apply(kernels, data, every, weights)
    tolerance.assert_same_bits(apply(kernels, data, every, weights), whole, "the same again")
    tolerance.assert_same_bits(apply(kernels, data, every[::-1], weights), whole[::-1], "reversed")
    twice = np.concatenate([every, every])
    tolerance.assert_same_bits(apply(kernels, data, twice, weights), np.concatenate([whole, whole]), "doubled")
    for row in {0, case.tokens // 2, case.tokens - 1}:
        one = np.array([row])
        tolerance.assert_same_bits(apply(kernels, data, one, weights)[0], whole[row], f"row {row} alone")
    same_adapter = np.flatnonzero(data.indices == data.indices[0])
    tolerance.assert_same_bits(apply(kernels, data, same_adapter, weights), whole[same_adapter], "one adapter alone")


def test_rank_of_neighbours_does_not_change_the_bits(kernels: engines.Engine) -> None:
    """A slot gives the same bits whether the others have its rank, another, or nothing."""
    case = cases.Case(6, 256, (128,), (16, 16, 16), "one")
    data = cases.build(case)
    weights, _ = cases.load(data, kernels.device, kernels.array)
    alike = apply(kernels, data, np.arange(6), weights)
    other = np.random.default_rng(3)
    weights.load(
        0,
        kernels.array(cases.normal(other, (64, 256), "bfloat16")),
        kernels.array(cases.normal(other, (128, 64), "bfloat16")),
    )
    weights.unload(1)
    assert weights.ranks == (64, 0, 16)
    tolerance.assert_same_bits(apply(kernels, data, np.arange(6), weights), alike)


def test_segments_give_the_bits_of_indices(engine: engines.Engine) -> None:
    case = cases.Case(33, 128, (64,), (16, 16, 8), "runs")
    data = cases.build(case)
    weights, batch = cases.load(data, engine.device, engine.array)
    by_row = engine.array(data.y)
    add_lora(by_row, engine.array(data.x), weights, batch)
    starts, lengths, slots = cases.segments(data.indices)
    indptr = np.append(starts, case.tokens)
    assert np.array_equal(np.diff(indptr), lengths)
    batch.update_segments(engine.array(indptr), engine.array(slots), num_tokens=case.tokens)
    by_segment = engine.array(data.y)
    add_lora(by_segment, engine.array(data.x), weights, batch)
    tolerance.assert_same_bits(engine.numpy(by_segment), engine.numpy(by_row))


def test_one_batch_serves_many_layers(engine: engines.Engine) -> None:
    """The same schedule with layers of other widths, ranks and slices."""
    first = cases.build(cases.Case(12, 256, (128,), (16, 8, 32), "random"))
    second = cases.build(cases.replace(first.case, in_features=128, outs=(64, 32), ranks=(8, 8, 8)))
    _, batch = cases.load(first, engine.device, engine.array)
    for data in (first, second):
        data = cases.replace(data, indices=first.indices)
        weights, _ = cases.load(data, engine.device, engine.array)
        y = engine.array(data.y)
        add_lora(y, engine.array(data.x), weights, batch)
        cases.assert_added(engine.numpy(y), data)


def test_loop_path(engine: engines.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """DISABLE_SGMV=1: a loop of matrix products gives the same results, within rounding."""
    monkeypatch.setenv("DISABLE_SGMV", "1")
    for case in cases.ADD_LORA:
        if case.pattern == "out_of_range" or len(case.outs) > 1:
            run(engine, case)


def test_plans_are_kept_and_still_checked(kernels: engines.Engine) -> None:
    """The second call of a kind takes the kept plan: with other arrays, after other loads, and with bad ones."""
    case = cases.Case(8, 128, (128,), (16, 16), "random")
    data = cases.build(case)
    weights, batch = cases.load(data, kernels.device, kernels.array)
    x = kernels.array(data.x)
    for _ in range(2):
        y = kernels.array(data.y)
        add_lora(y, x, weights, batch)
        cases.assert_added(kernels.numpy(y), data)
    assert len(weights.launches) == 1
    before = kernels.numpy(x)
    with pytest.raises(ValueError, match="y: expected memory of its own, got memory that overlaps x"):
        add_lora(x, x, weights, batch)
    both = kernels.array(np.zeros(2 * x.size, before.dtype))
    with pytest.raises(ValueError, match="y: expected memory of its own, got memory that overlaps x"):
        add_lora(both[8 : 8 + x.size].reshape(x.shape), both[: x.size].reshape(x.shape), weights, batch)
    tolerance.assert_same_bits(kernels.numpy(x), before)
    batch.update(kernels.array(np.zeros(7, np.int32)))
    with pytest.raises(ValueError, match="y: expected the 7 rows of the batch, got 8"):
        add_lora(y, x, weights, batch)
    batch.update(kernels.array(data.indices))
    swapped = cases.build(cases.replace(case, ranks=(16, 40)))
    weights.load(1, kernels.array(swapped.a[1][0]), kernels.array(swapped.b[1][0]), scale=3.0)
    assert not weights.launches, "a kernel for the ranks that were"
    mixed = cases.replace(
        data,
        case=cases.replace(case, ranks=(16, 40)),
        a=[data.a[0], swapped.a[1]],
        b=[data.b[0], swapped.b[1]],
        scales=[data.scales[0], 3.0],
    )
    y = kernels.array(data.y)
    add_lora(y, x, weights, batch)
    cases.assert_added(kernels.numpy(y), mixed)


# ---------------------------------------------------------------------------------------- bad input

BF16 = cases.DTYPES["bfloat16"]
TOKENS, WIDE, RANK, ADAPTERS = 6, 32, 8, 3


def layer(engine: engines.Engine) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    weights = LoraWeights(WIDE, (16, 8), max_adapters=ADAPTERS, dtype="float16", device=engine.device)
    for slot in range(ADAPTERS):
        weights.load(slot, cases.normal(rng, (RANK, WIDE), "float16"), cases.normal(rng, (24, RANK), "float16"))
    batch = LoraBatch(TOKENS + 4, max_adapters=ADAPTERS, device=engine.device)
    batch.update(engine.array(np.arange(TOKENS) % ADAPTERS))
    return {
        "y": engine.array(np.full((TOKENS, 24), 3, np.float16)),
        "x": engine.array(cases.normal(rng, (TOKENS, WIDE), "float16")),
        "weights": weights,
        "batch": batch,
    }


def layer_refused(engine: engines.Engine, args: dict[str, Any], error: type[Exception], message: str) -> None:
    engines.assert_refused(engine, lambda: add_lora(**args), error, message, args["y"])


LAYER: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray], type[Exception], str]] = {
    "x float32": (
        "x",
        lambda v: v.astype(np.float32),
        TypeError,
        r"x: expected the dtype of weights \(float16\), got float32",
    ),
    "x bfloat16": (
        "x",
        lambda v: v.astype(BF16),
        TypeError,
        "x: expected the dtype of weights .*got bfloat16",
    ),
    "y bfloat16": (
        "y",
        lambda v: v.astype(BF16),
        TypeError,
        "y: expected the dtype of weights .*or float32, got bfloat16",
    ),
    "y float64": ("y", lambda v: v.astype(np.float64), TypeError, "y: expected .*, got float64"),
    "x too narrow": ("x", lambda v: v[:, 1:], ValueError, r"x: expected shape \(num_tokens, 32\), got \(6, 31\)"),
    "y too wide": (
        "y",
        lambda v: np.pad(v, ((0, 0), (0, 1))),
        ValueError,
        r"y: expected shape \(6, 24\), got \(6, 25\)",
    ),
    "y of fewer rows": ("y", lambda v: v[1:], ValueError, r"y: expected shape \(6, 24\), got \(5, 24\)"),
    "x three-dimensional": ("x", lambda v: v[None], ValueError, "x: expected 2 dimensions"),
}


@pytest.mark.parametrize("what", LAYER)
def test_layer_arrays(engine: engines.Engine, what: str) -> None:
    name, change, error, message = LAYER[what]
    args = layer(engine)
    args[name] = engine.array(change(engine.numpy(args[name])))
    layer_refused(engine, args, error, message)


def test_layer_of_another_batch(engine: engines.Engine) -> None:
    args = layer(engine)
    args["batch"].update(engine.array(np.zeros(TOKENS - 1, np.int32)))
    layer_refused(engine, args, ValueError, "y: expected the 5 rows of the batch, got 6")
    more = LoraBatch(TOKENS, max_adapters=ADAPTERS + 1, device=engine.device)
    more.update(engine.array(np.zeros(TOKENS, np.int32)))
    layer_refused(
        engine, args | {"batch": more}, ValueError, "batch: expected at most the 3 adapters of weights, got 4"
    )


def test_layer_columns_and_overlap(engine: engines.Engine) -> None:
    args = layer(engine)
    by_columns = engine.array(np.zeros((WIDE, TOKENS), np.float16)).T
    layer_refused(engine, args | {"x": by_columns}, ValueError, "x: expected contiguous rows")
    shared = engine.array(np.ones((TOKENS, WIDE), np.float16))
    args |= {"x": shared, "y": shared[:, :24]}
    layer_refused(engine, args, ValueError, "y: expected memory of its own, got memory that overlaps x")


@pytest.mark.parametrize("name", ["weights", "batch"])
def test_layer_objects(name: str) -> None:
    engine = engines.Numpy()
    args = layer(engine) | {name: np.zeros(3)}
    layer_refused(engine, args, TypeError, f"{name}: expected a Lora(Weights|Batch), got ndarray")


@pytest.mark.parametrize("value", [None, "1", np.ones(2)], ids=["None", "str", "array"])
def test_layer_scale(value: object) -> None:
    engine = engines.Numpy()
    layer_refused(engine, layer(engine) | {"scale": value}, TypeError, "scale: expected a real number, got")


@pytest.mark.gpu
def test_layer_host_and_device_mixed(gpu: engines.Engine) -> None:
    args, host = layer(gpu), layer(engines.Numpy())
    for name in ("x", "weights", "batch"):
        layer_refused(gpu, args | {name: host[name]}, ValueError, "expected an array on the same device as")
