"""Bad input of the bgmv and sgmv functions: a TypeError or ValueError that names it, with nothing written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cases
import engines
import numpy as np
import pytest

import cupy_lora

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
    output = args["output_tensor"] if out is None else out
    engines.assert_refused(engine, lambda: getattr(cupy_lora, op)(**args), error, message, output)


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
