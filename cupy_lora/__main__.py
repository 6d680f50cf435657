"""``python -m cupy_lora info | demo | warmup``."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import __version__, _device, _env, _jit, _paths, demo, dispatch
from ._device import has_gpu_kernels
from .lora_batch import tile_capacity, tile_heights

PACKAGES = ("numpy", "ml_dtypes", "cupy-cuda12x", "cupy-cuda13x", "safetensors", "torch", "jax")
RANKS = (1, 4, 8, 16, 32, 64, 128, 256, 512)
LAYER = (4096, (4096,))  # the layer whose paths info shows: its input width and the widths of its slices
BATCHES = (("1 token", 1, 1), ("64 tokens, 64 adapters", 64, 64), ("2048 tokens, 1 adapter", 2048, 1))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m cupy_lora", description="Multi-LoRA serving kernels")
    commands = parser.add_subparsers(dest="command", required=True, metavar="info | demo | warmup")
    commands.add_parser("info", help="versions, device, cache folder, switches, and the path that each rank takes")
    demo.add_arguments(
        commands.add_parser("demo", help="answer requests with several adapters in one batch and check each of them")
    )
    warm = commands.add_parser("warmup", help="compile a model's LoRA kernels before the first request")
    warm.add_argument("--model", type=Path, metavar="DIR", help="take the widths from its config.json")
    warm.add_argument("--in-features", type=int, metavar="N", help="or one layer: its input width")
    warm.add_argument("--out-features", type=int, nargs="+", metavar="N", help="and the width of each of its slices")
    warm.add_argument("--ranks", type=int, nargs="+", default=[16], metavar="R", help="of the adapters (16)")
    warm.add_argument(
        "--tokens", type=int, nargs="+", default=[1, 64, 2048], metavar="N", help="of a batch (1 64 2048)"
    )
    warm.add_argument("--dtype", choices=sorted(demo.DTYPES), default="float16")
    options = parser.parse_args(argv)
    try:
        if options.command == "info":
            return info()
        if options.command == "demo":
            return demo.run(options)
        return warmup(options)
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def info() -> int:
    """Print what this installation is and what it would do."""
    rows = [("cupy_lora", __version__), ("python", f"{platform.python_version()}, {platform.platform()}")]
    for package in PACKAGES:
        try:
            rows.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((package, "not installed"))
    rows += _device_rows()
    rows.append(("CUDA sources", f"{_paths.cuda_src()}, digest {_paths.source_digest()[:12]}"))
    rows.append(("demo model", str(demo.cache_folder())))
    _print("cupy_lora", rows)
    _print(
        "switches (environment)",
        [(switch.name, f"{'on' if switch.on else 'off':4} {switch.effect}") for switch in _env.SWITCHES],
    )
    _print(*_paths_by_rank())
    return 0


def _paths_by_rank() -> tuple[str, list[tuple[str, str]]]:
    """How add_lora runs each rank, here or, without a GPU, on the one that the CPU runner stands for."""
    width, slices = LAYER
    layer = f"{width} -> {' + '.join(map(str, slices))}"
    if not dispatch.has_sgmv():
        return f"add_lora, {layer}", [("any rank", f"a loop of matrix products ({_env.DISABLE_SGMV.name})")]
    here = has_gpu_kernels()
    facts = _jit.device_facts(_device.resolve(None)) if here else _jit.RUNNER_FACTS
    place = "here" if here else "NumPy here; on a GPU"
    title = f"add_lora, {layer}: {place} (sm_{facts.arch}, {facts.sm_count} SMs)"
    rows = [("", "".join(f"{name:32}" for name, _, _ in BATCHES).rstrip())]
    for rank in RANKS:
        paths = []
        for _, tokens, adapters in BATCHES:
            tiles = {height: tile_capacity(tokens, adapters, height) for height in tile_heights(tokens)}
            config = dispatch.choose_lora(
                rank, tokens, width, slices, arch=facts.arch, sm_count=facts.sm_count, tiles=tiles
            )
            paths.append(f"{config.form}: {config.rows} rows, cluster {config.cluster}")
        rows.append((f"rank {rank}", "".join(f"{path:32}" for path in paths).rstrip()))
    return title, rows


def _print(title: str, rows: Sequence[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    print(title)
    for name, text in rows:
        print(f"  {name:{width}}  {text}")
    print()


def _device_rows() -> list[tuple[str, str]]:
    try:
        import cupy
    except ImportError as error:
        return [("device", f"CPU (no CuPy: {error})")]
    cache = os.environ.get("CUPY_CACHE_DIR") or str(Path.home() / ".cupy" / "kernel_cache")
    rows = [("kernel cache", cache)]
    runtime = cupy.cuda.runtime
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        return [*rows, ("device", f"CPU ({str(error).splitlines()[0]})")]
    rows.append(("CUDA", f"runtime {runtime.runtimeGetVersion()}, driver {runtime.driverGetVersion()}"))
    for device in range(count):
        facts = runtime.getDeviceProperties(device)
        arch = int(cupy.cuda.Device(device).compute_capability)
        note = "" if arch >= _jit.OLDEST_ARCH else f"; too old: expected sm_{_jit.OLDEST_ARCH} or newer"
        rows.append(
            (
                f"device {device}",
                f"{facts['name'].decode()}, sm_{arch}, {facts['multiProcessorCount']} SMs, "
                f"{facts['totalGlobalMem'] / 2**30:.0f} GiB{note}",
            )
        )
    return rows


def warmup(options: argparse.Namespace) -> int:
    """Compile every LoRA kernel that the given layers need, by running each once on zeros."""
    from . import LoraBatch, LoraWeights, add_lora
    from ._llama import GROUPS, read_config

    one_layer = options.in_features is not None and options.out_features is not None
    if one_layer == (options.model is not None):
        raise ValueError("warmup: expected --model, or --in-features with --out-features, got neither or both")
    if not has_gpu_kernels():
        raise ValueError("warmup: expected a GPU and CuPy (without them there is nothing to compile), got none")
    import cupy

    if one_layer:
        layers = [(options.in_features, tuple(options.out_features))]
    else:
        config = read_config(options.model)
        layers = sorted({config.widths(group) for group in GROUPS})
    dtype: np.dtype[Any] = demo.DTYPES[options.dtype]
    slots = len(options.ranks)
    for width, slices in layers:
        begun = time.perf_counter()
        weights = LoraWeights(width, slices, max_adapters=slots, dtype=dtype)
        for slot, rank in enumerate(options.ranks):
            a, b = np.zeros((rank, width), dtype), [np.zeros((out, rank), dtype) for out in slices]
            weights.load(slot, [a] * len(slices), b)
        for tokens in options.tokens:
            batch = LoraBatch(tokens, max_adapters=slots)
            x, y = cupy.zeros((tokens, width), dtype), cupy.zeros((tokens, sum(slices)), dtype)
            for indices in (np.zeros(tokens, np.int32), np.arange(tokens, dtype=np.int32) % slots):
                batch.update(indices)
                add_lora(y, x, weights, batch)
        cupy.cuda.get_current_stream().synchronize()
        print(f"{width} -> {' + '.join(map(str, slices))}: {time.perf_counter() - begun:.2f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
