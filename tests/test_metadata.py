"""Batch metadata: each function against loops over single entries, on every engine; hints, guards, dtypes, errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from engines import Engine
from hypothesis import given
from hypothesis import strategies as st
from metadata_cases import I32, I64, NEVER, WIDTHS, cumulative, lengths_of, table_of

import cupy_lora
from cupy_lora import _arrays, _metadata_plan
from cupy_lora._metadata_checks import sum_of_lengths


# ---- block_tables_to_ragged ---------------------------------------------------------------------
@pytest.mark.parametrize("dtype", WIDTHS)
@pytest.mark.parametrize(("batch", "most"), [(1, 1), (3, 40), (64, 100), (300, 9), (5, 5000)])
def test_ragged(engine: Engine, batch: int, most: int, dtype: np.dtype):
    rng = np.random.default_rng(batch)
    new, cached = lengths_of(rng, batch, most)
    table = table_of(rng, batch, most, dtype)
    out = cupy_lora.block_tables_to_ragged(
        block_tables=engine.array(table), input_lengths=new, cache_lengths=cached,
        input_lengths_tensor=engine.array(np.array(new, dtype)),
        cache_lengths_tensor=engine.array(np.array(cached, I32)), max_current_length=most,
    )  # fmt: skip
    expected = [table[b, i] for b in range(batch) for i in range(new[b] + cached[b])]
    assert out.dtype == np.int32
    assert engine.numpy(out).tolist() == expected


@pytest.mark.parametrize("hint", [-5, 0, 1, 2048, 10**9])
def test_a_wrong_hint_is_only_slower(engine: Engine, hint: int):
    rng = np.random.default_rng(0)
    new, cached = [1, 0, 4500, 7], [6000, 0, 1, 2049]
    table = table_of(rng, 4, 6001, I32)
    lengths = [engine.array(np.array(part, I32)) for part in (new, cached)]
    out = cupy_lora.block_tables_to_ragged(
        block_tables=engine.array(table), input_lengths=new, cache_lengths=cached, input_lengths_tensor=lengths[0],
        cache_lengths_tensor=lengths[1], max_current_length=hint,
    )  # fmt: skip
    expected = np.concatenate([table[b, : new[b] + cached[b]] for b in range(4)])
    assert (engine.numpy(out) == expected).all()


def test_ragged_into_out_and_from_wider_rows(engine: Engine):
    """``out`` may be longer and needs no host lengths; the table is a column slice with more rows than lengths."""
    rng = np.random.default_rng(1)
    wide = table_of(rng, 5, 20, I32)
    new, cached = [1, 2, 1], [4, 0, 11]
    out = engine.array(np.full(25, NEVER, I32))
    returned = cupy_lora.block_tables_to_ragged(
        block_tables=engine.array(wide)[:, 3:15], input_lengths=None, cache_lengths=None,  # type: ignore[arg-type]
        input_lengths_tensor=engine.array(np.array(new, I64)), cache_lengths_tensor=engine.array(np.array(cached, I64)),
        max_current_length=12, out=out,
    )  # fmt: skip
    assert returned is out
    expected = [wide[b, 3 + i] for b in range(3) for i in range(new[b] + cached[b])]
    assert engine.numpy(out).tolist() == expected + [NEVER] * (25 - len(expected))


@pytest.mark.parametrize("hint", [1, 5000])
def test_a_result_that_is_too_short_is_filled_and_not_overrun(engine: Engine, hint: int):
    table = np.arange(5000, dtype=I32).reshape(1, 5000)
    for length in (4999, 4096, 3000, 1):
        out = engine.array(np.full(length, NEVER, I32))
        cupy_lora.block_tables_to_ragged(
            block_tables=engine.array(table), input_lengths=[1], cache_lengths=[4999],
            input_lengths_tensor=engine.array(np.array([1], I32)),
            cache_lengths_tensor=engine.array(np.array([4999], I32)), max_current_length=hint, out=out,
        )  # fmt: skip
        assert (engine.numpy(out) == np.arange(length)).all()


def test_device_lengths_are_read_where_no_list_is_given(engine: Engine):
    table = engine.array(np.arange(12, dtype=I32).reshape(2, 6))
    new, cached = engine.array(np.array([1, 1], I32)), engine.array(np.array([0, 3], I32))
    out = cupy_lora.block_tables_to_ragged(
        block_tables=table, input_lengths=new, cache_lengths=cached, input_lengths_tensor=new,
        cache_lengths_tensor=cached, max_current_length=4,
    )  # fmt: skip
    assert engine.numpy(out).tolist() == [0, 6, 7, 8, 9]


def test_wrong_device_lengths_stay_inside_the_arrays(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    """The lists say 3 entries, the device 10**6 or -4: nothing outside of table and result is touched."""
    for wrong in ([1, 10**6], [-4, 3], [2**31 - 1, 2**31 - 1]):
        arguments: dict[str, Any] = {
            "block_tables": engine.array(np.arange(8, dtype=I32).reshape(2, 4)), "input_lengths": [1, 1],
            "cache_lengths": [0, 1], "input_lengths_tensor": engine.array(np.array(wrong, I32)),
            "cache_lengths_tensor": engine.array(np.zeros(2, I32)), "max_current_length": 4,
        }  # fmt: skip
        assert cupy_lora.block_tables_to_ragged(**arguments).shape == (3,)
        with monkeypatch.context() as patch:
            patch.setenv("CUPY_LORA_DEBUG", "1")
            with pytest.raises(ValueError, match=r"expected 0 \.\. 4|expected room"):
                cupy_lora.block_tables_to_ragged(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"cache_lengths": [5, 0]}, ValueError, r"block_tables: expected rows of at least 6 entries \(row 0\), got 4"),
        ({"input_lengths": [-1, 1]}, ValueError, "expected lengths >= 0, got -1 and 0 at 0"),
        ({"input_lengths": [1]}, ValueError, "input_lengths: expected 2 lengths, got 1"),
        ({"block_tables": np.zeros((1, 4), I32)}, ValueError, "block_tables: expected at least 2 rows"),
        ({"block_tables": np.zeros((2, 4), np.int16)}, TypeError, "block_tables: expected dtype int32 or int64"),
        ({"block_tables": np.zeros((2, 8), I32)[:, ::2]}, ValueError, "block_tables: expected contiguous rows"),
        ({"cache_lengths_tensor": np.zeros(3, I32)}, ValueError, r"cache_lengths_tensor: expected shape \(2\)"),
        ({"cache_lengths_tensor": np.zeros(2, np.float32)}, TypeError, "cache_lengths_tensor: expected dtype"),
        ({"out": np.zeros(3, I64)}, TypeError, "out: expected dtype int32, got int64"),
        ({"out": np.zeros((3, 1), I32)}, ValueError, "out: expected shape"),
        ({"max_current_length": 4.0}, TypeError, "max_current_length: expected an integer, got float"),
    ],
)
def test_ragged_names_what_is_wrong(change: dict[str, Any], error: type[Exception], text: str):
    arguments: dict[str, Any] = {
        "block_tables": np.zeros((2, 4), I32), "input_lengths": [1, 1], "cache_lengths": [0, 1],
        "input_lengths_tensor": np.ones(2, I32), "cache_lengths_tensor": np.array([0, 1], I32), "max_current_length": 4,
    }  # fmt: skip
    with pytest.raises(error, match=text):
        cupy_lora.block_tables_to_ragged(**{**arguments, **change})


@pytest.mark.parametrize("kind", [list, tuple])
def test_the_sum_of_lengths_is_that_of_a_plain_loop(kind: type):
    rng = np.random.default_rng(5)
    lists = [[0], [1] * 7, [3, 0, 5], [2**33, 1], [-1], [-1] * 3, [4, -1, 4], *rng.integers(0, 9, (20, 6)).tolist()]
    for news in lists:
        for caches in (list(other) for other in lists if len(other) == len(news)):
            wrong = next((i for i, pair in enumerate(zip(news, caches, strict=True)) if min(pair) < 0), len(news))
            long = next((i for i, pair in enumerate(zip(news, caches, strict=True)) if sum(pair) > 12), len(news))
            arguments = kind(news), kind(caches), 12
            if wrong < len(news) and wrong <= long:
                with pytest.raises(ValueError, match=f"expected lengths >= 0, got .* at {wrong}$"):
                    sum_of_lengths(*arguments)
            elif long < len(news):
                with pytest.raises(ValueError, match=rf"expected rows of at least .* \(row {long}\), got 12"):
                    sum_of_lengths(*arguments)
            else:
                assert sum_of_lengths(*arguments) == sum(news) + sum(caches)
    assert sum_of_lengths([], [], 12) == 0


def test_parameters_are_keyword_only():
    with pytest.raises(TypeError, match="positional"):
        cupy_lora.block_tables_to_ragged(np.zeros((1, 1), I32), [1], [0], np.ones(1, I32), np.zeros(1, I32), 1)


# ---- the row functions --------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", WIDTHS)
@pytest.mark.parametrize("hint", [1, 100, 700])
def test_padded(engine: Engine, hint: int, dtype: np.dtype):
    rng = np.random.default_rng(2)
    lengths = [0, 5, 700, 1, 33, 0, 128]
    ragged = rng.integers(0, 2**31 - 1, sum(lengths)).astype(I32)
    base = np.full((7, 703), NEVER, dtype)
    expected = base.copy()
    start = 0
    for b, length in enumerate(lengths):
        for i in range(length):
            expected[b, 1 + i] = ragged[start + i]
        start += length
    padded = engine.array(base)
    cupy_lora.block_tables_to_padded(
        hint, engine.array(cumulative(lengths, dtype)), padded[:, 1:702], engine.array(ragged)
    )
    assert (engine.numpy(padded) == expected).all()


@pytest.mark.parametrize("dtype", WIDTHS)
@pytest.mark.parametrize("accept", ["one", "none or one", "up to 5", "up to 201"])
def test_copy_next_input_ids(engine: Engine, accept: str, dtype: np.dtype):
    rng = np.random.default_rng(3)
    batch, width = 70, 400
    most = {"up to 5": 5, "up to 201": 201}.get(accept, 1)
    accepted = [1] * batch if accept == "one" else rng.integers(0, most + 1, batch).tolist()
    cached, new = rng.integers(0, 150, batch), rng.integers(1, 4, batch)
    prompts = np.where(rng.random(batch) < 0.3, rng.integers(0, 350, batch), 0)
    tokens = rng.integers(0, 32000, sum(accepted))
    ids = rng.integers(0, 32000, (batch, width))
    expected, at = ids.copy(), 0
    for b in range(batch):
        for i in range(accepted[b]):
            column = cached[b] + new[b] + i
            if column >= prompts[b] and column < width:
                expected[b, column] = tokens[at]
            at += 1
    array = engine.array(ids.astype(dtype))
    cupy_lora.copy_next_input_ids_inplace(
        most, array, engine.array(cached.astype(I32)), engine.array(new.astype(dtype)),
        engine.array(prompts.astype(I32)), engine.array(tokens.astype(dtype)), engine.array(cumulative(accepted, I64)),
    )  # fmt: skip
    assert (engine.numpy(array) == expected).all()


def test_copy_fewer_next_ids_than_sequences(engine: Engine):
    """The token that is read ahead, one a sequence, is not there for all of them."""
    ids = np.zeros((4, 6), I64)
    array = engine.array(ids)
    counts = [engine.array(np.array(values, I64)) for values in ([1, 2, 0, 3], [1, 1, 1, 1], [0, 0, 0, 0])]
    next_ids = engine.array(np.array([7, 8], I64))
    cupy_lora.copy_next_input_ids_inplace(1, array, *counts, next_ids, engine.array(cumulative([1, 0, 0, 1], I64)))
    ids[0, 2], ids[3, 4] = 7, 8
    assert (engine.numpy(array) == ids).all()


@pytest.mark.parametrize("dtype", WIDTHS)
@pytest.mark.parametrize("most", [1, 90, 3000])
def test_position_and_slot_ids(engine: Engine, most: int, dtype: np.dtype):
    rng = np.random.default_rng(4)
    batch = 19
    new = [1] * batch if most == 1 else rng.integers(0, most + 1, batch).tolist()
    cached = rng.integers(0, 1000, batch)
    cu_slots = cumulative([4000] * batch, I64)
    positions, indices = [], []
    for b in range(batch):
        for i in range(new[b]):
            positions.append(int(cached[b]) + i)
            indices.append(int(cu_slots[b]) + int(cached[b]) + i)
    outs = [engine.array(np.full(sum(new) + 1, NEVER, d)) for d in (I32, dtype)]
    cupy_lora.prepare_position_slot_ids(
        most, engine.array(cached.astype(dtype)), engine.array(cumulative(new, I32)), engine.array(cu_slots), *outs
    )
    assert engine.numpy(outs[0]).tolist() == [*positions, NEVER]
    assert engine.numpy(outs[1]).tolist() == [*indices, NEVER]


@pytest.mark.parametrize("dtype", WIDTHS)
@pytest.mark.parametrize("hint", [1, 128, 1500])
def test_slots_filtering(engine: Engine, hint: int, dtype: np.dtype):
    rng = np.random.default_rng(5)
    counts = [3, 0, 1500, 1, 64]
    starts = [100, 7, 0, 1999, 800]
    slots = rng.integers(0, 10**6, 2000).astype(dtype)
    expected = [slots[starts[b] + i] for b in range(5) for i in range(counts[b])]
    filtered = engine.array(np.full(sum(counts) + 1, NEVER, dtype))
    cupy_lora.slots_filtering(
        hint,
        engine.array(slots),
        filtered,
        engine.array(cumulative(counts, I64)),
        engine.array(np.array(starts, dtype)),
    )
    assert engine.numpy(filtered).tolist() == [*expected, NEVER]


def wrong_cumulative() -> list[list[int]]:
    return [[0, 100, 8], [-3, 4, 8], [5, 2, 8], [0, 4, 2**31 - 1]]


@pytest.mark.parametrize("cu", wrong_cumulative())
def test_wrong_cumulative_sums_stay_inside_the_arrays(engine: Engine, cu: list[int], monkeypatch: pytest.MonkeyPatch):
    """Guard pages on the CPU runner, and the debug switch that names the entry."""
    cu_array = engine.array(np.array(cu, I32))
    two, eight = (lambda: engine.array(np.ones(2, I32))), (lambda: engine.array(np.arange(8, dtype=I32)))
    calls = [
        lambda: cupy_lora.block_tables_to_padded(8, cu_array, engine.array(np.zeros((2, 4), I32)), eight()),
        lambda: cupy_lora.copy_next_input_ids_inplace(
            8, engine.array(np.zeros((2, 6), I32)), two(), two(), two(), eight(), cu_array
        ),
        lambda: cupy_lora.prepare_position_slot_ids(8, two(), cu_array, two(), eight(), eight()),
        lambda: cupy_lora.slots_filtering(8, eight(), eight(), cu_array, two()),
        lambda: cupy_lora.slots_filtering(
            8, eight(), eight(), engine.array(np.array([0, 4, 8], I32)), cu_array[:2] + 9
        ),
    ]
    for call in calls[:4]:
        call()
        with monkeypatch.context() as patch:
            patch.setenv("CUPY_LORA_DEBUG", "1")
            with pytest.raises(ValueError, match=r"expected entries of 0 \.\. 8|expected steps of 0"):
                call()
    calls[4]()


def test_empty_batches(engine: Engine):
    none, one = engine.array(np.empty(0, I32)), engine.array(np.zeros(1, I32))
    empty = engine.array(np.empty((0, 4), I32))
    out = cupy_lora.block_tables_to_ragged(
        block_tables=empty, input_lengths=[], cache_lengths=[], input_lengths_tensor=none, cache_lengths_tensor=none,
        max_current_length=0,
    )  # fmt: skip
    assert out.shape == (0,)
    cupy_lora.block_tables_to_padded(0, one, empty, none)
    cupy_lora.copy_next_input_ids_inplace(1, empty, none, none, none, none, one)
    cupy_lora.prepare_position_slot_ids(0, none, one, one, none, none)
    cupy_lora.slots_filtering(0, none, none, one, none)


@given(data=st.data(), width=st.integers(1, 30), batch=st.integers(1, 8))
def test_padded_undoes_ragged(data: st.DataObject, width: int, batch: int):
    total = [data.draw(st.integers(0, width)) for _ in range(batch)]
    new = [data.draw(st.integers(0, length)) for length in total]
    cached = [length - n for length, n in zip(total, new, strict=True)]
    table = np.arange(batch * width, dtype=I32).reshape(batch, width)
    ragged = cupy_lora.block_tables_to_ragged(
        block_tables=table, input_lengths=new, cache_lengths=cached, input_lengths_tensor=np.array(new, I32),
        cache_lengths_tensor=np.array(cached, I32), max_current_length=width,
    )  # fmt: skip
    padded = np.full_like(table, NEVER)
    cupy_lora.block_tables_to_padded(width, cumulative(total, I64), padded, ragged)
    for b in range(batch):
        assert padded[b].tolist() == table[b, : total[b]].tolist() + [NEVER] * (width - total[b])


def test_errors_of_the_row_functions():
    two, three = np.zeros(2, I32), np.zeros(3, I32)
    with pytest.raises(ValueError, match=r"cu_seqlen: expected shape \(3\), got \(2,\)"):
        cupy_lora.block_tables_to_padded(1, two, np.zeros((2, 4), I32), three)
    with pytest.raises(TypeError, match="next_input_ids: expected dtype int32 or int64, got float32"):
        cupy_lora.copy_next_input_ids_inplace(1, np.zeros((2, 4), I32), two, two, two, np.zeros(2, np.float32), three)
    with pytest.raises(ValueError, match=r"slot_indices: expected shape \(4\), got \(3,\)"):
        cupy_lora.prepare_position_slot_ids(1, two, three, two, np.zeros(4, I32), three)
    with pytest.raises(ValueError, match="cu_slots: expected at least 2 entries, got 1"):
        cupy_lora.prepare_position_slot_ids(1, two, three, np.zeros(1, I32), two, two)
    with pytest.raises(ValueError, match="slots: expected a C-contiguous array"):
        cupy_lora.slots_filtering(1, np.zeros(8, I32)[::2], two, three, two)
    with pytest.raises(TypeError, match="max_slots: expected an integer, got str"):
        cupy_lora.slots_filtering("1", two, two, three, two)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="max_next_input_ids: expected an integer, got float"):
        cupy_lora.copy_next_input_ids_inplace(1.0, np.zeros((2, 4), I32), two, two, two, two, three)  # type: ignore[arg-type]


def test_a_decode_batch_is_one_thread_per_row():
    lengths = _arrays.view("x", np.zeros(250, I32))
    cu = _arrays.view("cu", np.zeros(251, I32))
    launch = _metadata_plan.position_slot_ids(lengths, cu, cu, lengths, lengths, 1)
    defines = dict(launch.kernel.defines)
    assert (defines["LANES"], defines["ITEMS"]) == (1, 1)
    assert 250 <= launch.grid[0] * launch.kernel.block < 250 + launch.kernel.block
    assert launch.grid[1:] == (1, 1)


def test_has_triton_is_has_gpu_kernels():
    assert cupy_lora.has_triton is cupy_lora.has_gpu_kernels
    assert isinstance(cupy_lora.has_triton(), bool)


@pytest.mark.gpu
def test_a_torch_table_gives_a_torch_result():
    torch = pytest.importorskip("torch")
    lengths = torch.tensor([1, 2], dtype=torch.int32, device="cuda")
    out = cupy_lora.block_tables_to_ragged(
        block_tables=torch.arange(8, dtype=torch.int32, device="cuda").reshape(2, 4), input_lengths=[1, 2],
        cache_lengths=[1, 2], input_lengths_tensor=lengths, cache_lengths_tensor=lengths, max_current_length=4,
    )  # fmt: skip
    assert isinstance(out, torch.Tensor)
    assert out.dtype == torch.int32
    assert out.tolist() == [0, 1, 4, 5, 6, 7]
