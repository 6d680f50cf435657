"""``python -m cupy_lora info | demo | warmup``."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__, _cubins, _device, _env, _jit, _paths, _warmup, demo, dispatch
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
    warm = commands.add_parser("warmup", help="compile a model's kernels before the first request")
    warm.add_argument("--model", type=Path, metavar="PATH", help="a checkpoint's folder, or its config.json")
    warm.add_argument("--in-features", type=int, metavar="N", help="or one layer: its input width")
    warm.add_argument("--out-features", type=_numbers, nargs="+", metavar="N", help="and each slice's width")
    warm.add_argument("--ranks", type=_numbers, nargs="+", default=[[16]], metavar="R", help="of the adapters (16)")
    warm.add_argument("--tokens", type=_numbers, nargs="+", metavar="N", help="of a batch (all from 1 to 8192)")
    warm.add_argument("--max-adapters", type=int, default=64, metavar="N", help="slots of the weights (64)")
    warm.add_argument("--dtype", choices=sorted(demo.DTYPES), default="float16")
    warm.add_argument("--arch", type=int, metavar="N", help="for this compute capability (90 for 9.0), without a GPU")
    warm.add_argument("--sms", type=int, metavar="N", help="multiprocessors of that GPU, where it is not the usual one")
    warm.add_argument("--cubins", type=Path, metavar="DIR", help="write the machine code here, for CUPY_LORA_CUBINS")
    warm.add_argument("--jobs", type=int, metavar="N", help="threads that compile (one a core)")
    options = parser.parse_args(argv)
    try:
        if options.command == "info":
            return info()
        if options.command == "demo":
            return demo.run(options)
        for name in ("out_features", "ranks", "tokens"):
            values = getattr(options, name)
            setattr(options, name, None if values is None else [number for some in values for number in some])
        return _warmup.main(options)
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _numbers(text: str) -> list[int]:
    """``8,16,64`` as numbers."""
    return [int(part) for part in text.split(",")]


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
    rows = [("kernel cache", str(_cubins.cache_folder()))]
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


if __name__ == "__main__":
    sys.exit(main())
