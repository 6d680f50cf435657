"""Arrays in: CuPy, torch, JAX, NumPy and whatever speaks DLPack, without a copy and without importing any of them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Final

import ml_dtypes
import numpy as np

from . import _jit

CPU: Final = -1
BFLOAT16: Final = np.dtype(ml_dtypes.bfloat16)
FLOAT16: Final = np.dtype(np.float16)
FLOAT32: Final = np.dtype(np.float32)
INT32: Final = np.dtype(np.int32)
INT64: Final = np.dtype(np.int64)
HALVES: Final = (FLOAT16, BFLOAT16)
FLOATS: Final = (FLOAT16, BFLOAT16, FLOAT32)
INDICES: Final = (INT32, INT64)


class Array:
    """A view of the caller's array: where it is and what it looks like. Holds no memory of its own but keeps it alive.

    Attributes
    ----------
    ptr : int
        Address of the first element.
    shape : tuple of int
    strides : tuple of int
        In elements, not bytes.
    dtype : numpy.dtype
    device : int
        CUDA device number, or -1 for host memory.
    obj : object
        The CuPy or NumPy array behind it, or the torch tensor.
    """

    __slots__ = ("device", "dtype", "obj", "ptr", "shape", "strides")

    def __init__(
        self, ptr: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: np.dtype[Any], device: int, obj: Any
    ) -> None:
        self.ptr = ptr
        self.shape = shape
        self.strides = strides
        self.dtype = dtype
        self.device = device
        self.obj = obj

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        size = 1
        for extent in self.shape:
            size *= extent
        return size

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def contiguous(self) -> bool:
        """C-contiguous; axes of extent 1 do not count, an empty array is contiguous."""
        if 0 in self.shape:
            return True
        expected = 1
        for extent, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if extent != 1 and stride != expected:
                return False
            expected *= extent
        return True

    def aligned(self, nbytes: int) -> bool:
        """Whether the first element's address is a multiple of ``nbytes``."""
        return self.ptr % nbytes == 0

    @property
    def span(self) -> tuple[int, int]:
        """First byte and one past the last byte that the array can touch."""
        low = high = 0
        for extent, stride in zip(self.shape, self.strides, strict=True):
            if extent == 0:
                return self.ptr, self.ptr
            reach = (extent - 1) * stride
            low, high = low + min(reach, 0), high + max(reach, 0)
        item = self.dtype.itemsize
        return self.ptr + low * item, self.ptr + (high + 1) * item

    def numpy(self) -> np.ndarray:
        """The array as NumPy sees it; host arrays only."""
        if not isinstance(self.obj, np.ndarray):
            raise TypeError(f"cupy_lora: expected an array in host memory, got {type(self.obj).__name__}")
        return self.obj


_TORCH_DTYPES: dict[Any, np.dtype[Any]] = {}


def _torch_dtypes(torch: Any) -> dict[Any, np.dtype[Any]]:
    if not _TORCH_DTYPES:
        _TORCH_DTYPES.update(
            {
                torch.float16: FLOAT16,
                torch.bfloat16: BFLOAT16,
                torch.float32: FLOAT32,
                torch.float64: np.dtype(np.float64),
                torch.int64: INT64,
                torch.int32: INT32,
                torch.int16: np.dtype(np.int16),
                torch.int8: np.dtype(np.int8),
                torch.uint8: np.dtype(np.uint8),
                torch.bool: np.dtype(np.bool_),
            }
        )
    return _TORCH_DTYPES


_OTHER, _NUMPY, _CUPY, _TORCH, _VIEW, _NONE, _OLD_CUPY = range(7)
_KINDS: dict[type, int] = {np.ndarray: _NUMPY, Array: _VIEW, type(None): _NONE}  # of the types met so far


def _kind(obj: Any) -> int:
    """What reads this object; subclasses (torch.nn.Parameter) as what they derive from."""
    found = _KINDS.get(type(obj))
    if found is not None:
        return found
    torch, cupy = sys.modules.get("torch"), sys.modules.get("cupy")
    if isinstance(obj, np.ndarray):
        kind = _NUMPY
    elif torch is not None and isinstance(obj, torch.Tensor):
        kind = _TORCH
    elif cupy is not None and isinstance(obj, cupy.ndarray):
        # Not a public name; it tells in 15 ns what obj.strides tells in 60 and obj.flags in 110.
        kind = _CUPY if hasattr(obj, "_c_contiguous") else _OLD_CUPY
    else:
        return _OTHER  # not kept: another object of this type may carry another protocol
    _KINDS[type(obj)] = kind
    return kind


def is_torch(obj: Any) -> bool:
    """Whether it is a torch tensor, so that torch's stream is the caller's."""
    return _kind(obj) == _TORCH


def view(name: str, obj: Any) -> Array:
    """The caller's array as an :class:`Array`, without a copy.

    Raises
    ------
    TypeError
        If ``obj`` is not an array, or has a dtype that no kernel takes.
    """
    kind = _kind(obj)
    if kind == _VIEW:
        return obj  # type: ignore[no-any-return]
    if kind in (_CUPY, _OLD_CUPY):
        return _from_cupy(obj)
    if kind == _TORCH:
        return _from_torch(name, obj, sys.modules["torch"])
    if kind == _NUMPY:
        return _from_numpy(obj)
    return _from_protocol(name, obj)


def views(names: Sequence[str], objs: Sequence[Any]) -> tuple[Array, ...]:
    """:func:`view` of each."""
    return tuple(view(name, obj) for name, obj in zip(names, objs, strict=True))


def read(names: Sequence[str], objs: Sequence[Any]) -> tuple[list[Any], list[int], Sequence[Any], bool]:
    """What calls are told apart by: of CuPy arrays and torch tensors without a view of them, which costs more.

    Parameters
    ----------
    names : sequence of str
        For errors.
    objs : sequence of array or None

    Returns
    -------
    layout : list
        Hashable: shape, strides, dtype, device and address modulo 16 of each. Contiguous arrays of one shape are alike,
        whatever their strides along axes of extent 1: nothing goes by those.
    pointers : list of int
        Address of each; 0 for None.
    objs : sequence
        What was passed, with an :class:`Array` in place of what is neither CuPy's nor torch's (on a GPU).
    on_torch : bool
        Whether one of them is torch's, so that its stream is the caller's.
    """
    layout: list[Any] = []
    pointers: list[int] = []
    on_torch = False
    for at, obj in enumerate(objs):
        kind = _KINDS.get(type(obj)) or _kind(obj)
        if kind == _CUPY:
            data = obj.data
            pointer = data.ptr
            # An attribute that is a tuple costs four times one that is a number.
            shape = obj.size if obj.ndim == 1 else obj.shape
            layout.append((shape, obj._c_contiguous or obj.strides, obj.dtype, data.device_id, pointer & 15))
        elif kind == _TORCH and obj.is_cuda:
            pointer = obj.data_ptr()
            strides = obj.is_contiguous() or obj.stride()
            layout.append((obj.shape, strides, obj.dtype, obj.get_device(), pointer & 15))
            on_torch = True
        elif kind == _NONE:
            pointer = 0
            layout.append(None)
        else:
            array = view(names[at], obj)
            pointer = array.ptr
            # The order is another one: strides are in elements here, in bytes above.
            layout.append((pointer & 15, array.shape, array.strides, array.dtype, array.device))
            if kind != _VIEW:
                objs = [*objs[:at], array, *objs[at + 1 :]]
            on_torch = on_torch or is_torch(array.obj)
        pointers.append(pointer)
    return layout, pointers, objs, on_torch


def _from_numpy(obj: np.ndarray) -> Array:
    item = obj.itemsize
    strides = obj.strides if item == 1 else tuple([stride // item for stride in obj.strides])
    return Array(obj.__array_interface__["data"][0], obj.shape, strides, obj.dtype, CPU, obj)


def _from_cupy(obj: Any) -> Array:
    item = obj.itemsize
    strides = tuple([stride // item for stride in obj.strides])  # a list: half the time of a generator
    return Array(obj.data.ptr, obj.shape, strides, obj.dtype, obj.data.device_id, obj)


def _from_torch(name: str, obj: Any, torch: Any) -> Array:
    dtype = (_TORCH_DTYPES or _torch_dtypes(torch)).get(obj.dtype)
    if dtype is None:
        raise TypeError(f"{name}: expected a tensor of a float or integer dtype, got {obj.dtype}")
    if obj.is_cuda:  # and get_device: a fifth of the time that obj.device's attributes take
        return Array(obj.data_ptr(), tuple(obj.shape), obj.stride(), dtype, obj.get_device(), obj)
    if obj.device.type != "cpu":
        raise TypeError(f"{name}: expected a tensor on a CUDA device or in host memory, got one on {obj.device}")
    # torch has no bfloat16 bridge to NumPy; its int16 view has one, and shares the memory.
    plain = obj.detach()
    host = plain.view(torch.int16).numpy().view(BFLOAT16) if dtype == BFLOAT16 else plain.numpy()
    return _from_numpy(host)


def _from_protocol(name: str, obj: Any) -> Array:
    on_gpu = hasattr(obj, "__cuda_array_interface__")
    if not on_gpu and hasattr(obj, "__dlpack_device__"):
        on_gpu = int(obj.__dlpack_device__()[0]) in (2, 13)  # kDLCUDA, kDLCUDAManaged
    if on_gpu:
        cupy = _jit._cupy()
        array = cupy.from_dlpack(obj) if hasattr(obj, "__dlpack__") else cupy.asarray(obj)
        _jit.keep_imported(array)
        return _from_cupy(array)
    if hasattr(obj, "__array__") or hasattr(obj, "__array_interface__"):
        return _from_numpy(np.asarray(obj))
    if hasattr(obj, "__dlpack__"):
        return _from_numpy(np.from_dlpack(obj))
    raise TypeError(
        f"{name}: expected an array (CuPy, torch, JAX, NumPy, DLPack or __cuda_array_interface__), "
        f"got {type(obj).__name__}"
    )


def same_device(**arrays: Array | None) -> int:
    """The one device that all arrays are on (-1: the host).

    Raises
    ------
    ValueError
        If they are on different devices, or some on the host and some on a GPU.
    """
    first_name, device = "", None
    for name, array in arrays.items():
        if array is None:
            continue
        if device is None:
            first_name, device = name, array.device
        elif array.device != device:
            raise ValueError(
                f"{name}: expected an array on the same device as {first_name} ({_device_name(device)}), "
                f"got one on {_device_name(array.device)}"
            )
    if device is None:
        raise ValueError("expected at least one array, got none")
    return device


def _device_name(device: int) -> str:
    return "the host" if device == CPU else f"GPU {device}"


def dtype_among(dtype: Any, allowed: Sequence[np.dtype[Any]]) -> np.dtype[Any]:
    """The dtype that an argument ``dtype`` names; ml_dtypes, imported here, makes "bfloat16" known to NumPy.

    Raises
    ------
    TypeError
        If it names none, or none of these.
    """
    names = " or ".join(each.name for each in allowed)
    try:
        found: np.dtype[Any] = np.dtype(dtype)
    except TypeError:
        raise TypeError(f"dtype: expected {names}, got {dtype!r}") from None
    if found not in allowed:
        raise TypeError(f"dtype: expected {names}, got {found.name}")
    return found


def check_dtype(name: str, array: Array, allowed: Sequence[np.dtype[Any]]) -> None:
    """TypeError unless the array's dtype is one of ``allowed``."""
    if array.dtype not in allowed:
        raise TypeError(f"{name}: expected dtype {' or '.join(d.name for d in allowed)}, got {array.dtype.name}")


def check_shape(name: str, array: Array, expected: tuple[int | str, ...]) -> None:
    """ValueError unless the shape matches; a str in ``expected`` names an axis of any extent."""
    fits = array.ndim == len(expected) and all(
        isinstance(want, str) or want == got for want, got in zip(expected, array.shape, strict=False)
    )
    if not fits:
        text = ", ".join(str(want) for want in expected)
        raise ValueError(f"{name}: expected shape ({text}), got {array.shape}")


def check_contiguous(name: str, array: Array) -> None:
    """ValueError unless the array is C-contiguous."""
    if not array.contiguous:
        raise ValueError(
            f"{name}: expected a C-contiguous array, got shape {array.shape} with strides {array.strides} (elements)"
        )


def check_no_overlap(out_name: str, out: Array, **inputs: Array | None) -> None:
    """ValueError if the output's memory overlaps that of an input."""
    low, high = out.span
    for name, array in inputs.items():
        if array is None:
            continue
        start, stop = array.span
        if start < high and low < stop and array.size and out.size:
            raise ValueError(f"{out_name}: expected memory of its own, got memory that overlaps {name}")


def stream_for(device: int, *objs: Any) -> Any:
    """The caller's stream: torch's current one where a torch tensor was passed, else CuPy's; None on the host."""
    if device == CPU:
        return None
    if any(is_torch(obj) for obj in objs):
        return _torch_stream(device)
    return _jit._cupy().cuda.get_current_stream(device)


def handle_for(device: int, on_torch: bool) -> int:
    """The handle of :func:`stream_for`'s stream of a GPU."""
    handle: int
    if on_torch:
        # torch.cuda.current_stream() builds an object each call (about 2 us); the raw handle does not.
        handle = sys.modules["torch"]._C._cuda_getCurrentRawStream(device)
    else:  # as _jit.stream_handle, a call less
        handle = (_jit._driver or _jit._load_driver()).current_stream(device).ptr
    return handle


def stream_of(device: int, on_torch: bool) -> Any:
    """:func:`stream_for` where it is known whether a torch tensor was passed."""
    if on_torch:
        return _torch_stream(device)
    return _jit._cupy().cuda.get_current_stream(device)


class _RawStream:
    """A stream handle behind the protocol that ``cupy.cuda.Stream.from_external`` takes."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._handle


_TORCH_STREAMS: dict[tuple[int, int], Any] = {}


def _torch_stream(device: int) -> Any:
    handle = handle_for(device, True)
    stream = _TORCH_STREAMS.get((device, handle))
    if stream is None:
        cupy = _jit._cupy()
        if handle == 0:
            stream = cupy.cuda.Stream.null
        else:
            stream = cupy.cuda.Stream.from_external(_RawStream(handle))
        _TORCH_STREAMS[device, handle] = stream
    return stream


def empty(shape: tuple[int, ...], dtype: np.dtype[Any], device: int) -> Any:
    """A new uninitialised array: NumPy on the host, CuPy on a GPU."""
    if device == CPU:
        return np.empty(shape, dtype)
    cupy = sys.modules.get("cupy") or _jit._cupy()
    if cupy.cuda.runtime.getDevice() == device:  # a third of what the context of a Device costs
        return cupy.ndarray(shape, dtype)
    with cupy.cuda.Device(device):
        return cupy.ndarray(shape, dtype)
