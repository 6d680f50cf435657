"""Bad input: a TypeError or ValueError that names what, what was expected and what came, with nothing written."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import cases
import engines
import numpy as np
import pytest

import cupy_lora
from cupy_lora import LoraBatch, LoraWeights, add_lora

BF16 = cases.DTYPES["bfloat16"]
F16 = np.dtype(np.float16)
TOKENS, WIDE, RANK, ADAPTERS = 6, 32, 8, 3

SHRINKS = ("bgmv_shrink", "sgmv_shrink")
EXPANDS = ("bgmv_expand", "bgmv_expand_slice", "sgmv_expand", "sgmv_expand_slice")
EVERY = SHRINKS + EXPANDS
SEGMENTED = tuple(op for op in EVERY if op.startswith("sgmv"))


def arguments(op: str, engine: engines.Engine) -> dict[str, Any]:
    """A call that is right, by keyword."""
    rng = np.random.default_rng(0)
    shrink = op in SHRINKS
    columns, out = (WIDE, RANK) if shrink else (RANK, WIDE)
    args: dict[str, Any] = {
        "inputs": engine.array(cases.normal(rng, (TOKENS, columns), "float16")),
        "lora_a_weights" if shrink else "lora_b_weights": engine.array(
            cases.normal(rng, (ADAPTERS, out, columns), "float16")
        ),
        "output_tensor": engine.array(np.full((TOKENS, out), 3, np.float16)),
    }
    if op.startswith("bgmv"):
        args["lora_indices_tensor"] = engine.array(np.arange(TOKENS) % ADAPTERS)
    else:
        args["b_seq_start_loc"] = engine.array(np.array([0, 4]))
        args["seq_len_tensor"] = engine.array(np.array([4, 2]))
        args["lora_indices_tensor"] = engine.array(np.array([2, 0]))
        args |= {"batches": 2, "max_seq_length": 4}
    if op == "sgmv_shrink":
        args["scaling"] = 1.0
    if op.endswith("slice"):
        args |= {"slice_offset": 0, "slice_size": WIDE}
    return args


def weights_name(op: str) -> str:
    return "lora_a_weights" if op in SHRINKS else "lora_b_weights"


def refused(
    op: str, engine: engines.Engine, args: dict[str, Any], error: type[Exception], message: str, out: Any = None
) -> None:
    """The call raises this error, whose message has this form, and the output keeps its bytes."""
    output = args["output_tensor"] if out is None else out
    before = engine.numpy(output) if hasattr(output, "dtype") else None
    with pytest.raises(error) as caught:
        getattr(cupy_lora, op)(**args)
    assert type(caught.value) is error
    text = str(caught.value)
    assert re.search(message, text), text
    assert re.match(r"\w+(\[\d+\])?: expected .*, got ", text), text
    if before is not None:
        assert engine.numpy(output).tobytes() == before.tobytes()


@pytest.mark.parametrize("op", EVERY)
def test_the_call_that_is_right(engine: engines.Engine, op: str) -> None:
    args = arguments(op, engine)
    assert getattr(cupy_lora, op)(**args) is args["output_tensor"]
    assert not (engine.numpy(args["output_tensor"]) == 3).all()


Change = Callable[[str, dict[str, Any], engines.Engine], None]


def replaced(name: str, make: Callable[[engines.Engine], np.ndarray]) -> Change:
    def change(op: str, args: dict[str, Any], engine: engines.Engine) -> None:
        args[weights_name(op) if name == "weights" else name] = make(engine)

    return change


def cast(name: str, dtype: Any) -> Change:
    def change(op: str, args: dict[str, Any], engine: engines.Engine) -> None:
        key = weights_name(op) if name == "weights" else name
        args[key] = engine.array(engine.numpy(args[key]).astype(dtype))

    return change


def shaped(name: str, shape: Callable[[tuple[int, ...]], tuple[int, ...]]) -> Change:
    def change(op: str, args: dict[str, Any], engine: engines.Engine) -> None:
        key = weights_name(op) if name == "weights" else name
        args[key] = engine.array(np.zeros(shape(args[key].shape), engine.numpy(args[key]).dtype))

    return change


def turned(name: str) -> Change:
    """The same shape and values with the columns next to each other."""

    def change(op: str, args: dict[str, Any], engine: engines.Engine) -> None:
        key = weights_name(op) if name == "weights" else name
        base = engine.array(np.ascontiguousarray(np.swapaxes(engine.numpy(args[key]), -1, -2)))
        args[key] = base.swapaxes(-1, -2)

    return change


ANY_OP: dict[str, tuple[Change, type[Exception], str]] = {
    "inputs float64": (cast("inputs", np.float64), TypeError, "inputs: expected the dtype of .*float16.*got float64"),
    "inputs of another half": (cast("inputs", BF16), TypeError, "inputs: expected the dtype of .*got bfloat16"),
    "weights float32": (
        cast("weights", np.float32),
        TypeError,
        "weights: expected dtype float16 or bfloat16, got float32",
    ),
    "weights int8": (cast("weights", np.int8), TypeError, "weights: expected dtype .*, got int8"),
    "output int32": (cast("output_tensor", np.int32), TypeError, "output_tensor: expected the dtype of .*got int32"),
    "output of another half": (cast("output_tensor", BF16), TypeError, "output_tensor: expected .*got bfloat16"),
    "indices of a float type": (
        cast("lora_indices_tensor", np.float32),
        TypeError,
        "lora_indices_tensor: expected dtype int32 or int64, got float32",
    ),
    "indices int16": (cast("lora_indices_tensor", np.int16), TypeError, "lora_indices_tensor: .*got int16"),
    "inputs too narrow": (shaped("inputs", lambda s: (s[0], s[1] - 1)), ValueError, "inputs: expected shape"),
    "inputs one-dimensional": (shaped("inputs", lambda s: s[1:]), ValueError, "inputs: expected 2 dimensions"),
    "weights of another rank": (shaped("weights", lambda s: (s[0], s[1] + 1, s[2] + 1)), ValueError, "expected"),
    "weights two-dimensional": (shaped("weights", lambda s: s[1:]), ValueError, "weights: expected shape"),
    "weights of two layers": (shaped("weights", lambda s: (s[0], 2, *s[1:])), ValueError, "weights: expected shape"),
    "weights of rank 0": (shaped("weights", lambda s: (s[0], 0, 0)), ValueError, "weights: expected a rank"),
    "output of fewer rows": (
        shaped("output_tensor", lambda s: (s[0] - 1, s[1])),
        ValueError,
        "output_tensor: expected",
    ),
    "weights not contiguous": (turned("weights"), ValueError, "weights: expected a C-contiguous array"),
    "inputs by columns": (turned("inputs"), ValueError, "inputs: expected contiguous rows"),
    "output by columns": (turned("output_tensor"), ValueError, "output_tensor: expected contiguous rows"),
    "indices two-dimensional": (shaped("lora_indices_tensor", lambda s: (*s, 1)), ValueError, "lora_indices_tensor: "),
}


@pytest.mark.parametrize("op", EVERY)
@pytest.mark.parametrize("what", ANY_OP)
def test_arrays(engine: engines.Engine, op: str, what: str) -> None:
    change, error, message = ANY_OP[what]
    args = arguments(op, engine)
    change(op, args, engine)
    refused(op, engine, args, error, message)


@pytest.mark.parametrize("op", EVERY)
@pytest.mark.parametrize("name", ["inputs", "weights", "output_tensor", "lora_indices_tensor"])
@pytest.mark.parametrize("value", [None, 1.5, [[1.0]]], ids=["None", "float", "list"])
def test_no_array(op: str, name: str, value: object) -> None:
    engine = engines.Numpy()
    args = arguments(op, engine)
    args[weights_name(op) if name == "weights" else name] = value
    refused(op, engine, args, TypeError, f"{name}: expected an array .*got {type(value).__name__}")


@pytest.mark.parametrize("op", EVERY)
def test_output_overlaps_an_input(engine: engines.Engine, op: str) -> None:
    args = arguments(op, engine)
    shared = engine.array(np.ones((TOKENS, WIDE + RANK), np.float16))
    columns = WIDE if op in SHRINKS else RANK
    flat = shared.reshape(-1)
    args["inputs"] = flat[: TOKENS * columns].reshape(TOKENS, columns)
    out = RANK if op in SHRINKS else WIDE
    start = TOKENS * columns - 1
    args["output_tensor"] = flat[start : start + TOKENS * out].reshape(TOKENS, out)
    refused(op, engine, args, ValueError, "output_tensor: expected memory of its own, got memory that overlaps inputs")


@pytest.mark.parametrize("op", EVERY)
def test_output_overlaps_the_weights(engine: engines.Engine, op: str) -> None:
    args = arguments(op, engine)
    out = RANK if op in SHRINKS else WIDE
    args["output_tensor"] = args[weights_name(op)].reshape(-1)[: TOKENS * out].reshape(TOKENS, out)
    refused(op, engine, args, ValueError, "output_tensor: expected memory of its own")


@pytest.mark.parametrize("step", [0, -1], ids=["one_row", "one_short"])
@pytest.mark.parametrize("op", EVERY)
def test_output_rows_that_overlap_each_other(engine: engines.Engine, op: str, step: int) -> None:
    if engine.name == "gpu":
        from cupy.lib.stride_tricks import as_strided
    else:
        from numpy.lib.stride_tricks import as_strided
    args = arguments(op, engine)
    base, out = args["output_tensor"], args["output_tensor"].shape[1]
    args["output_tensor"] = as_strided(
        base, (TOKENS, out), (0 if step == 0 else (out - 1) * base.itemsize, base.itemsize)
    )
    refused(op, engine, args, ValueError, "output_tensor: expected contiguous rows that do not overlap", out=base)


@pytest.mark.parametrize("op", EVERY)
def test_rank_above_the_largest(op: str) -> None:
    engine = engines.Numpy()
    args = arguments(op, engine)
    wide = (1, 1025, WIDE) if op in SHRINKS else (1, WIDE, 1025)
    args[weights_name(op)] = np.zeros(wide, np.float16)
    args["inputs"] = np.zeros((TOKENS, wide[2]), np.float16)
    args["output_tensor"] = np.zeros((TOKENS, wide[1]), np.float16)
    refused(op, engine, args, ValueError, "weights: expected a rank of at most 1024, got 1025")


@pytest.mark.parametrize("op", ["bgmv_shrink", "bgmv_expand", "bgmv_expand_slice"])
def test_indices_of_another_length(engine: engines.Engine, op: str) -> None:
    args = arguments(op, engine)
    args["lora_indices_tensor"] = engine.array(np.zeros(TOKENS - 1, np.int64))
    refused(op, engine, args, ValueError, r"lora_indices_tensor: expected shape \(6\), got \(5,\)")


@pytest.mark.parametrize("op", ["bgmv_expand_slice", "sgmv_expand_slice"])
@pytest.mark.parametrize(
    ("offset", "size", "error", "message"),
    [
        (
            1,
            WIDE,
            ValueError,
            "slice_offset: expected a slice within the 32 columns of output_tensor, got columns 1 to 33",
        ),
        (-1, WIDE, ValueError, "slice_offset: expected an integer of at least 0, got -1"),
        (0, WIDE - 1, ValueError, r"slice_size: expected 32 \(the rows of lora_b_weights\), got 31"),
        (0, WIDE + 1, ValueError, "slice_size: expected 32 .*, got 33"),
        (0.0, WIDE, TypeError, "slice_offset: expected an integer, got float"),
        (0, "32", TypeError, "slice_size: expected an integer, got str"),
        (True, WIDE, TypeError, "slice_offset: expected an integer, got bool"),
    ],
)
def test_slices(engine: engines.Engine, op: str, offset: Any, size: Any, error: type[Exception], message: str) -> None:
    args = arguments(op, engine) | {"slice_offset": offset, "slice_size": size}
    refused(op, engine, args, error, message)


@pytest.mark.parametrize("op", SHRINKS)
@pytest.mark.parametrize("value", [None, "1", np.ones(1), 1j, True], ids=str)
def test_scaling_is_a_number(op: str, value: object) -> None:
    engine = engines.Numpy()
    args = arguments(op, engine) | {"scaling": value}
    refused(op, engine, args, TypeError, f"scaling: expected a real number, got {type(value).__name__}")


@pytest.mark.parametrize("op", EXPANDS)
def test_add_inputs_is_a_bool(op: str) -> None:
    engine = engines.Numpy()
    args = arguments(op, engine) | {"add_inputs": 2}
    refused(op, engine, args, TypeError, "add_inputs: expected a bool, got int")


@pytest.mark.parametrize("op", SEGMENTED)
@pytest.mark.parametrize(
    ("starts", "lengths", "message"),
    [
        ([-1, 4], [2, 2], r"b_seq_start_loc: expected segments within the 6 rows, got rows -1 to 1 at 0"),
        ([0, 4], [4, 3], r"b_seq_start_loc: expected segments within the 6 rows, got rows 4 to 7 at 1"),
        ([0, 4], [4, -1], r"seq_len_tensor: expected lengths of at least 0, got -1 at 1"),
        ([0, 3], [4, 2], r"b_seq_start_loc: expected segments that do not overlap, got 0 and 1 overlapping"),
        ([3, 0], [2, 4], r"b_seq_start_loc: expected segments that do not overlap, got 1 and 0 overlapping"),
    ],
)
@pytest.mark.parametrize("index", [np.int32, np.int64])
def test_segments_in_host_memory(op: str, starts: list[int], lengths: list[int], message: str, index: Any) -> None:
    engine = engines.Numpy()
    args = arguments(op, engine)
    args["b_seq_start_loc"], args["seq_len_tensor"] = np.array(starts, index), np.array(lengths, index)
    refused(op, engine, args, ValueError, message)


@pytest.mark.gpu
@pytest.mark.parametrize("op", SEGMENTED)
def test_segments_on_the_device_are_named_under_debug(
    gpu: engines.Engine, op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUPY_LORA_DEBUG", "1")
    args = arguments(op, gpu)
    args["seq_len_tensor"] = gpu.array(np.array([4, 3]))
    refused(op, gpu, args, ValueError, "b_seq_start_loc: expected segments within the 6 rows, got rows 4 to 7 at 1")


@pytest.mark.parametrize("op", SEGMENTED)
def test_segment_arrays(engine: engines.Engine, op: str) -> None:
    right = arguments(op, engine)
    refused(op, engine, right | {"batches": 3}, ValueError, r"batches: expected the length .*\(2\), got 3")
    refused(op, engine, right | {"batches": -1}, ValueError, "batches: expected an integer of at least 0, got -1")
    refused(op, engine, right | {"batches": 2.0}, TypeError, "batches: expected an integer, got float")
    refused(op, engine, right | {"max_seq_length": -4}, ValueError, "max_seq_length: expected an integer of at least 0")
    short, floats = engine.array(np.array([0])), engine.array(np.array([0.0, 4.0]))
    for name in ("b_seq_start_loc", "seq_len_tensor"):
        refused(op, engine, right | {name: short}, ValueError, rf"{name}: expected shape \(2\), got \(1,\)")
        refused(op, engine, right | {name: floats}, TypeError, f"{name}: expected dtype int32 or int64, got float64")


@pytest.mark.parametrize("op", EVERY)
def test_debug_names_the_bad_row(engine: engines.Engine, op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(op, engine)
    slots = np.where(np.arange(len(args["lora_indices_tensor"])) == 1, ADAPTERS, 0)
    args["lora_indices_tensor"] = engine.array(slots)
    monkeypatch.setenv("CUPY_LORA_DEBUG", "1")
    refused(op, engine, args, ValueError, r"lora_indices_tensor: expected slots below 3 .*, got 3 in row 1")
    monkeypatch.setenv("CUPY_LORA_DEBUG", "0")
    getattr(cupy_lora, op)(**args)


@pytest.mark.gpu
@pytest.mark.parametrize("op", EVERY)
def test_host_and_device_mixed(gpu: engines.Engine, op: str) -> None:
    right = arguments(op, gpu)
    for name, array in right.items():
        if hasattr(array, "dtype"):
            args = right | {name: gpu.numpy(array)}
            refused(op, gpu, args, ValueError, "expected an array on the same device as", out=right["output_tensor"])


# ---------------------------------------------------------------------------------------- add_lora


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
    before = engine.numpy(args["y"])
    with pytest.raises(error) as caught:
        add_lora(**args)
    text = str(caught.value)
    assert type(caught.value) is error
    assert re.search(message, text), text
    assert re.match(r"\w+: expected .*, got ", text), text
    assert engine.numpy(args["y"]).tobytes() == before.tobytes()


LAYER: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray], type[Exception], str]] = {
    "x float32": (
        "x",
        lambda v: v.astype(np.float32),
        TypeError,
        r"x: expected the dtype of weights \(float16\), got float32",
    ),
    "x bfloat16": ("x", lambda v: v.astype(BF16), TypeError, "x: expected the dtype of weights .*got bfloat16"),
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


# ---------------------------------------------------------------------------------------- LoraWeights, LoraBatch


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
