"""Kept launches: what identifies a call, what is looked at again each time, and what the driver is handed."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_gpu import Driver, install, on_gpu, words

import cupy_lora
from cupy_lora import _arrays, _cubins, _halves, _jit, metadata, norm, punica_kernels
from cupy_lora._arrays import BFLOAT16, FLOAT16, FLOAT32, INT32, INT64, Array
from cupy_lora._plans import Kept


@pytest.fixture(params=[False, True], ids=["serial", "early"])
def driver(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Driver:
    """A GPU that is not there, by both ways to launch, and no plans of other tests."""
    by_rows = (metadata._PADDED, metadata._COPY_NEXT, metadata._POSITION_SLOT, metadata._FILTERING)
    for plans in (
        *(module._plans for module in (_halves, norm, punica_kernels)),
        *(metadata._ragged_plans, metadata._step_plans),
        *(op.plans for op in by_rows),
    ):
        monkeypatch.setattr(plans, "_kept", {})
    driver = install(monkeypatch)
    driver.early = request.param
    return driver


KERNEL = _jit.Kernel("norm", "k", (), 128, 64)


def test_arguments_are_packed_by_their_own_bytes() -> None:
    struct = np.array([(7, 2.5, 3)], np.dtype([("a", np.int64), ("b", np.float32), ("c", np.int32)]))
    args = (on_gpu((4,), INT32, ptr=4096), None, np.int32(-2), struct, np.float32(1.5), np.uint8(3))
    packed, offsets = _jit.pack(args)
    raw = packed.tobytes()
    assert offsets == [0, 8, 16, 24, 40, 48]
    assert np.frombuffer(raw[:16], np.int64).tolist() == [4096, 0]
    assert np.frombuffer(raw[16:20], np.int32).tolist() == [-2]
    assert np.frombuffer(raw[24:40], struct.dtype)[0] == struct[0]
    assert np.frombuffer(raw[40:44], np.float32).tolist() == [1.5]
    assert raw[48] == 3
    assert len(raw) == 56


@pytest.mark.parametrize("value", [1.0, 1, np.zeros(2)], ids=["float", "int", "array"])
def test_a_value_without_the_parameters_type_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match="argument 1: expected"):
        _jit.pack((np.int32(1), value))


def test_a_kept_launch_hands_over_the_callers_addresses(driver: Driver) -> None:
    x, y, table = on_gpu((8, 16), FLOAT16), on_gpu((8, 32), FLOAT16), on_gpu((4,), INT64)
    x.obj, y.obj = object(), object()
    part = Array(y.ptr + 20, (8, 22), (32, 1), y.dtype, 0, y.obj)
    kept = Kept(_jit.Launch(KERNEL, (3, 2, 1), (part, np.int32(5), x, table, None, np.uint32(0))), (x, y))
    for at, stream in ((1, 5), (2, 6)):
        driver.stream = stream
        assert kept.run([at << 30, at << 20], (), False, ((5, np.uint32(9 + at)),)) == stream
        device, on, address, *sizes = driver.launches[-1]
        assert (device, on) == (0, stream)
        assert sizes == [1000, 3, 2, 1, 128, 1, 1, 64]
        assert words(address, 6) == [(at << 20) + 20, 5, at << 30, table.ptr, 0, 9 + at]


def test_structs_are_replaced_whole(driver: Driver) -> None:
    """Each load of an adapter passes another slot and other records to one launch."""
    record = np.dtype([("a", np.uint64), ("rank", np.int32), ("scale", np.float32)])
    first = np.zeros(1, np.dtype([("records", record, (2,))]))
    ready = _jit.Ready(_jit.Launch(KERNEL, (1, 1, 1), (on_gpu((4,), INT32, ptr=4096), np.int32(7), first)), 0)
    ready((), 5)
    assert words(driver.launches[-1][2], 3) == [4096, 7, 0]
    for slot in (3, 1):
        records = np.array([(11 + slot, 16, 0.5), (12, 8, 2.0)], record)
        ready((), 5, ((1, np.int32(slot)), (2, records)))
        address = driver.launches[-1][2]
        assert words(address, 2) == [4096, slot]
        place = ctypes.c_uint64.from_address(address + 16).value
        assert ctypes.string_at(place, 32) == records.tobytes()


def test_a_call_inside_a_call_has_arguments_of_its_own(driver: Driver) -> None:
    """As another thread's, while the driver reads the first one's."""
    x = on_gpu((4,), INT32)
    kept = Kept(_jit.Launch(KERNEL, (1, 1, 1), (x,)), (x,))

    def another() -> None:
        driver.during = None
        kept.run([222], (), False)

    driver.during = another
    kept.run([111], (), False)
    assert [words(address, 1) for _, _, address, *_ in driver.launches] == [[222], [111]]


def test_each_thread_gets_a_context_once_a_device(driver: Driver) -> None:
    arrays = [on_gpu((4,), INT32, device) for device in (0, 1)]
    kept = [Kept(_jit.Launch(KERNEL, (1, 1, 1), (array,)), (array,)) for array in arrays]

    def calls() -> None:
        for each in (*kept, *kept):
            each.run([1], (), False)

    calls()
    thread = threading.Thread(target=calls)
    thread.start()
    thread.join()
    assert [launch[0] for launch in driver.launches] == [0, 1] * 4, "launched on the device of the arrays"
    assert [launch[3] for launch in driver.launches] == [1000, 1001] * 4
    assert [device for _, device in driver.contexts] == [0, 1, 0, 1]
    assert len({ident for ident, _ in driver.contexts}) == 2
    assert driver.current == 0


def test_an_empty_grid_launches_nothing(driver: Driver) -> None:
    x = on_gpu((4,), INT32)
    Kept(_jit.Launch(KERNEL, (0, 1, 1), (x,)), (x,)).run([1], (), False)
    _jit.run(_jit.Launch(KERNEL, (1, 0, 1), (x,)), 0)
    assert driver.launches == []
    _jit.run(_jit.Launch(KERNEL, (1, 1, 1), (x,)), 0)
    assert len(driver.launches) == 1


@pytest.mark.parametrize("apart", [0, 1, 15, 16, 31, 32, 33])
def test_apart_is_exact(driver: Driver, apart: int) -> None:
    out, other = on_gpu((8,), INT32), on_gpu((4,), INT32)  # 32 and 16 bytes
    kept = Kept(_jit.Launch(KERNEL, (1, 1, 1), (out, other)), (out, other), ((0, 1),))
    assert kept.clear([4096, 4096 + apart]) == (apart >= 32)
    assert kept.clear([4096, 4096 - apart]) == (apart >= 16)
    empty = on_gpu((0,), INT32)
    assert Kept(_jit.Launch(KERNEL, (1, 1, 1), (out,)), (out, empty), ((0, 1),)).clear([4096, 4096])


def test_a_layout_is_not_taken_for_another() -> None:
    """Not by strides, dtype, device or alignment; nor an argument that is not there."""
    base = on_gpu((4, 8), FLOAT16, ptr=1 << 30)
    others = [
        on_gpu((8, 4), FLOAT16, ptr=1 << 30),
        Array(1 << 30, (4, 8), (16, 1), FLOAT16, 0, None),
        on_gpu((4, 8), BFLOAT16, ptr=1 << 30),
        on_gpu((4, 8), FLOAT16, 1, ptr=1 << 30),
        on_gpu((4, 8), FLOAT16, ptr=(1 << 30) + 2),
        None,
    ]
    layouts = {tuple(_arrays.read(("x",), (array,))[0]) for array in (base, *others)}
    assert len(layouts) == 1 + len(others)
    assert tuple(_arrays.read(("x",), (on_gpu((4, 8), FLOAT16, ptr=1 << 31),))[0]) in layouts


# ---- the ops over them --------------------------------------------------------------------------
def half(tokens: int = 8, rank: int = 16, width: int = 64) -> tuple[Array, Array, Array, Array]:
    """x, weights, y and the indices of a shrink."""
    return (
        on_gpu((tokens, width), FLOAT16),
        on_gpu((3, rank, width), FLOAT16),
        on_gpu((tokens, rank), FLOAT32),
        on_gpu((tokens,), INT32),
    )


def planned(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[str]:
    """The plans that this function makes from now on."""
    made: list[str] = []
    plan = getattr(module, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        made.append(name)
        return plan(*args, **kwargs)

    monkeypatch.setattr(module, name, counted)
    return made


def test_shrink_and_expand_are_planned_once(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    from cupy_lora import _lora_plan

    made = planned(monkeypatch, _lora_plan, "_half_kernel")
    for _ in range(3):
        x, a, y, slots = half()
        cupy_lora.bgmv_shrink(x, a, y, slots, 0.5)
        assert words(driver.launches[-1][2], 5) == [x.ptr, a.ptr, 0, y.ptr, slots.ptr]
        v, b, out = on_gpu((8, 16), FLOAT32), on_gpu((3, 64, 16), FLOAT16), on_gpu((8, 192), FLOAT16)
        cupy_lora.bgmv_expand_slice(v, b, out, slots, 64, 64)
        segments = [on_gpu((2,), INT32) for _ in range(3)]
        cupy_lora.sgmv_shrink(x, a, y, *segments, 2, 8, 0.5)
        assert words(driver.launches[-1][2], 7) == [x.ptr, a.ptr, 0, y.ptr, *(array.ptr for array in segments)]
        cupy_lora.sgmv_expand_slice(v, b, out, *segments, 2, 8, 64, 64)
    assert len(made) == 4
    assert len(driver.launches) == 12


def test_a_slice_moves_with_the_output(driver: Driver) -> None:
    for _ in range(2):
        v, b, out = on_gpu((8, 16), FLOAT32), on_gpu((3, 64, 16), FLOAT16), on_gpu((8, 192), FLOAT16)
        out.obj = object()
        cupy_lora.bgmv_expand_slice(v, b, out, on_gpu((8,), INT32), 64, 64)
        assert words(driver.launches[-1][2], 4) == [v.ptr, b.ptr, 0, out.ptr + 2 * 64]


def test_the_drop_in_functions_are_planned_once(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    from cupy_lora import _punica_plan

    made = planned(monkeypatch, _punica_plan, "_half_kernel")
    for _ in range(3):
        y, x, pointers = on_gpu((8, 16), FLOAT16), on_gpu((8, 64), FLOAT16), on_gpu((2,), INT64)
        punica_kernels.dispatch_bgmv(y, x, pointers, on_gpu((8,), INT64), 1, 1.0)
        starts, ends = on_gpu((2,), INT32), on_gpu((2,), INT32)
        punica_kernels.sgmv_cutlass(y, x, pointers, starts, ends, None, 0)
        punica_kernels.sgmv_shrink(y, x, pointers, starts, ends, None, 0)
        assert words(driver.launches[-1][2], 6) == [x.ptr, 0, pointers.ptr, y.ptr, starts.ptr, ends.ptr]
    assert len(made) == 3


def test_a_kept_plan_does_not_skip_a_check(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    x, a, y, slots = half()
    cupy_lora.bgmv_shrink(x, a, y, slots, 1.0)
    segments = [on_gpu((2,), INT32) for _ in range(3)]
    cupy_lora.sgmv_shrink(x, a, y, *segments, 2, 8, 1.0)
    cupy_lora.sgmv_shrink(x, a, y, *segments, 2, 1, 1.0)
    before = len(driver.launches)
    inside = on_gpu(y.shape, FLOAT32, ptr=x.ptr + 16)
    bad: list[tuple[type[Exception], str, Callable[[], object]]] = [
        (TypeError, "scaling: expected a real number, got bool", lambda: cupy_lora.bgmv_shrink(x, a, y, slots, True)),
        (TypeError, "scaling: expected a real", lambda: cupy_lora.bgmv_shrink(x, a, y, slots, np.ones(1))),
        (ValueError, "overlaps inputs", lambda: cupy_lora.bgmv_shrink(x, a, inside, slots, 1.0)),
        (TypeError, "lora_indices_tensor: expected an array", lambda: cupy_lora.bgmv_shrink(x, a, y, None, 1.0)),
        (ValueError, "same device", lambda: cupy_lora.bgmv_shrink(x, on_gpu(a.shape, FLOAT16, 1), y, slots, 1.0)),
        (TypeError, "batches: expected", lambda: cupy_lora.sgmv_shrink(x, a, y, *segments, 2.0, 8, 1.0)),
        (TypeError, "max_seq_len", lambda: cupy_lora.sgmv_shrink(x, a, y, *segments, 2, True, 1.0)),
        (ValueError, "batches: expected the length", lambda: cupy_lora.sgmv_shrink(x, a, y, *segments, 3, 8, 1.0)),
    ]
    for error, text, call in bad:
        with pytest.raises(error, match=text):
            call()
    assert len(driver.launches) == before
    cupy_lora.bgmv_shrink(x, a, y, slots, 1.0)
    assert len(driver.launches) == before + 1
    monkeypatch.setenv("CUPY_LORA_DEBUG", "1")
    monkeypatch.setattr(_halves, "debug_slots", lambda *args: pytest.fail("looked at"))
    with pytest.raises(pytest.fail.Exception, match="looked at"):
        cupy_lora.bgmv_shrink(x, a, y, slots, 1.0)


def test_in_place_and_fresh_outputs_of_a_norm_are_kept(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    made = planned(monkeypatch, norm, "plan_rms_norm")
    monkeypatch.setattr(norm, "empty", on_gpu)
    w = on_gpu((64,), FLOAT16)
    for _ in range(3):
        x = on_gpu((8, 64), FLOAT16)
        assert cupy_lora.rms_norm(x, w, 1e-6, x) is x
        assert words(driver.launches[-1][2], 4) == [x.ptr, 0, w.ptr, x.ptr]
        out = cupy_lora.rms_norm(x, w, 1e-6)
        assert words(driver.launches[-1][2], 4) == [x.ptr, 0, w.ptr, out.ptr]
        y = on_gpu((8, 64), FLOAT16)
        assert cupy_lora.rms_norm(x, w, 1e-6, y) is y
        assert words(driver.launches[-1][2], 4) == [x.ptr, 0, w.ptr, y.ptr]
        cupy_lora.fused_add_rms_norm(x, y, w)
        assert words(driver.launches[-1][2], 4) == [x.ptr, y.ptr, w.ptr, x.ptr]
    assert len(made) == 4
    with pytest.raises(ValueError, match="out: expected memory apart from that of weight"):
        cupy_lora.rms_norm(x, w, 1e-6, on_gpu((8, 64), FLOAT16, ptr=w.ptr - 64))


class Tensor:
    """What the library reads of a torch tensor on a GPU."""

    is_cuda = True
    dtype = "torch.float16"

    def __init__(self, array: Array) -> None:
        self.shape, self._array = array.shape, array

    def data_ptr(self) -> int:
        return self._array.ptr

    def is_contiguous(self) -> bool:
        return self._array.contiguous

    def stride(self) -> tuple[int, ...]:
        return self._array.strides

    def get_device(self) -> int:
        return self._array.device


class Parameter(Tensor):
    pass


@pytest.fixture
def viewed(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A torch that is not there either; the tensors of which a view was made."""
    torch = SimpleNamespace(Tensor=Tensor, _C=SimpleNamespace(_cuda_getCurrentRawStream=lambda device: 900 + device))
    monkeypatch.setitem(sys.modules, "torch", torch)  # type: ignore[arg-type]
    monkeypatch.setattr(_arrays, "_TORCH_DTYPES", {"torch.float16": FLOAT16})
    monkeypatch.setattr(_arrays, "_KINDS", _arrays._KINDS.copy())
    found: list[Any] = []
    from_torch = _arrays._from_torch
    monkeypatch.setattr(_arrays, "_from_torch", lambda *args: found.append(args) or from_torch(*args))
    return found


def test_tensors_are_read_without_a_view_and_run_on_torchs_stream(driver: Driver, viewed: list[Any]) -> None:
    for count in (1, 2):
        x, w, out = (Tensor(on_gpu(shape, FLOAT16)) for shape in ((8, 64), (64,), (8, 64)))
        cupy_lora.rms_norm(x, Parameter(w._array), 1e-6, out)
        assert words(driver.launches[-1][2], 4) == [x.data_ptr(), 0, w.data_ptr(), out.data_ptr()]
        assert [launch[1] for launch in driver.launches] == [900] * count
        assert len(viewed) == 3, "the second call reads attributes only"
    # Strides are in elements there and in bytes in CuPy: the same numbers are not the same layout.
    transposed = Array(on_gpu((64, 64), FLOAT16).ptr, (64, 64), (128, 2), FLOAT16, 0, None)
    assert _arrays.read(("x",), (Tensor(transposed),))[0] != _arrays.read(("x",), (transposed,))[0]


def test_rows_apart_are_not_taken_for_rows_together(
    driver: Driver, viewed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = planned(monkeypatch, norm, "plan_rms_norm")
    w = Tensor(on_gpu((64,), FLOAT16))

    def call(rows: int, *strides: int) -> None:
        x = Tensor(Array(on_gpu((64, 64), FLOAT16).ptr, (rows, 64), strides, FLOAT16, 0, None))
        cupy_lora.rms_norm(x, w, 1e-6, x)
        assert words(driver.launches[-1][2], 4) == [x.data_ptr(), 0, w.data_ptr(), x.data_ptr()]

    for rows, strides, plans in (
        (8, (64, 1), 1),
        (8, (96, 1), 2),
        (8, (65, 1), 3),
        (8, (64, 1), 3),
        (1, (64, 1), 4),
        (1, (96, 1), 4),  # one row is one row, wherever a second one would be
        (1, (65, 1), 4),
    ):
        call(rows, *strides)
        assert len(made) == plans
    with pytest.raises(ValueError, match="input: expected a contiguous last axis"):
        call(8, 1, 64)
    with pytest.raises(ValueError, match="out: expected rows that do not overlap"):
        call(8, 32, 1)


def test_the_ragged_result_is_new_in_each_call(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """One launch serves results of any length, whose addresses and lengths it is handed."""
    made = planned(monkeypatch, metadata._metadata_plan, "ragged")
    table, lengths = on_gpu((2, 8), INT32), [on_gpu((2,), INT32) for _ in range(2)]

    def call(news: list[int], caches: list[int], out: Array | None = None) -> Array:
        result: Array = cupy_lora.block_tables_to_ragged(
            block_tables=table, input_lengths=news, cache_lengths=caches, input_lengths_tensor=lengths[0],
            cache_lengths_tensor=lengths[1], max_current_length=8, out=out,
        )  # fmt: skip
        return result

    for caches in ([0, 1], [7, 3], [6, 6]):
        out = call([1, 1], caches)
        assert out.shape == (2 + sum(caches),)
        given = [table.ptr, 0, 8, lengths[0].ptr, lengths[1].ptr, out.ptr, 2 + sum(caches)]
        got = words(driver.launches[-1][2], 7)
        assert [got[0], *got[3:6], got[6] & 0xFFFFFFFF] == [given[0], *given[3:]]
        mine = on_gpu((9,), INT32)
        assert call([], [], mine) is mine
        got = words(driver.launches[-1][2], 7)
        assert (got[5], got[6] & 0xFFFFFFFF) == (mine.ptr, 9)
    assert len(made) == 1
    count = len(driver.launches)
    bad: list[tuple[type[Exception], str, Callable[[], object]]] = [
        (ValueError, r"block_tables: expected rows of at least 9 entries \(row 1\)", lambda: call([1, 1], [0, 8])),
        (ValueError, "expected lengths >= 0, got 1 and -1 at 0", lambda: call([1, 1], [-1, 0])),
        (ValueError, "input_lengths: expected 2 lengths, got 1", lambda: call([1], [0, 0])),
        (TypeError, "out: expected dtype int32", lambda: call([1, 1], [0, 0], on_gpu((9,), INT64))),
        (ValueError, "out: expected shape", lambda: call([1, 1], [0, 0], on_gpu((9, 1), INT32))),
        (ValueError, "out: expected an array on the same device", lambda: call([1], [0], on_gpu((9,), INT32, 1))),
    ]
    for error, text, wrong in bad:
        with pytest.raises(error, match=text):
            wrong()
    assert call([0, 0], [0, 0]).shape == (0,)
    assert len(driver.launches) == count


def test_metadata_is_one_launch_and_at_most_one_allocation(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """At first and again; of the whole decode step too, the schedule of its adapters included."""
    made: list[tuple[int, ...]] = []
    monkeypatch.setattr(_arrays, "empty", lambda shape, *rest: made.append(shape) or on_gpu(shape, *rest))
    monkeypatch.setattr(_cubins, "start", lambda kernels, arch: None)
    batch = cupy_lora.LoraBatch(8, max_adapters=4)

    def ints(*shape: int) -> Array:
        return on_gpu(shape, INT32)

    tables = {"block_tables": ints(4, 32), "max_current_length": 16}
    ragged = {"input_lengths": [1] * 4, "cache_lengths": [3, 15, 0, 2]}
    ragged |= {"input_lengths_tensor": ints(4), "cache_lengths_tensor": ints(4)}
    step = {"input_lengths": ints(4), "cache_lengths": ints(4), "cu_slots": ints(5), "position_ids": ints(4)}
    step |= {"slot_indices": ints(4), "block_tables_ragged": ints(24), "cu_seqlen": ints(5), "ragged_indptr": ints(5)}
    calls: list[tuple[int, Callable[[], object]]] = [
        (1, lambda: cupy_lora.block_tables_to_ragged(**tables, **ragged)),
        (0, lambda: cupy_lora.block_tables_to_ragged(**tables, **ragged, out=ints(24))),
        (0, lambda: cupy_lora.block_tables_to_padded(8, ints(5), ints(4, 8), ints(20))),
        (0, lambda: cupy_lora.copy_next_input_ids_inplace(1, ints(4, 8), *(ints(4) for _ in range(4)), ints(5))),
        (0, lambda: cupy_lora.prepare_position_slot_ids(1, ints(4), ints(5), ints(5), ints(4), ints(4))),
        (0, lambda: cupy_lora.slots_filtering(8, ints(99), ints(50), ints(5), ints(4))),
        (0, lambda: cupy_lora.prepare_decode_step(**tables, **step)),
        (0, lambda: cupy_lora.prepare_decode_step(**tables, **step, batch=batch, adapter_indices=ints(4))),
    ]
    for allocations, call in calls:
        for _ in range(2):
            made.clear()
            driver.launches.clear()
            call()
            assert (len(driver.launches), len(made)) == (1, allocations)
    assert batch.num_tokens == 4
