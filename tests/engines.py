"""What runs the ops: NumPy (the reference), ``simt`` (the CUDA sources on the CPU), the GPU. One face for all."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol
from unittest import mock

import numpy as np
import pytest

from cupy_lora import _arrays, _device, _jit


class Engine(Protocol):
    name: str
    device: str | int  # for objects of the library that live somewhere
    small_only: bool  # whether cases of many multiply-adds take too long

    def array(self, host: np.ndarray) -> Any:
        """The values in new memory of the engine."""

    def numpy(self, array: Any) -> np.ndarray:
        """The values of an array of the engine; NumPy's own memory."""


class Numpy:
    name = "numpy"
    device = "cpu"
    small_only = False

    def array(self, host: np.ndarray) -> np.ndarray:
        return np.array(host, order="C")

    def numpy(self, array: np.ndarray) -> np.ndarray:
        return np.array(array)


class Simt(Numpy):
    """NumPy arrays whose memory ends (or starts) at a guard page; launches go to the CPU runner."""

    name = "simt"
    small_only = True

    def __init__(self, edge: str = "end") -> None:
        from simt import runner

        self._runner = runner
        self._edge = edge

    def array(self, host: np.ndarray) -> np.ndarray:
        return self._runner.alloc(np.ascontiguousarray(host), edge=self._edge)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype, device: int) -> np.ndarray:
        assert device == _arrays.CPU
        poison = np.full(int(np.prod(shape)) * dtype.itemsize, 0xFF, np.uint8)
        return self.array(poison.view(dtype).reshape(shape))


SANITIZED = "CUPY_LORA_TESTS_SANITIZED"  # set by test_sanitizer.py for the tests it runs


class Gpu:
    name = "gpu"
    small_only = SANITIZED in os.environ

    def __init__(self, device: int = 0) -> None:
        self.device = device

    def array(self, host: np.ndarray) -> Any:
        import cupy

        with cupy.cuda.Device(self.device):
            return cupy.asarray(np.ascontiguousarray(host))

    def numpy(self, array: Any) -> np.ndarray:
        return array.get()


@contextlib.contextmanager
def running(name: str) -> Iterator[Engine]:
    """The engine of that name, active within the context."""
    if name == "numpy":
        yield Numpy()
    elif name == "gpu":
        yield Gpu()
    else:
        engine = Simt()
        with _jit.host_runner(engine._runner.run), mock.patch.object(_arrays, "empty", engine.empty):
            yield engine


def gpu_missing() -> str | None:
    """Why there is no usable GPU; None where there is one."""
    return (
        None if _device.has_gpu_kernels() else "no GPU that the kernels run on (CuPy, driver, compute capability 8.0)"
    )


def skip_large(engine: Engine, small: bool) -> None:
    if engine.small_only and not small:
        pytest.skip("too many multiply-adds for this engine")


@dataclass
class Frame:
    """A matrix inside a larger one; what surrounds it must stay as it is."""

    view: Any
    base: Any
    before: np.ndarray
    inside: tuple[slice, slice]

    def check(self, engine: Engine, what: str = "output") -> np.ndarray:
        """The matrix as NumPy, after checking that nothing around it was written."""
        after = engine.numpy(self.base)
        raw = np.dtype(f"u{after.itemsize}")
        touched = after.view(raw) != self.before.view(raw)
        touched[self.inside] = False
        assert not touched.any(), (
            f"{what}: wrote outside its rows, first at {np.argwhere(touched)[0].tolist()} of the base"
        )
        return np.array(after[self.inside])


def frame(engine: Engine, host: np.ndarray, left: int = 0, right: int = 0) -> Frame:
    """``host`` with NaN around it: ``left`` and ``right`` columns and, where there are any, a row above and below.

    Without columns around it the matrix is an allocation of its own, which the ``simt`` engine guards.
    """
    rows, columns = host.shape
    if left == right == 0:
        base = engine.array(host)
        return Frame(base, base, np.array(host), (slice(0, rows), slice(0, columns)))
    poisoned = np.full((rows + 2, left + columns + right), np.nan, host.dtype)
    inside = (slice(1, rows + 1), slice(left, left + columns))
    poisoned[inside] = host
    base = engine.array(poisoned)
    return Frame(base[inside], base, poisoned, inside)


def assert_refused(
    engine: Engine, call: Callable[[], object], error: type[Exception], message: str, output: Any = None
) -> None:
    """The call raises exactly this error, whose message has this form and says what was expected and what came.

    ``output``, where it is an array, keeps its bytes.
    """
    before = engine.numpy(output) if hasattr(output, "dtype") else None
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    text = str(caught.value)
    assert re.search(message, text), text
    assert re.match(r"\w+(\[\d+\])?: expected .*, got ", text), text
    if before is not None:
        assert engine.numpy(output).tobytes() == before.tobytes()
