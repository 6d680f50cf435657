"""Run a launch plan over host memory (``engine/launch.cpp`` says how).

Use it as ``with _jit.host_runner(runner.run): op(alloc(x), ...)``. Every launch runs in ascending and
in descending thread order; where the kernel copies or stores asynchronously, with those done as late
and as early as they may be. All runs must agree bit for bit, and no access of shared memory may race.
What a kernel writes must be an array of :func:`alloc`, or an argument of the launch: only those are put
back between the runs.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cupy_lora import _jit

from . import build, memory
from .build import patched, sources
from .memory import PAGE, POISONS, alloc

__all__ = ["PAGE", "SimtError", "alloc", "patched", "run", "sources"]

_MAX_SHARED = 227 << 10  # bytes per block on sm_90
_SECONDS = 60  # CPU time after which a launch counts as hanging


class SimtError(RuntimeError):
    """A launch did something that a GPU would punish, or might."""


class _Config(ctypes.Structure):
    """``simt::Config`` of engine/engine.h."""

    _fields_ = (
        ("thread", ctypes.c_void_p),
        ("arguments", ctypes.c_void_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint),
        ("shared", ctypes.c_uint),
        ("cluster", ctypes.c_uint),
        ("descending", ctypes.c_uint),
        ("early", ctypes.c_uint),
        ("races", ctypes.c_uint),
        ("poison", ctypes.c_uint),
        ("seconds", ctypes.c_uint),
        ("message_size", ctypes.c_uint),
        ("used_async", ctypes.c_uint),
        ("message", ctypes.c_void_p),
        ("fault", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class _Library:
    """A loaded specialisation."""

    path: Path
    handle: ctypes.CDLL
    thread: int  # address of its simt_thread
    signature: tuple[str, ...]  # kind and size of each parameter


_lock = threading.RLock()
_loaded: dict[tuple[Path, _jit.Kernel], _Library] = {}


@functools.cache
def _engine() -> ctypes.PyDLL:
    # Kernels find the engine's functions in it. PyDLL keeps the interpreter's lock: a launch is not reentrant.
    engine = ctypes.PyDLL(str(build.engine()), ctypes.RTLD_GLOBAL)
    engine.simt_launch.restype = None
    return engine


def _load(kernel: _jit.Kernel) -> _Library:
    key = (sources(), kernel)
    if key not in _loaded:
        _engine()
        path = build.specialisation(kernel, sources())
        handle = ctypes.CDLL(str(path))
        handle.simt_signature.restype = ctypes.c_char_p
        signature = tuple(handle.simt_signature().decode().split())
        thread = ctypes.cast(handle.simt_thread, ctypes.c_void_p).value or 0
        _loaded[key] = _Library(path, handle, thread, signature)
    return _loaded[key]


class _Arguments:
    """The arguments of a launch as the engine takes them: an array of pointers to values."""

    def __init__(self, launch: _jit.Launch, signature: tuple[str, ...], moved: Mapping[int, int]) -> None:
        """``moved``: arguments (by number) that get another address."""
        name = f"{launch.kernel.source}.{launch.kernel.symbol}"
        if len(launch.args) != len(signature):
            raise SimtError(f"{name}: expected {len(signature)} arguments, got {len(launch.args)}")
        self._values: list[np.ndarray] = []
        for i, (arg, code) in enumerate(zip(launch.args, signature, strict=True)):
            if arg is None or hasattr(arg, "ptr"):
                got, value = "p8", np.array([0 if arg is None else moved.get(i, arg.ptr)], np.uint64)
            else:
                value = np.atleast_1d(np.asarray(arg))
                got = f"{value.dtype.kind}{value.dtype.itemsize}"
                if value.size != 1:
                    raise SimtError(f"{name}: argument {i}: expected one element, got {value.size}")
            if got != code:
                raise SimtError(f"{name}: argument {i}: expected a parameter of kind {code}, got {got}")
            self._values.append(np.frombuffer(value.tobytes() + bytes(16), np.uint8))
        pointers = [value.ctypes.data for value in self._values]
        self.pointers = (ctypes.c_void_p * max(1, len(pointers)))(*pointers)


class _Memory:
    """What a launch may write, as far as that is known, and where its arguments are.

    In descending order (``twins``) the arguments are copies that lie at the other edge of their pages;
    what is written there goes back to the arrays. Pointers inside tables and structs stay as they are.
    """

    def __init__(self, launch: _jit.Launch) -> None:
        self.regions = memory.regions()
        self._spans = [region.bytes() for region in self.regions]
        self._of_arg: dict[int, tuple[memory.Region, int]] = {}  # region and offset in it
        for i, arg in enumerate(launch.args):
            if not hasattr(arg, "span"):
                continue
            low, high = arg.span
            region = next((region for region in self.regions if region.holds(low, high)), None)
            if region is not None:
                self._of_arg[i] = region, arg.ptr - region.address - region.start
            elif high > low:
                self._spans.append(np.ctypeslib.as_array((ctypes.c_uint8 * (high - low)).from_address(low)))
        self._before = self.copy()
        self.twins: dict[memory.Region, memory.Region] = {}

    def copy(self) -> list[np.ndarray]:
        return [span.copy() for span in self._spans]

    def restore(self, twins: bool) -> dict[int, int]:
        """Everything as it was before the launch; the addresses of the arguments that are elsewhere now."""
        for span, before in zip(self._spans, self._before, strict=True):
            span[:] = before
        self.twins = {}
        if not twins:
            return {}
        self.twins = {region: region.twin() for region, _ in self._of_arg.values()}
        return {
            i: self.twins[region].address + self.twins[region].start + offset
            for i, (region, offset) in self._of_arg.items()
        }

    def collect(self) -> None:
        """What was written to the twins goes to the arrays."""
        for region, before in zip(self.regions, self._before, strict=False):
            twin = self.twins.get(region)
            if twin is not None:
                written = twin.bytes() != before
                region.bytes()[written] = twin.bytes()[written]

    def difference(self, expected: list[np.ndarray]) -> str:
        """The first byte that is not as expected, or nothing."""
        for i, (span, wanted) in enumerate(zip(self._spans, expected, strict=True)):
            if np.array_equal(span, wanted):
                continue
            different = np.flatnonzero(span != wanted)
            label = f"the {self.regions[i].label}" if i < len(self.regions) else "an array not of alloc"
            return f"{different.size} bytes of {label} differ, the first is byte {different[0]}"
        return ""


@dataclass(frozen=True)
class _Mode:
    """How one run differs from the others: see engine/launch.cpp."""

    descending: bool = False
    early: bool = False

    def named(self, launch: _jit.Launch) -> str:
        order, copies = "descending" if self.descending else "ascending", "early" if self.early else "late"
        return f"{launch.kernel.source}.{launch.kernel.symbol} ({order} thread order, {copies} copies)"


_FIRST = _Mode()
_OTHERS = (_Mode(descending=True),)
_ASYNC = (_Mode(early=True), _Mode(descending=True, early=True))


def _check(launch: _jit.Launch) -> None:
    kernel, name = launch.kernel, f"{launch.kernel.source}.{launch.kernel.symbol}"
    if not 1 <= kernel.block <= 1024:
        raise SimtError(f"{name}: expected a block of 1 to 1024 threads, got {kernel.block}")
    if not 0 <= kernel.shared <= _MAX_SHARED:
        raise SimtError(f"{name}: expected at most {_MAX_SHARED} bytes of shared memory, got {kernel.shared}")
    if not 1 <= kernel.cluster <= 16 or launch.grid[0] % kernel.cluster:
        raise SimtError(f"{name}: expected a grid of whole clusters, got {launch.grid[0]} blocks for {kernel.cluster}")
    if launch.grid[0] >= 1 << 31 or max(launch.grid[1:]) > 65535:
        raise SimtError(f"{name}: expected a grid within CUDA's limits, got {launch.grid}")


def _run_once(launch: _jit.Launch, library: _Library, mem: _Memory, moved: dict[int, int], mode: _Mode) -> bool:
    """One run; True where the kernel used asynchronous copies or stores."""
    kernel, poison = launch.kernel, POISONS[mode.descending]
    arguments = _Arguments(launch, library.signature, moved)
    regions = [*mem.twins.values(), *mem.regions]
    for region in regions:
        region.poison(poison)
    message = ctypes.create_string_buffer(1 << 14)
    config = _Config(
        thread=library.thread,
        arguments=ctypes.addressof(arguments.pointers),
        grid=launch.grid,
        block=kernel.block,
        shared=kernel.shared,
        cluster=kernel.cluster,
        descending=mode.descending,
        early=mode.early,
        races=mode == _FIRST,
        poison=poison,
        seconds=_SECONDS,
        message_size=len(message),
        message=ctypes.addressof(message),
    )
    _engine().simt_launch(ctypes.byref(config))
    text = message.value.decode(errors="replace")
    if text:
        text = build.symbolised(text, library.path)
        if config.fault is not None:
            text = text.replace("; ", f"{memory.place(config.fault, regions)}; ", 1)
        raise SimtError(f"{mode.named(launch)}: {text}")
    for region in regions:
        wrong = region.spoilt(poison)
        if wrong:
            raise SimtError(f"{mode.named(launch)}: {wrong}")
    mem.collect()
    return bool(config.used_async)


def run(launch: _jit.Launch) -> None:
    """Run a plan over host memory, in every order; :class:`SimtError` where anything is wrong."""
    if 0 in launch.grid:
        return
    _check(launch)
    with _lock:
        library = _load(launch.kernel)
        mem = _Memory(launch)
        used_async = _run_once(launch, library, mem, {}, _FIRST)
        expected = mem.copy()
        for mode in (*_OTHERS, *_ASYNC) if used_async else _OTHERS:
            moved = mem.restore(twins=mode.descending)
            _run_once(launch, library, mem, moved, mode)
            difference = mem.difference(expected)
            if difference:
                raise SimtError(
                    f"{mode.named(launch)}: a race, or memory read from outside an array: {difference} "
                    "from ascending thread order with late copies"
                )
