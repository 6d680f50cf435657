"""Where a benchmark runs: buffers, random data, timing by CUDA-graph replay, the floors of this machine.

:class:`GpuRig` measures; :class:`DryRig` runs the same code over small NumPy arrays and times nothing, which is
how the benchmark itself is tested without a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import math
import platform
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from .model import Stats, stats

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
ROTATION_BYTES = 320_000_000
GRAPH_US = 1500.0  # long enough to drown the gap between two graphs
CALLS_PER_GRAPH = (20, 1000)
REPLAYS = 12
LEAD_US = 20_000.0
SHORTEST_US = 0.3  # no kernel node takes less: below it, the capture missed the launches

Call = Callable[[], Any]


def random_host(size: int, dtype: np.dtype[Any], seed: int, amplitude: float) -> np.ndarray:
    """What ``fill_*`` of kernels.cu writes: uniform in [-amplitude, amplitude), the same bits on both sides."""
    with np.errstate(over="ignore"):
        h = np.arange(size, dtype=np.uint32) * np.uint32(0x9E3779B1) + np.uint32(seed)
        h ^= h >> np.uint32(16)
        h *= np.uint32(0x85EBCA6B)
        h ^= h >> np.uint32(13)
        h *= np.uint32(0xC2B2AE35)
        h ^= h >> np.uint32(16)
    unit = (h >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1)
    return (unit * np.float32(amplitude)).astype(dtype)


def graph_plan(sets: int, expected_us: float) -> tuple[int, int]:
    """(graphs, calls in each) so that a graph lasts about GRAPH_US and the rotation visits every set in turn.

    With few sets one graph goes around them a whole number of times; with many, consecutive graphs share them out.
    """
    low, high = CALLS_PER_GRAPH
    wanted = min(max(math.ceil(GRAPH_US / max(expected_us, 0.5)), low), high)
    if sets <= wanted:
        return 1, math.ceil(wanted / sets) * sets
    graphs = math.ceil(sets / wanted)
    return graphs, math.ceil(sets / graphs)


def launches_of(call: Call) -> str:
    """What one call launches: kernel, tile rows (M), cluster (C), warps (W), stages (S), grid, shared memory."""
    from cupy_lora import _jit

    seen: list[str] = []

    def see(launch: Any) -> None:
        kernel, defines = launch.kernel, dict(launch.kernel.defines)
        parts = [kernel.symbol]
        if "TILE_ROWS" in defines:
            parts.append(f"M{defines['TILE_ROWS']}")
        parts += [f"C{kernel.cluster}", f"W{kernel.block // 32}"]
        if "STAGES" in defines:
            parts.append(f"S{defines['STAGES']}")
        parts.append("x".join(map(str, launch.grid)))
        seen.append(" ".join([*parts, f"{kernel.shared // 1024}KB"]))

    with _jit.watcher(see):
        call()
    return "; ".join(seen)


class Rig:
    """What the two rigs share. ``xp`` is the array module of the buffers."""

    xp: Any = np
    dry = False
    l2_bytes = 0
    memory_bytes = 0
    torch: Any = None

    def __init__(self) -> None:
        self._seed = 0

    def random(self, shape: tuple[int, ...], dtype: Any = BFLOAT16, amplitude: float = 1.0) -> Any:
        """New random data; every call draws other values, the same in every run."""
        self._seed += 1
        return self._random(shape, np.dtype(dtype), (self._seed * 0x632BE5AB) & 0xFFFFFFFF, amplitude)

    def _random(self, shape: tuple[int, ...], dtype: np.dtype[Any], seed: int, amplitude: float) -> Any:
        return random_host(math.prod(shape), dtype, seed, amplitude).reshape(shape)

    def reseed(self) -> None:
        """Back to the first random draw, so that a case's data does not depend on the cases before it."""
        self._seed = 0

    def array(self, host: np.ndarray) -> Any:
        """The host array, where the buffers are."""
        return host.copy()

    def zeros(self, shape: tuple[int, ...], dtype: Any = BFLOAT16) -> Any:
        return self.array(np.zeros(shape, dtype))

    def host(self, array: Any) -> np.ndarray:
        """A copy in host memory."""
        return np.array(array)

    def sync(self) -> None:
        return

    def sets_for(self, nbytes: int, most: int = 1200) -> int:
        """How many sets of buffers the rotation needs so that none is in the cache when its turn comes."""
        wanted = max(ROTATION_BYTES, 3 * self.l2_bytes)
        return min(max(math.ceil(wanted / max(nbytes, 1)), 2), most)

    def machine(self) -> dict[str, Any]:
        return {"host": platform.machine(), "system": platform.platform(), "gpu": None}


class DryRig(Rig):
    """NumPy arrays, no timing: proves the wiring, not the speed."""

    dry = True
    copy_gbps: float | None = None

    def sets_for(self, nbytes: int, most: int = 1200) -> int:
        del nbytes, most
        return 2

    def read_floor(self, nbytes: int, sets: int = 1000) -> float | None:
        del nbytes, sets
        return None

    def time(self, calls: Sequence[Call], expected_us: float | None, capture: str = "cupy", replays: int = 0) -> None:
        """Run every call once."""
        del expected_us, capture, replays
        for call in calls:
            call()

    def release(self) -> None:
        return


class GpuRig(Rig):
    """One GPU through CuPy. Everything runs on one non-blocking stream; use it as a context."""

    def __init__(self, device: int = 0) -> None:
        super().__init__()
        import cupy

        self.xp = cupy
        self.device = cupy.cuda.Device(device)
        self.device.use()
        properties = cupy.cuda.runtime.getDeviceProperties(device)
        self.l2_bytes = int(properties["l2CacheSize"])
        self.sms = int(properties["multiProcessorCount"])
        self.memory_bytes = int(properties["totalGlobalMem"])
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self._modules: dict[int, Any] = {}
        self._sink = cupy.zeros(4, np.uint32)
        self._pool: Any = None
        self._floors: dict[tuple[int, int], float] = {}
        self._copy_gbps: float | None = None
        self._torch_stream: Any = None

    def __enter__(self) -> GpuRig:
        self.stream.use()
        return self

    def __exit__(self, *_: object) -> None:
        self.xp.cuda.Stream.null.use()

    # -- buffers

    def _kernel(self, name: str, unroll: int = 8) -> Any:
        module = self._modules.get(unroll)
        if module is None:
            source = Path(__file__).with_name("kernels.cu").read_text()
            module = self.xp.RawModule(code=source, options=("--std=c++17", f"-DUNROLL={unroll}"), backend="nvrtc")
            self._modules[unroll] = module
        return module.get_function(name)

    def _random(self, shape: tuple[int, ...], dtype: np.dtype[Any], seed: int, amplitude: float) -> Any:
        size = math.prod(shape)
        bits = np.dtype(np.uint16) if dtype == BFLOAT16 else np.dtype(np.float32)
        out = self.xp.empty(size, bits)
        if size:
            name = "fill_bfloat16" if dtype == BFLOAT16 else "fill_float32"
            blocks = min(math.ceil(size / 256), self.sms * 16)
            args = (out, np.int64(size), np.uint32(seed), np.float32(amplitude))
            self._kernel(name)((blocks,), (256,), args)
        if dtype == BFLOAT16:
            out = out.view(BFLOAT16)
        elif dtype != np.float32:
            out = out.astype(dtype)
        return out.reshape(shape)

    def array(self, host: np.ndarray) -> Any:
        if host.dtype == BFLOAT16:
            return self.xp.asarray(np.ascontiguousarray(host).view(np.uint16)).view(BFLOAT16)
        return self.xp.asarray(host)

    def host(self, array: Any) -> np.ndarray:
        if array.dtype == BFLOAT16:
            return np.asarray(self.xp.asnumpy(array.view(np.uint16))).view(BFLOAT16)
        return np.asarray(self.xp.asnumpy(array))

    def zeros(self, shape: tuple[int, ...], dtype: Any = BFLOAT16) -> Any:
        if np.dtype(dtype) == BFLOAT16:
            return self.xp.zeros(shape, np.uint16).view(BFLOAT16)
        return self.xp.zeros(shape, dtype)

    def sync(self) -> None:
        self.stream.synchronize()

    def release(self) -> None:
        """Give free memory back between cases."""
        self.sync()
        self.xp.get_default_memory_pool().free_all_blocks()
        if self.torch is not None:
            self.torch.cuda.empty_cache()

    # -- torch, only where a peer or a host timing wants it

    def use_torch(self) -> Any:
        """The torch module, its current stream set to this rig's."""
        if self.torch is None:
            import torch

            if not torch.cuda.is_available():
                raise ImportError("torch has no CUDA device")
            self._torch_stream = torch.cuda.ExternalStream(self.stream.ptr, device=self.device.id)
            torch.cuda.set_stream(self._torch_stream)
            self.torch = torch
        return self.torch

    def as_torch(self, array: Any) -> Any:
        """The same memory as a torch tensor."""
        torch = self.use_torch()
        if array.dtype == BFLOAT16:
            return torch.as_tensor(array.view(np.int16), device="cuda").view(torch.bfloat16)
        return torch.as_tensor(array, device="cuda")

    # -- timing

    def _capture(self, calls: Sequence[Call], capture: str) -> Call:
        if capture == "torch":
            torch = self.use_torch()
            graph = torch.cuda.CUDAGraph()
            # Not the context manager torch.cuda.graph: it collects garbage at each capture, over all these buffers.
            graph.capture_begin(capture_error_mode="relaxed")
            try:
                for call in calls:
                    call()
            except BaseException:
                with contextlib.suppress(Exception):
                    graph.capture_end()
                raise
            graph.capture_end()
            replay: Call = graph.replay
            return replay
        self.stream.begin_capture()
        try:
            for call in calls:
                call()
        except BaseException:
            with contextlib.suppress(Exception):  # leaves the stream usable; the capture's own error is the news
                self.stream.end_capture()
            raise
        captured = self.stream.end_capture()
        captured.upload(self.stream)
        return lambda: captured.launch(self.stream)

    def time(
        self, calls: Sequence[Call], expected_us: float | None, capture: str = "cupy", replays: int = REPLAYS
    ) -> Stats:
        """Microseconds per call: graphs of the calls in turn, replayed back to back between events.

        Every call runs once first (compilation, lazy state). Nothing is subtracted.
        """
        with self.stream:
            return self._time(calls, expected_us, capture, replays)

    def _time(self, calls: Sequence[Call], expected_us: float | None, capture: str, replays: int) -> Stats:
        for call in calls:
            call()
        self.sync()
        if expected_us is None:
            expected_us = self._guess(calls)
        graphs, length = graph_plan(len(calls), expected_us)
        launches: list[Call] = []
        for g in range(graphs):
            chosen = [calls[(g * length + i) % len(calls)] for i in range(length)]
            launches.append(self._capture(chosen, capture))
        rounds = max(replays, min(graphs, 3 * replays))
        events = [self.xp.cuda.Event() for _ in range(rounds + 1)]
        # The lead raises the clocks and keeps the host ahead of the GPU; it ends where the rotation begins.
        lead = min(max(math.ceil(LEAD_US / (length * max(expected_us, 0.5))), 2), 40)
        for i in range(-lead, 0):
            launches[i % graphs]()
        events[0].record(self.stream)
        for i in range(rounds):
            launches[i % graphs]()
            events[i + 1].record(self.stream)
        self.sync()
        elapsed = self.xp.cuda.get_elapsed_time
        result = stats((elapsed(events[i], events[i + 1]) * 1e3 / length for i in range(rounds)), length)
        if result.median < SHORTEST_US:
            raise RuntimeError(f"{result.median:.3f} us per call: expected at least {SHORTEST_US}: an empty graph?")
        return result

    def _guess(self, calls: Sequence[Call]) -> float:
        few = list(calls[:4])
        start, stop = self.xp.cuda.Event(), self.xp.cuda.Event()
        start.record(self.stream)
        for call in few:
            call()
        stop.record(self.stream)
        self.sync()
        # Eager calls wait for the host, so half of what they take is nearer to the GPU's time.
        return float(self.xp.cuda.get_elapsed_time(start, stop)) * 1e3 / len(few) / 2

    # -- the machine's floors

    def _pool_of(self, nbytes: int) -> Any:
        if self._pool is None or self._pool.size * 4 < nbytes:
            self._pool = None
            words = math.ceil(max(nbytes, 2 * ROTATION_BYTES, 6 * self.l2_bytes) / 4 / 1024) * 1024
            self._pool = self._random((words,), np.dtype(np.float32), 1, 1.0).view(np.uint32)
        return self._pool

    @property
    def copy_gbps(self) -> float:
        """Bytes read plus bytes written per second by the best large copy, 1e9 bytes."""
        if self._copy_gbps is None:
            half = 512_000_000
            source, target = self.xp.zeros(half, np.uint8), self.xp.zeros(half, np.uint8)
            calls: dict[str, Call] = {"memcpy": lambda: target.data.copy_from_device_async(source.data, half)}
            for unroll in (4, 8):
                kernel = self._kernel("copy_once", unroll)
                args = (target, source, np.int64(half // 16))
                calls[f"copy_once {unroll}"] = functools.partial(kernel, (self.sms * 4,), (512,), args)
            best = min(self.time([call], 250.0).median for call in calls.values())
            self._copy_gbps = 2 * half / best / 1e3
            del source, target
            self.release()
        return self._copy_gbps

    @functools.cached_property
    def empty_kernel_us(self) -> float:
        """A kernel node that does nothing, in a graph of them."""
        kernel = self._kernel("empty")
        return self.time([functools.partial(kernel, (1,), (32,), ())], 0.7).median

    def raw_launch(self) -> Call:
        """CuPy's own launch of a kernel that does nothing with three arrays and three numbers."""
        arrays = [self.xp.zeros(16, np.float32) for _ in range(3)]
        args = (*arrays, np.int32(1), np.int32(2), np.float32(3))
        return functools.partial(self._kernel("take_six"), (1,), (32,), args)

    def read_floor(self, nbytes: int, sets: int = 1000) -> float | None:
        """Microseconds of the best kernel that only reads ``nbytes``, one launch a call; None for no bytes.

        It rotates over as many places as the case has sets, so that both are as cold.
        """
        if nbytes <= 0:
            return None
        if (nbytes, sets) not in self._floors:
            self._floors[nbytes, sets] = self._measure_floor(nbytes, sets)
        return self._floors[nbytes, sets]

    def _measure_floor(self, nbytes: int, sets: int) -> float:
        pool = self._pool_of(nbytes)
        base, words = int(pool.data.ptr), math.ceil(nbytes / 16)
        span = math.ceil(nbytes / 256) * 256
        sets = max(min(pool.size * 4 // span, sets), 1)
        best = math.inf
        # One 16-byte word per thread where that fills the machine, several in flight where there is more to read.
        for unroll, threads in ((1, 256), (4, 256), (8, 512)):
            kernel = self._kernel("read_once", unroll)
            blocks = min(max(math.ceil(words / (threads * unroll)), 1), self.sms * (2048 // threads))
            calls = []
            for s in range(sets):
                args = (np.uint64(base + s * span), np.int64(words), self._sink)
                calls.append(functools.partial(kernel, (blocks,), (threads,), args))
            best = min(best, self.time(calls, max(nbytes / 4.4e6, 2.0), replays=8).median)
        return best

    def machine(self) -> dict[str, Any]:
        runtime = self.xp.cuda.runtime
        name = runtime.getDeviceProperties(self.device.id)["name"]
        return {
            **super().machine(),
            "gpu": name.decode() if isinstance(name, bytes) else str(name),
            "compute_capability": self.device.compute_capability,
            "multiprocessors": self.sms,
            "l2_mb": round(self.l2_bytes / 1e6, 1),
            "memory_gb": round(self.memory_bytes / 1e9, 1),
            "driver": _driver(),
            "cuda_driver_api": runtime.driverGetVersion(),
            "cuda_runtime": runtime.runtimeGetVersion(),
            "nvrtc": _nvrtc(),
        }


def _nvrtc() -> str:
    from cupy_backends.cuda.libs import nvrtc

    return ".".join(map(str, nvrtc.getVersion()))


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.split("\n", 1)[0].strip()
