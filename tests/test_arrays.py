"""Arrays in: what view reads of each kind, and what the checks say."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import engines
import numpy as np
import pytest
from cases import DTYPES

from cupy_lora import _arrays
from cupy_lora._arrays import CPU, Array, view


@pytest.mark.parametrize("dtype", [*DTYPES.values(), np.dtype(np.int32), np.dtype(np.int64)], ids=str)
def test_numpy(dtype: np.dtype) -> None:
    base = np.zeros((6, 10), dtype)
    array = view("x", base[1:5:2, 3:])
    assert array.ptr == base.ctypes.data + (10 + 3) * dtype.itemsize
    assert array.shape == (2, 7)
    assert array.strides == (20, 1)
    assert array.dtype == dtype
    assert array.device == CPU
    assert array.ndim == 2
    assert array.size == 14
    assert array.nbytes == 14 * dtype.itemsize
    assert array.span == (array.ptr, array.ptr + (20 + 7) * dtype.itemsize)
    assert array.numpy().base is base
    assert view("x", array) is array


def test_torch_in_host_memory() -> None:
    torch = pytest.importorskip("torch")
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        tensor = torch.arange(12).to(dtype).reshape(3, 4)[:, 1:]
        array = view("x", tensor)
        assert array.ptr == tensor.data_ptr()
        assert array.shape == (3, 3)
        assert array.strides == (4, 1)
        assert array.device == CPU
        assert array.numpy().astype(np.float64)[2].tolist() == [9, 10, 11]
    with pytest.raises(TypeError, match=r"x: expected a tensor of a float or integer dtype, got torch\.complex64"):
        view("x", torch.zeros(2, dtype=torch.complex64))


def test_jax_in_host_memory() -> None:
    jax = pytest.importorskip("jax")
    cpu = jax.devices("cpu")[0]
    array = view("x", jax.device_put(np.arange(6, dtype=np.float32).reshape(2, 3), cpu))
    assert array.device == CPU
    assert array.numpy().tolist() == [[0, 1, 2], [3, 4, 5]]


class Dlpack:
    """Speaks DLPack and nothing else."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def __dlpack__(self, **options: object) -> object:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()


def test_dlpack_in_host_memory_is_not_copied() -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    array = view("x", Dlpack(values))
    assert array.ptr == values.ctypes.data
    assert array.shape == (2, 3)
    assert array.strides == (3, 1)


@pytest.mark.parametrize("value", [1.0, "x", None, [1, 2], object()], ids=lambda value: type(value).__name__)
def test_not_an_array(value: object) -> None:
    with pytest.raises(TypeError, match=f"x: expected an array .*got {type(value).__name__}"):
        view("x", value)


@pytest.mark.parametrize(
    ("array", "contiguous"),
    [
        (np.zeros((3, 4)), True),
        (np.zeros((3, 4)).T, False),
        (np.zeros((3, 4))[:, :3], False),
        (np.zeros((3, 4))[:1, :3], True),
        (np.zeros((3, 1, 4)), True),
        (np.zeros((0, 4))[:, ::2], True),
        (np.zeros((4, 1))[::2], False),
        (np.zeros(5)[::-1], False),
        (np.zeros(()), True),
    ],
)
def test_contiguous(array: np.ndarray, contiguous: bool) -> None:
    assert view("x", array).contiguous is contiguous
    if contiguous:
        _arrays.check_contiguous("x", view("x", array))
    else:
        with pytest.raises(ValueError, match="x: expected a C-contiguous array, got shape"):
            _arrays.check_contiguous("x", view("x", array))


def test_cupy_layouts_are_told_apart_as_views_are() -> None:
    """Calls of one layout share a launch: the layout says as much as a view does, without making one."""
    cupy = pytest.importorskip("cupy")
    memory = cupy.cuda.UnownedMemory(1 << 40, 1 << 20, None, 0)

    def made(dtype: str = "float16", offset: int = 0) -> Any:
        return cupy.ndarray((8, 16), dtype, memptr=cupy.cuda.MemoryPointer(memory, offset))

    base = made()
    arrays = [
        base, made(), made("int16"), made(offset=2), made(offset=16), base.T, base[:, :8], base[:, :1], base[::2, :1],
        base[:1], base[:1, :8], base[:1, ::2], base[2:3, :8], base[:0], base[:0, :8], base[0], base[0, :1], base[:, 0],
        base[::2, 0], base[0, ::2], base[::-1], base[0].reshape(1, 16), base.reshape(16, 8), base.reshape(128),
        base[0, 0], base.reshape(2, 4, 16), base.reshape(8, 1, 16),
    ]  # fmt: skip
    for one in arrays:
        for other in arrays:
            views = [view("x", array) for array in (one, other)]
            alike = [
                (
                    array.shape,
                    True if array.contiguous else array.strides,
                    array.dtype,
                    array.device,
                    array.ptr % 16,
                )
                for array in views
            ]
            layouts = [_arrays.read(("x",), (array,))[0] for array in (one, other)]
            assert (layouts[0] == layouts[1]) == (alike[0] == alike[1]), alike
            # A view of another library's array of that layout is no CuPy array: strides there are counted in elements.
            assert _arrays.read(("x",), (views[1],))[0] != layouts[0]
    _, pointers, objs, on_torch = _arrays.read(("x", "y", "z"), (base[1:], None, base))
    assert (pointers, on_torch) == ([(1 << 40) + 32, 0, 1 << 40], False)
    assert objs[2] is base


def test_a_cupy_without_the_private_name_is_read_by_views(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        """An array of such a CuPy."""

        itemsize, shape, dtype = 2, (2, 3), np.dtype(np.float16)
        strides, data = (8, 2), SimpleNamespace(ptr=4098, device_id=1)

    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(ndarray=Other))  # type: ignore[arg-type]
    monkeypatch.setattr(_arrays, "_KINDS", _arrays._KINDS.copy())
    for _ in range(2):
        (layout,), pointers, (array,), on_torch = _arrays.read(("x",), (Other(),))
        assert layout == (2, (2, 3), (4, 1), np.float16, 1)
        assert (pointers, array.ptr, array.strides, on_torch) == ([4098], 4098, (4, 1), False)


def test_span_of_negative_strides() -> None:
    base = np.zeros(10, np.int32)
    array = view("x", base[8:2:-2])
    assert array.span == (base.ctypes.data + 4 * 4, base.ctypes.data + 9 * 4)
    assert view("x", base[3:3]).span[0] == view("x", base[3:3]).span[1]


def test_overlap() -> None:
    base = np.zeros(10, np.int32)
    first, second, cross = (view("a", base[:5]), view("b", base[5:]), view("c", base[4:6]))
    _arrays.check_no_overlap("out", first, b=second, none=None)
    _arrays.check_no_overlap("out", first, empty=view("e", base[2:2]))
    for array in (first, second):
        with pytest.raises(ValueError, match="out: expected memory of its own, got memory that overlaps c"):
            _arrays.check_no_overlap("out", array, c=cross)


def test_same_device() -> None:
    host = view("x", np.zeros(3))
    gpu0, gpu1 = (Array(4096, (3,), (1,), host.dtype, device, None) for device in (0, 1))
    assert _arrays.same_device(x=host, y=None, z=host) == CPU
    assert _arrays.same_device(x=gpu1, y=gpu1) == 1
    with pytest.raises(ValueError, match=r"y: expected an array on the same device as x \(GPU 0\), got one on GPU 1"):
        _arrays.same_device(x=gpu0, y=gpu1)
    with pytest.raises(
        ValueError, match=r"y: expected an array on the same device as x \(the host\), got one on GPU 0"
    ):
        _arrays.same_device(x=host, y=gpu0)


def test_check_dtype_and_shape() -> None:
    array = view("x", np.zeros((2, 3), np.float32))
    _arrays.check_dtype("x", array, _arrays.FLOATS)
    with pytest.raises(TypeError, match="x: expected dtype float16 or bfloat16, got float32"):
        _arrays.check_dtype("x", array, _arrays.HALVES)
    _arrays.check_shape("x", array, ("rows", 3))
    for expected in ((2, 4), (2,), ("rows", 3, 1)):
        with pytest.raises(ValueError, match=r"x: expected shape \(.*\), got \(2, 3\)"):
            _arrays.check_shape("x", array, expected)


def test_a_gpu_array_has_no_numpy_view() -> None:
    with pytest.raises(TypeError, match="expected an array in host memory"):
        Array(0, (1,), (1,), np.dtype(np.float32), 0, object()).numpy()


# ---------------------------------------------------------------------------------------- GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=str)
def test_cupy(gpu: engines.Engine, dtype: np.dtype) -> None:
    base = gpu.array(np.zeros((6, 10), dtype))
    array = view("x", base[1:5:2, 3:])
    assert array.ptr == base.data.ptr + 13 * dtype.itemsize
    assert (array.shape, array.strides, array.dtype, array.device) == ((2, 7), (20, 1), dtype, 0)


@pytest.mark.gpu
def test_torch_on_the_gpu(gpu: engines.Engine) -> None:
    torch = pytest.importorskip("torch")
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.int32, torch.int64):
        tensor = torch.zeros(6, 10, dtype=dtype, device="cuda")[1:5:2, 3:]
        array = view("x", tensor)
        assert (array.ptr, array.shape, array.strides, array.device) == (tensor.data_ptr(), (2, 7), (20, 1), 0)
        assert array.dtype.itemsize == tensor.element_size()


@pytest.mark.gpu
def test_torch_stream_is_the_callers(gpu: engines.Engine) -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.zeros(2, device="cuda")
    assert _arrays.stream_for(0, tensor).ptr == torch.cuda.current_stream().cuda_stream
    with torch.cuda.stream(torch.cuda.Stream()):
        assert _arrays.stream_for(0, tensor).ptr == torch.cuda.current_stream().cuda_stream


@pytest.mark.gpu
def test_cupy_stream_is_the_callers(gpu: engines.Engine) -> None:
    import cupy

    with cupy.cuda.Stream(non_blocking=True) as stream:
        assert _arrays.stream_for(0, gpu.array(np.zeros(2))).ptr == stream.ptr


@pytest.mark.gpu
def test_jax_on_the_gpu_is_not_copied(gpu: engines.Engine) -> None:
    jax = pytest.importorskip("jax")
    array = jax.device_put(np.arange(6, dtype=np.float32).reshape(2, 3), jax.devices("gpu")[0])
    array.block_until_ready()
    seen = view("x", array)
    assert seen.ptr == array.unsafe_buffer_pointer()
    assert (seen.shape, seen.dtype, seen.device) == ((2, 3), np.dtype(np.float32), 0)


@pytest.mark.gpu
def test_cuda_array_interface(gpu: engines.Engine) -> None:
    class Interface:
        def __init__(self, array: object) -> None:
            self.__cuda_array_interface__ = array.__cuda_array_interface__

    base = gpu.array(np.zeros((4, 6), np.float16))
    array = view("x", Interface(base[:, 2:]))
    assert (array.ptr, array.shape, array.strides) == (base.data.ptr + 4, (4, 4), (6, 1))
