"""Compile and launch: a plan (:class:`Launch`) is data, made without a GPU; this module runs it."""

from __future__ import annotations

import array
import contextlib
import ctypes
import functools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _cubins, _env, _paths

if TYPE_CHECKING:
    from ._arrays import Array

OLDEST_ARCH = 80
_PORTABLE_CLUSTER = 8  # larger clusters need an opt-in attribute on the function
_ATTR_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_ATTR_NON_PORTABLE_CLUSTER = 14  # CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
_DEFAULT_SHARED = 48 * 1024  # dynamic shared memory above this is an opt-in of the function


@dataclass(frozen=True)
class Kernel:
    """One specialisation: what is compiled, and what never changes between its launches.

    Attributes
    ----------
    source : str
        Stem of the file in cuda_src (``"norm"`` is ``cuda_src/norm.cu``).
    symbol : str
        Name of the ``extern "C"`` kernel in it.
    defines : tuple of (str, int or str)
        Macros, passed as ``-DNAME=VALUE``: the compile-time configuration.
    block : int
        Threads per block (one-dimensional).
    shared : int
        Bytes of dynamic shared memory per block.
    cluster : int
        Blocks per thread-block cluster along x; 1 = none. The source declares it
        with ``CUPY_LORA_CLUSTER``; the grid's x must be a multiple of it.
    """

    source: str
    symbol: str
    defines: tuple[tuple[str, int | str], ...]
    block: int
    shared: int = 0
    cluster: int = 1
    functions: dict[int, Any] = field(default_factory=dict, compare=False, hash=False, repr=False)


@dataclass(frozen=True)
class Launch:
    """A kernel, its grid, and its arguments in the order of the kernel's parameters.

    ``args`` holds :class:`~cupy_lora._arrays.Array` (passed as a pointer), None (a null
    pointer), NumPy scalars of exactly the parameter's type, and one-element structured
    NumPy arrays (a struct passed by value).
    """

    kernel: Kernel
    grid: tuple[int, int, int]
    args: tuple[Array | np.generic | np.ndarray | None, ...]


def compile_options(arch: int, defines: tuple[tuple[str, int | str], ...]) -> tuple[str, ...]:
    """NVRTC options for compute capability ``arch`` (90 = 9.0); the architecture itself excepted.

    ``_cubins.options`` adds ``-ftz=true``, as CuPy would, and the architecture.
    """
    del arch  # one set of options serves every architecture so far
    return (
        "--std=c++17",
        f"-I{_paths.cuda_src()}",
        *(f"-D{name}={value}" for name, value in defines),
    )


def source_text(kernel: Kernel) -> str:
    """The translation unit that holds a kernel."""
    return _cubins.source_text(kernel.source)


_host_runner: Callable[[Launch], None] | None = None
_load_lock = threading.Lock()
_modules: dict[tuple[int, str, tuple[tuple[str, int | str], ...]], Any] = {}


@contextlib.contextmanager
def host_runner(run: Callable[[Launch], None]) -> Iterator[None]:
    """Within this context, launches over host arrays go to ``run`` instead of the NumPy reference."""
    global _host_runner
    before, _host_runner = _host_runner, run
    try:
        yield
    finally:
        _host_runner = before


def has_host_runner() -> bool:
    """Whether a CPU runner of the CUDA sources is active (see :func:`host_runner`)."""
    return _host_runner is not None


def run(launch: Launch, device: int, stream: Any = None) -> None:
    """Run a plan once: on the CPU runner for host arrays (device -1), else on ``stream`` of that GPU."""
    if device < 0:
        if _host_runner is None:
            raise RuntimeError("cupy_lora: a kernel was launched over host arrays with no CPU runner active")
        _told(launch)
        _host_runner(launch)
    elif 0 not in launch.grid:
        Ready(launch, device)((), stream_handle(device) if stream is None else stream.ptr)


_watcher: Callable[[Any], None] | None = None


@contextlib.contextmanager
def watcher(see: Callable[[Any], None]) -> Iterator[None]:
    """Within this context, ``see`` is told of each launch: an object with its ``kernel`` and its ``grid``."""
    global _watcher
    before, _watcher = _watcher, see
    try:
        yield
    finally:
        _watcher = before


def _told(launch: Any) -> None:
    if _watcher is not None:
        _watcher(launch)


class _Driver:
    """The functions of CuPy that every launch calls."""

    def __init__(self) -> None:
        cuda = _cupy().cuda
        self.launch_kernel = cuda.driver.launchKernel
        self.current_device = cuda.runtime.getDevice
        self.current_stream = cuda.get_current_stream
        self.make_context = cuda.runtime.memGetInfo
        self.use_device = cuda.Device
        self.check = cuda.driver.check_status
        # cuLaunchKernelEx by itself: (CUlaunchConfig, function, arguments, None), addresses as integers; a status.
        self.launch_early: Any = None
        # Graphs take such launches from CUDA 12.3 on.
        if not _env.SERIAL.on and cuda.runtime.driverGetVersion() >= 12030:
            libcuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
            self.launch_early = libcuda.cuLaunchKernelEx
            self.launch_early.argtypes = [ctypes.c_void_p] * 4

    def starts_early(self, device: int) -> bool:
        """Whether kernels may start before the launch ahead of them is done, and wait themselves: from sm_90 on."""
        return self.launch_early is not None and device_arch(device) >= 90


_driver: _Driver | None = None


def _load_driver() -> _Driver:
    global _driver
    _driver = _Driver()
    return _driver


class _Thread(threading.local):
    """The GPUs whose context this thread has: the driver launches nothing without, and only a runtime call makes it."""

    def __init__(self) -> None:
        self.devices: set[int] = set()


_thread = _Thread()


def stream_handle(device: int) -> int:
    """The handle of CuPy's current stream on a GPU."""
    handle: int = (_driver or _load_driver()).current_stream(device).ptr
    return handle


# cuda.h: CUlaunchAttribute is an id, padding and a union of 64 bytes; 6 is "programmatic stream serialization": the
# kernel may start when the one before lets it, and waits for its end itself (begin_launch of ptx.cuh).
_EARLY = array.array("Q", [6, 1, *[0] * 7])


@dataclass
class _Frame:
    """The memory of one call in flight."""

    addresses: Any  # a ctypes array: the call's pointers
    words: array.array[int]  # the other arguments
    arguments: array.array[int]  # where each argument is
    config: array.array[int]  # CUlaunchConfig
    early: tuple[int, int, int, None]  # what cuLaunchKernelEx takes
    plain: int  # the address of ``arguments``


class Ready:
    """A launch as the driver takes it: function, sizes, and arguments in memory; pointers may come with each call.

    CuPy's own call turns each argument into an object of its own, 0.3 us each; here a call writes the
    addresses.

    Parameters
    ----------
    launch : Launch
        Its grid is not empty. Array arguments are packed by their addresses.
    device : int
        Number of the GPU.
    places : sequence of (int, int, int)
        Arguments that come with each call: position, index into the call's pointers, bytes to add.
    count : int
        How many pointers come with each call.
    """

    __slots__ = (
        "_addresses",
        "_device",
        "_early",
        "_frames",
        "_moved",
        "_offsets",
        "_places",
        "_sizes",
        "_words",
        "grid",
        "kernel",
    )

    def __init__(
        self, launch: Launch, device: int, places: Sequence[tuple[int, int, int]] = (), count: int = 0
    ) -> None:
        kernel = self.kernel = launch.kernel
        self.grid = launch.grid
        self._device = device
        function = kernel.functions.get(device)
        if function is None:
            function = _function(kernel, device)
        self._sizes = (function.ptr, *launch.grid, kernel.block, 1, 1, kernel.shared)
        self._early = (_driver or _load_driver()).starts_early(device)
        self._words, self._offsets = pack(launch.args)
        # The call's pointers lie together, so that one store writes them all: the driver is told where each argument
        # is. Only an argument a few bytes into its array has a word of its own.
        self._addresses = ctypes.c_uint64 * count
        self._places = [(position, index) for position, index, delta in places if not delta]
        self._moved = [(self._offsets[position] // 8, index, delta) for position, index, delta in places if delta]
        # Two threads may make the same call at once, and the driver copies the arguments with the interpreter's lock
        # released: each takes a frame of its own.
        self._frames: list[_Frame] = []

    def __call__(
        self, pointers: Sequence[int], stream: int, values: Sequence[tuple[int, int | np.generic | np.ndarray]] = ()
    ) -> None:
        """Launch on the stream of this handle.

        Parameters
        ----------
        pointers : sequence of int
            Addresses of the arrays that come with each call.
        stream : int
        values : sequence of (int, integer or array)
            Arguments that this call replaces, by position: integers, not negative, and structs of whole 8-byte
            words. Each call replaces the same ones.
        """
        driver = _driver or _load_driver()
        device = self._device
        if device not in _thread.devices or driver.current_device() != device:
            with driver.use_device(device):
                if device not in _thread.devices:
                    driver.make_context()
                    _thread.devices.add(device)
                self(pointers, stream, values)
            return
        try:
            frame = self._frames.pop()
        except IndexError:
            frame = self._frame()
        words = frame.words
        frame.addresses[:] = pointers
        for word, index, delta in self._moved:
            words[word] = pointers[index] + delta
        for position, value in values:
            word = self._offsets[position] // 8
            if isinstance(value, np.ndarray):
                raw = array.array("Q", value.tobytes())
                words[word : word + len(raw)] = raw
            else:
                words[word] = int(value)
        if _watcher is not None:
            _watcher(self)
        if self._early:
            frame.config[4] = stream
            status = driver.launch_early(*frame.early)
            if status:
                driver.check(status)
        else:
            driver.launch_kernel(*self._sizes, stream, frame.plain, 0)
        self._frames.append(frame)
        if _imported:
            _keep_imported(device, stream)

    def _frame(self) -> _Frame:
        addresses, words = self._addresses(), self._words[:]
        first, base = ctypes.addressof(addresses), words.buffer_info()[0]
        at = [base + offset for offset in self._offsets]
        for position, index in self._places:
            at[position] = first + 8 * index
        arguments = array.array("Q", at)
        # CUlaunchConfig: grid, block and bytes of shared memory as 32-bit words, the stream, the attributes, how many.
        function, grid_x, grid_y, grid_z, block_x, block_y, block_z, shared = self._sizes
        sizes = [grid_x | grid_y << 32, grid_z | block_x << 32, block_y | block_z << 32, shared]
        config = array.array("Q", [*sizes, 0, _EARLY.buffer_info()[0], 1])
        plain = arguments.buffer_info()[0]
        early = (config.buffer_info()[0], function, plain, None)
        return _Frame(addresses, words, arguments, config, early, plain)


def pack(args: Sequence[Array | np.generic | np.ndarray | None]) -> tuple[array.array[int], list[int]]:
    """The arguments of a kernel in 8-byte words, and the offset in bytes of each."""
    words: array.array[int] = array.array("Q")
    offsets = []
    for arg in args:
        offsets.append(8 * len(words))
        if arg is None:
            words.append(0)
        elif isinstance(arg, (np.generic, np.ndarray)):
            if arg.size != 1:
                raise TypeError(f"argument {len(offsets) - 1}: expected one value, got an array of shape {arg.shape}")
            raw = arg.tobytes()
            words.frombytes(raw + bytes(-len(raw) % 8))
        elif hasattr(arg, "ptr"):
            words.append(arg.ptr)
        else:  # a Python number says nothing of the parameter's type
            raise TypeError(f"argument {len(offsets) - 1}: expected an Array or a NumPy value, got {arg!r}")
    return words, offsets


# Arrays that came by DLPack from a library with streams of its own (JAX): it may give their memory to its next
# array as soon as the last reference goes, so they are kept until the work that reads them is done.
_imported: list[Any] = []
_kept: list[tuple[Any, list[Any]]] = []


def keep_imported(obj: Any) -> None:
    """Keep ``obj`` until the next launch is done."""
    _imported.append(obj)


def _keep_imported(device: int, stream: int) -> None:
    runtime = _cupy().cuda.runtime
    _kept[:] = [entry for entry in _kept if not entry[0].done]
    objs = _imported.copy()
    _imported.clear()
    # Under capture there is nothing to wait for: who captures keeps the arrays for the replays.
    if not runtime.streamIsCapturing(stream):
        with _cupy().cuda.Device(device):
            event = _cupy().cuda.Event(disable_timing=True)
            runtime.eventRecord(event.ptr, stream)
        _kept.append((event, objs))


def _cupy() -> Any:
    try:
        import cupy
    except ImportError as error:
        raise RuntimeError(
            "cupy_lora: CuPy is needed to run on a GPU: expected the package cupy (pip install 'cupy-lora[cuda13]' "
            f"or 'cupy-lora[cuda12]'), got ImportError: {error}"
        ) from error
    return cupy


@functools.cache
def device_arch(device: int) -> int:
    """Compute capability of a GPU as an int (90 = 9.0); an error where it is too old for this library."""
    arch = int(_cupy().cuda.Device(device).compute_capability)
    if arch < OLDEST_ARCH:
        raise RuntimeError(
            f"cupy_lora: GPU {device} is too old: expected compute capability {OLDEST_ARCH / 10:.1f} or newer, "
            f"got {arch / 10:.1f}"
        )
    return arch


@dataclass(frozen=True)
class DeviceFacts:
    """What plans need to know of a GPU: compute capability (90 = 9.0) and number of multiprocessors."""

    arch: int
    sm_count: int


RUNNER_FACTS = DeviceFacts(arch=90, sm_count=132)  # what the CPU runner stands for


@functools.cache
def device_facts(device: int) -> DeviceFacts:
    """The facts of a GPU; of an H100 or H200 for host memory (-1), which only the CPU runner launches over."""
    if device < 0:
        return RUNNER_FACTS
    return DeviceFacts(device_arch(device), int(_cupy().cuda.Device(device).attributes["MultiProcessorCount"]))


def _function(kernel: Kernel, device: int) -> Any:
    """The kernel on a GPU, loaded at its first use there."""
    cupy = _cupy()
    arch = device_arch(device)
    key = (device, kernel.source, kernel.defines)
    code = b"" if key in _modules else _cubins.cubin(kernel, arch)  # before the lock: threads may compile at once
    with _load_lock, cupy.cuda.Device(device):
        if device in kernel.functions:
            return kernel.functions[device]
        module = _modules.get(key)
        if module is None:
            module = cupy.cuda.Module()
            module.load(code)
            _modules[key] = module
            _cubins.forget(kernel, arch)
        function = module.get_function(kernel.symbol)
        driver = cupy.cuda.driver
        shared = max(_DEFAULT_SHARED, driver.funcGetAttribute(_ATTR_MAX_DYNAMIC_SHARED, function.ptr))
        if kernel.shared > shared:
            driver.funcSetAttribute(function.ptr, _ATTR_MAX_DYNAMIC_SHARED, kernel.shared)
        if kernel.cluster > _PORTABLE_CLUSTER:
            driver.funcSetAttribute(function.ptr, _ATTR_NON_PORTABLE_CLUSTER, 1)
        kernel.functions[device] = function
        return function
