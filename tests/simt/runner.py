"""Compile a kernel source with g++ and run a launch plan over host memory (``simt.h`` says how).

Use it as ``with _jit.host_runner(runner.run): op(alloc(x), ...)``. Every launch runs in ascending and
in descending thread order and, where the kernel copies or stores asynchronously, with those done as
late and as early as they may be; all runs must agree bit for bit. What a kernel writes must be an
array of :func:`alloc`, or an argument of the launch: only those are put back between the runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import mmap
import os
import re
import shutil
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cupy_lora import _jit, _paths

PAGE = mmap.PAGESIZE
_HERE = Path(__file__).resolve().parent
_MAX_SHARED = 227 << 10  # bytes per block on sm_90
_SECONDS = 120  # CPU time after which a launch counts as hanging
_POISONS = (0xFF, 0x7E)  # of the two thread orders: what is read from outside differs between them

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class SimtError(RuntimeError):
    """A launch did something that a GPU would punish, or might."""


# ---- memory ------------------------------------------------------------------------------------


class _Region(mmap.mmap):
    """Pages for one array, between two pages without access."""

    label: str
    address: int  # of the first data page
    size: int  # of the data pages
    start: int  # of the array within them
    stop: int

    def bytes(self) -> np.ndarray:
        return np.frombuffer(self, np.uint8)[PAGE : PAGE + self.size]

    def poison(self, value: int) -> None:
        data = self.bytes()
        data[: self.start] = value
        data[self.stop :] = value

    def spoilt(self, value: int) -> str:
        """What was written outside the array, or nothing."""
        data = self.bytes()
        before, after = data[: self.start] != value, data[self.stop :] != value
        if before.any():
            return f"wrote {self.start - int(before.argmax())} bytes ahead of the {self.label}"
        if after.any():
            return f"wrote {int(after.argmax())} bytes past the end of the {self.label}"
        return ""


_regions: weakref.WeakSet[_Region] = weakref.WeakSet()


def alloc(array: Any, edge: str = "end", align: int = 16, name: str = "array") -> np.ndarray:
    """A C-contiguous copy of ``array`` next to a page without access.

    Parameters
    ----------
    array : array_like
    edge : {"end", "start"}
        Whether the array ends or starts at the page without access.
    align : int
        Alignment of the first byte, a power of two. An array that ends at the edge lies at most
        ``align - 1`` bytes ahead of it; those are poisoned, and checked after each launch. With the
        item size for ``align`` there are none, and the base is as misaligned as an array's may be.
    name : str
        Said in reports.
    """
    array = np.asarray(array)
    if edge not in ("end", "start"):
        raise ValueError(f"edge: expected 'end' or 'start', got {edge!r}")
    pages = max(1, -(-array.nbytes // PAGE))
    region = _Region(-1, (pages + 2) * PAGE)
    region.size = pages * PAGE
    region.start = 0 if edge == "start" else (region.size - array.nbytes) // align * align
    region.stop = region.start + array.nbytes
    region.label = f"{name} ({array.dtype} {array.shape})"
    whole = np.frombuffer(region, np.uint8)
    region.address = whole.ctypes.data + PAGE
    region.bytes()[:] = _POISONS[0]
    for guard in (region.address - PAGE, region.address + region.size):
        if _libc.mprotect(guard, PAGE, 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
    copy = region.bytes()[region.start : region.stop].view(array.dtype).reshape(array.shape)
    copy[...] = array
    _regions.add(region)
    return copy


def _memory(launch: _jit.Launch) -> list[np.ndarray]:
    """The bytes that the launch may write, as far as they are known."""
    regions = list(_regions)
    memory = [region.bytes()[region.start : region.stop] for region in regions]
    for arg in launch.args:
        if hasattr(arg, "span"):
            low, high = arg.span
            inside = any(r.address <= low and high <= r.address + r.size for r in regions)
            if high > low and not inside:
                memory.append(np.ctypeslib.as_array((ctypes.c_uint8 * (high - low)).from_address(low)))
    return memory


def _place(address: int) -> str:
    """Which array an illegal address belongs to."""
    best, text = 4 * PAGE, ""
    for region in list(_regions):
        first, last = region.address + region.start, region.address + region.stop
        for distance, side in ((first - address, "bytes ahead of"), (address - last, "bytes past the end of")):
            if 0 <= distance < best:
                best, text = distance, f" ({distance} {side} the {region.label})"
    return text


# ---- sources and builds ------------------------------------------------------------------------

_sources: Path | None = None


def sources() -> Path:
    """The folder that kernels are compiled from."""
    return _sources or _paths.cuda_src()


@contextlib.contextmanager
def patched(file: str, *changes: tuple[str, str]) -> Iterator[None]:
    """Within this context kernels are compiled from sources in which ``file`` is changed.

    Each change replaces a text that occurs exactly once.
    """
    global _sources
    with tempfile.TemporaryDirectory(prefix="cupy_lora_patched_") as folder:
        shutil.copytree(sources(), folder, dirs_exist_ok=True)
        path = Path(folder) / file
        text = path.read_text()
        for old, new in changes:
            if text.count(old) != 1:
                raise ValueError(f"{file}: expected one place that reads {old!r}, got {text.count(old)}")
            text = text.replace(old, new)
        path.write_text(text)
        before, _sources = _sources, Path(folder)
        try:
            yield
        finally:
            _sources = before


def cache_folder() -> Path:
    """Where builds are kept: per user, shared by test processes."""
    folder = os.environ.get("CUPY_LORA_SIMT_CACHE")
    path = Path(folder) if folder else Path(tempfile.gettempdir()) / f"cupy_lora_simt_{os.getuid()}"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


@functools.cache
def cuda_include() -> Path:
    """The folder of cuda_fp16.h: in the runtime wheel, or in a toolkit."""
    candidates = []
    with contextlib.suppress(ImportError):
        import nvidia

        for base in nvidia.__path__:
            candidates += [Path(base) / "cu13" / "include", Path(base) / "cuda_runtime" / "include"]
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            candidates.append(Path(os.environ[variable]) / "include")
    candidates.append(Path("/usr/local/cuda/include"))
    for folder in candidates:
        if all((folder / header).is_file() for header in ("cuda_fp16.h", "cuda_bf16.h", "vector_types.h")):
            return folder
    raise RuntimeError(
        "the simt tests need CUDA's headers: expected cuda_fp16.h of the package nvidia-cuda-runtime or of a toolkit "
        f"(CUDA_HOME), got none in {', '.join(map(str, candidates))}"
    )


@functools.cache
def _compiler() -> tuple[str, ...]:
    """The command that builds a library, without sources and optimisation."""
    # No GNU_UNIQUE: two specialisations define inline variables of one name and different values.
    command = [os.environ.get("CXX", "g++"), "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique"]
    command += ["-fno-omit-frame-pointer", "-fno-strict-aliasing", "-fwrapv", "-ffp-contract=off", "-U_FORTIFY_SOURCE"]
    command += ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-unused-parameter", "-Wno-unused-function"]
    with contextlib.suppress(OSError):
        flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
        if flags and {"avx2", "bmi2", "f16c", "fma"} <= set(flags[1].split()):
            command.append("-march=x86-64-v3")
    return (*command, f"-I{_HERE}", f"-I{cuda_include()}")


@functools.cache
def _kernel_options() -> tuple[str, ...]:
    """How kernels are compiled: misaligned accesses and indices outside local arrays trap."""
    checks = ("-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error", "-DCUPY_LORA_SIMT")
    if os.environ.get("CUPY_LORA_SIMT_DEBUG"):
        return ("-O0", "-g3", *checks)
    if os.environ.get("CUPY_LORA_SIMT_COVERAGE"):
        return ("-O0", "-g1", "--coverage", *checks)
    return ("-O1", "-g1", *checks)


def _closure(path: Path, folder: Path, seen: dict[Path, bytes]) -> None:
    if path in seen or not path.is_file():
        return
    seen[path] = path.read_bytes()
    for name in re.findall(rb'^\s*#include\s+"([^"]+)"', seen[path], re.M):
        for base in (path.parent, folder, _HERE):
            _closure((base / name.decode()).resolve(), folder, seen)


def _build(name: str, unit: str, folder: Path, options: tuple[str, ...]) -> Path:
    """The library of a translation unit, built unless it is in the cache; safe among processes."""
    files: dict[Path, bytes] = {}
    for include in re.findall(r'#include "([^"]+)"', unit):
        for base in (folder, _HERE):
            _closure((base / include).resolve(), folder, files)
    digest = hashlib.sha256(repr((_compiler(), options, unit)).encode())
    for path in sorted(files, key=lambda p: p.name):
        digest.update(path.name.encode() + b"\0" + files[path] + b"\0")
    library = cache_folder() / f"{name}-{digest.hexdigest()[:24]}.so"
    if library.exists():
        return library
    scratch = Path(tempfile.mkdtemp(prefix="build_", dir=cache_folder()))
    try:
        source, built = scratch / f"{library.stem}.cpp", scratch / library.name
        source.write_text(unit)
        command = [*_compiler(), *options, f"-I{folder}", str(source), "-o", str(built), "-ldl"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise RuntimeError(f"{name} did not compile for the CPU:\n{' '.join(command)}\n{result.stderr[:6000]}")
        built.replace(library)
    finally:
        if "--coverage" not in options:  # gcov's notes and counts lie beside the source
            shutil.rmtree(scratch)
    return library


def build(kernel: _jit.Kernel, folder: Path) -> Path:
    """The library of one specialisation, from the sources in ``folder``."""
    unit = f'#include "{kernel.source}.cu"\nSIMT_KERNEL({kernel.symbol})\n'
    defines = tuple(f"-D{name}={value}" for name, value in kernel.defines)
    return _build(Path(kernel.source).name, unit, folder, (*_kernel_options(), *defines))


# ---- launches ----------------------------------------------------------------------------------


class _Config(ctypes.Structure):
    """``simt::Config`` of engine.cpp."""

    _fields_ = (
        ("thread", ctypes.c_void_p),
        ("arguments", ctypes.c_void_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint),
        ("shared", ctypes.c_uint),
        ("cluster", ctypes.c_uint),
        ("descending", ctypes.c_uint),
        ("early", ctypes.c_uint),
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
    options = ("-O0", "-g3") if os.environ.get("CUPY_LORA_SIMT_DEBUG") else ("-O2", "-g1")
    path = _build("engine", '#include "engine.cpp"\n', _HERE, options)
    # Kernels find the engine's functions in it. PyDLL keeps the interpreter's lock: a launch is not reentrant.
    engine = ctypes.PyDLL(str(path), ctypes.RTLD_GLOBAL)
    engine.simt_launch.restype = None
    return engine


def _load(kernel: _jit.Kernel) -> _Library:
    key = (sources(), kernel)
    if key not in _loaded:
        _engine()
        path = build(kernel, sources())
        handle = ctypes.CDLL(str(path))
        handle.simt_signature.restype = ctypes.c_char_p
        signature = tuple(handle.simt_signature().decode().split())
        thread = ctypes.cast(handle.simt_thread, ctypes.c_void_p).value or 0
        _loaded[key] = _Library(path, handle, thread, signature)
    return _loaded[key]


def _arguments(launch: _jit.Launch, signature: tuple[str, ...]) -> tuple[Any, list[np.ndarray]]:
    """Pointers to the arguments, and what they point to; each must have the kind and size of its parameter."""
    name = f"{launch.kernel.source}.{launch.kernel.symbol}"
    if len(launch.args) != len(signature):
        raise SimtError(f"{name}: expected {len(signature)} arguments, got {len(launch.args)}")
    values: list[Any] = []
    for i, (arg, code) in enumerate(zip(launch.args, signature, strict=True)):
        if arg is None or hasattr(arg, "ptr"):
            got, value = "p8", np.array([0 if arg is None else arg.ptr], np.uint64)
        else:
            value = np.atleast_1d(np.asarray(arg))
            got = f"{value.dtype.kind}{value.dtype.itemsize}"
            if value.size != 1:
                raise SimtError(f"{name}: argument {i}: expected one element, got {value.size}")
        if got != code:
            raise SimtError(f"{name}: argument {i}: expected a parameter of kind {code}, got {got}")
        values.append(np.frombuffer(value.tobytes() + bytes(16), np.uint8))
    pointers = (ctypes.c_void_p * max(1, len(values)))(*(value.ctypes.data for value in values))
    return pointers, values


def _symbolised(text: str, library: Path) -> str:
    """The text with its code addresses replaced by places in the kernel sources."""
    addresses = sorted(set(re.findall(r"@([0-9a-f]+)", text)))
    tool = shutil.which("addr2line")
    places: dict[str, str] = {}
    if addresses and tool:
        for address in addresses:
            out = subprocess.run([tool, "-i", "-e", str(library), address], capture_output=True, text=True).stdout
            lines = [Path(line.split(" ")[0]).name for line in out.splitlines()]
            kept = [line for line in lines if re.match(r"(?!ptx\.)[^:]*\.cuh?:", line)]
            places[address] = " < ".join(kept)

    def replace(match: re.Match[str]) -> str:
        found = [places.get(address, "") for address in re.findall(r"@([0-9a-f]+)", match[0])]
        chain = [place for place in found if place]
        return f"at {' < '.join(chain)}" if chain else match[0]

    return re.sub(r"(?:@[0-9a-f]+)+", replace, text)


def _run_once(launch: _jit.Launch, library: _Library, pointers: Any, descending: bool, early: bool) -> bool:
    """One run; True where the kernel used asynchronous copies or stores."""
    kernel, poison = launch.kernel, _POISONS[descending]
    regions = list(_regions)
    for region in regions:
        region.poison(poison)
    message = ctypes.create_string_buffer(1 << 14)
    config = _Config(
        thread=library.thread,
        arguments=ctypes.addressof(pointers),
        grid=launch.grid,
        block=kernel.block,
        shared=kernel.shared,
        cluster=kernel.cluster,
        descending=descending,
        early=early,
        poison=poison,
        seconds=_SECONDS,
        message_size=len(message),
        message=ctypes.addressof(message),
    )
    _engine().simt_launch(ctypes.byref(config))
    text = message.value.decode(errors="replace")
    if text:
        text = _symbolised(text, library.path)
        if config.fault is not None:
            text = text.replace("; ", f"{_place(config.fault)}; ", 1)
        raise SimtError(f"{_name(launch, descending, early)}: {text}")
    for region in regions:
        wrong = region.spoilt(poison)
        if wrong:
            raise SimtError(f"{_name(launch, descending, early)}: {wrong}")
    return bool(config.used_async)


def _name(launch: _jit.Launch, descending: bool, early: bool) -> str:
    order, copies = "descending" if descending else "ascending", "early" if early else "late"
    return f"{launch.kernel.source}.{launch.kernel.symbol} ({order} thread order, {copies} copies)"


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


def run(launch: _jit.Launch) -> None:
    """Run a plan over host memory, in both thread orders; :class:`SimtError` where anything is wrong."""
    if 0 in launch.grid:
        return
    _check(launch)
    with _lock:
        library = _load(launch.kernel)
        pointers, _values = _arguments(launch, library.signature)
        memory = _memory(launch)
        before = [data.copy() for data in memory]
        if _run_once(launch, library, pointers, descending=False, early=False):
            others = [(True, False), (False, True), (True, True)]
        else:
            others = [(True, False)]
        first = [data.copy() for data in memory]
        for descending, early in others:
            for data, old in zip(memory, before, strict=True):
                data[:] = old
            _run_once(launch, library, pointers, descending, early)
            for data, expected in zip(memory, first, strict=True):
                if not np.array_equal(data, expected):
                    _raise_difference(launch, data, expected, descending, early)


def _raise_difference(
    launch: _jit.Launch, data: np.ndarray, expected: np.ndarray, descending: bool, early: bool
) -> None:
    different = np.flatnonzero(data != expected)
    at = data.ctypes.data + int(different[0])
    label = f"memory at {at:#x}"
    for region in list(_regions):
        if region.address <= at < region.address + region.size:
            label = f"byte {at - region.address - region.start} of the {region.label}"
    raise SimtError(
        f"{_name(launch, descending, early)}: a race, or memory read from outside an array: {different.size} bytes are "
        f"not those of ascending thread order with late copies, the first is {label}"
    )
