"""A GPU that is not there: arrays without memory, and what the driver would have been handed."""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cupy_lora import _arrays, _device, _jit
from cupy_lora._arrays import Array

_addresses = itertools.count(1 << 40, 1 << 24)


def on_gpu(shape: tuple[int, ...], dtype: np.dtype, device: int = 0, ptr: int | None = None) -> Array:
    """An array of a GPU that is not there, 16 MiB from the last one."""
    strides = tuple(int(np.prod(shape[axis + 1 :])) for axis in range(len(shape)))
    return Array(next(_addresses) if ptr is None else ptr, shape, strides, dtype, device, None)


@dataclass
class Driver:
    """In place of CuPy's driver calls: keeps what it is handed."""

    current: int = 0
    stream: int = 77
    launches: list[tuple[Any, ...]] = field(default_factory=list)
    contexts: list[tuple[int, int]] = field(default_factory=list)
    during: Callable[[], None] | None = None
    early: bool = False

    def launch_kernel(self, *args: Any) -> None:
        *sizes, stream, address, extra = args
        assert extra == 0
        if self.during is not None:
            self.during()
        self.launches.append((self.current, stream, address, *sizes))

    def starts_early(self, device: int) -> bool:
        return self.early

    def launch_early(self, config: int, function: int, arguments: int, extra: None) -> int:
        grid_block = (ctypes.c_uint32 * 7).from_address(config)
        stream, attributes, count = (ctypes.c_uint64 * 3).from_address(config + 32)
        assert list((ctypes.c_uint32 * 3).from_address(attributes)) == [6, 0, 1]
        assert count == 1
        self.launch_kernel(function, *grid_block, stream, arguments, 0)
        return 0

    def current_device(self) -> int:
        return self.current

    def current_stream(self, device: int) -> Any:
        return SimpleNamespace(ptr=self.stream)

    def make_context(self) -> None:
        self.contexts.append((threading.get_ident(), self.current))

    def use_device(self, device: int) -> Any:
        class Device:
            def __enter__(inner) -> None:
                inner.before, self.current = self.current, device

            def __exit__(inner, *exc: object) -> None:
                self.current = inner.before

        return Device()


def words(address: int, count: int) -> list[int]:
    """What the driver would read: an 8-byte word behind each argument's pointer."""
    pointers = (ctypes.c_uint64 * count).from_address(address)
    return [ctypes.c_uint64.from_address(pointer).value for pointer in pointers]


def install(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """Objects of the library live on the GPU 0 from now on; kernels are neither compiled nor run."""
    driver = Driver()
    monkeypatch.setattr(_jit, "_driver", driver)
    monkeypatch.setattr(_jit, "_thread", _jit._Thread())
    monkeypatch.setattr(_jit, "_function", lambda kernel, device: SimpleNamespace(ptr=1000 + device))
    monkeypatch.setattr(_jit, "device_facts", lambda device: _jit.RUNNER_FACTS)
    monkeypatch.setattr(_jit, "device_arch", lambda device: _jit.RUNNER_FACTS.arch)
    monkeypatch.setattr(_device, "resolve", lambda device: 0)
    monkeypatch.setattr(_device, "filled", lambda shape, dtype, device, value: on_gpu(shape, dtype, device))
    monkeypatch.setattr(_arrays, "empty", on_gpu)
    return driver
