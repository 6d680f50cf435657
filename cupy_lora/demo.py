"""``python -m cupy_lora demo``: many requests, several adapters, one batch, each request checked.

A Llama-shaped model answers requests that use different LoRA adapters (or none) together: every step is one mixed
batch of prompts and single tokens, and every projection adds all of its LoRA updates by one ``add_lora``. Afterwards
each request's tokens go through the same model in float32 with that request's adapter merged into the weights, and the
logits must agree within the rounding of the dtype. The first requests' tokens also go through
:mod:`cupy_lora.punica_kernels`, by the calls that LoRAX makes, and are held to the same.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from . import _drop_in
from ._arrays import BFLOAT16, FLOAT16
from ._demo_model import ADAPTERS, cache_folder, write_demo_model
from ._llama import Llama, Xp, read_config
from ._merged import check
from ._served import ServedOps
from ._server import make_requests, room_for, serve
from .peft import load_peft

__all__ = ["ADAPTERS", "DTYPES", "add_arguments", "cache_folder", "run", "write_demo_model"]

DROP_IN = 3  # requests that go through the drop-in module too: the bare model and two adapters
DTYPES = {"float16": FLOAT16, "bfloat16": BFLOAT16}


def pick_device(choice: str) -> tuple[Xp, str]:
    """The array module to run on, and what that is; ``auto`` is the GPU where CuPy finds one."""
    from ._jit import device_arch

    why = ""
    if choice != "cpu":
        try:
            import cupy

            if cupy.cuda.runtime.getDeviceCount() > 0:
                device = cupy.cuda.runtime.getDevice()
                name = cupy.cuda.runtime.getDeviceProperties(device)["name"].decode()
                return cupy, f"GPU {device} ({name}, sm_{device_arch(device)}), CuPy {cupy.__version__}"
            why = "no GPU"
        except ImportError as error:
            why = f"no CuPy: {error}"
        except cupy.cuda.runtime.CUDARuntimeError as error:
            why = f"no usable GPU: {str(error).split(':')[0]}"
        if choice == "gpu":
            raise ValueError(f"--device: expected a machine with a GPU and CuPy, got one with {why}")
    return np, f"CPU, NumPy {np.__version__}" + (f" ({why})" if why else "")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--model", type=Path, metavar="DIR", help="a Llama checkpoint (config.json, safetensors)")
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="NAME=DIR", help="a PEFT adapter of that model; repeatable"
    )
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float16", help="of activations and adapters")
    parser.add_argument("--device", choices=("auto", "gpu", "cpu"), default="auto")
    parser.add_argument("--requests", type=int, default=18, metavar="N", help="how many requests (18)")
    parser.add_argument("--tokens", type=int, default=32, metavar="N", help="tokens decoded for each (32)")
    parser.add_argument("--admit", type=int, default=6, metavar="N", help="new requests that join per step (6)")


def find_adapters(options: argparse.Namespace) -> dict[str, Path]:
    """Name and folder of each adapter: those of the options, or the bundled ones for the bundled model."""
    found: dict[str, Path] = {}
    for entry in options.adapter:
        name, equals, folder = entry.partition("=")
        if not (name and equals and folder) or name in found:
            raise ValueError(f"--adapter: expected NAME=DIR with a name of its own, got {entry!r}")
        found[name] = Path(folder)
    if not found and options.model is None:
        found = {folder.name: folder for folder in sorted(ADAPTERS.iterdir()) if folder.is_dir()}
    if not found:
        raise ValueError("--adapter: expected at least one NAME=DIR with --model, got none")
    return found


def run(options: argparse.Namespace) -> int:
    """Serve, check, print; 0 if every request agrees with its merged model, else 1."""
    try:
        from rich.console import Console
        from rich.progress import Progress
        from rich.table import Table
    except ImportError as error:
        raise RuntimeError(
            "cupy_lora: the package rich is needed for the demo: expected it to be installed "
            f"(pip install 'cupy-lora[demo]'), got ImportError: {error}"
        ) from error
    for name in ("requests", "tokens", "admit"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name}: expected a positive number, got {getattr(options, name)}")
    console = Console(highlight=False)
    dtype = DTYPES[options.dtype]
    xp, device = pick_device(options.device)
    folder = options.model
    if folder is None:
        folder = cache_folder() / "demo-llama-1"
        write_demo_model(folder)
    folders = find_adapters(options)
    names = list(folders)
    vocab_size = read_config(folder).vocab_size
    requests = make_requests(options.requests, len(folders), vocab_size)
    warmup = make_requests(len(folders) + 1, len(folders), vocab_size)
    groups = (requests, warmup)
    most_rows = max(sum(len(request.prompt) for request in group) for group in groups)
    most_slots = max(room_for(group, options.tokens) for group in groups)

    with Progress(console=console, transient=True) as progress:
        loading = progress.add_task("load", total=len(folders) + 2)
        model = Llama.read(folder, xp, dtype)
        progress.advance(loading)
        stored = []
        for path in folders.values():
            stored.append(load_peft(path))
            progress.advance(loading)
        served = ServedOps(
            model, dtype, [load_peft(path, dtype=dtype) for path in folders.values()], most_rows, most_slots
        )
        # Compiles what is missing in CuPy's cache, so that the times below are of serving alone.
        serve(served, warmup, min(2, options.tokens), len(warmup))
        progress.advance(loading)
        serving = progress.add_task("serve", total=len(requests) * options.tokens)
        seconds = serve(served, requests, options.tokens, options.admit, lambda n: progress.advance(serving, n))
        refused = _drop_in.why_not(model.config)
        again = [] if refused else _drop_in.again(model, dtype, stored, requests[:DROP_IN])
        checking = progress.add_task("check", total=len(requests) + len(again))
        verdicts = check(model, dtype, stored, [*requests, *again], lambda n: progress.advance(checking, n))

    console.print(f"{len(requests)} requests, {len(folders)} adapters, one batch, {options.dtype}\n{device}")
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("")
    table.add_column("adapter")
    for column in ("rank", "tokens", "effect", "difference", "allowed", "tokens/s", ""):
        table.add_column(column, justify="right")
    for request in requests:
        verdict = verdicts[request.name]
        bare = request.adapter < 0
        table.add_row(
            request.name,
            "(none)" if bare else names[request.adapter],
            "" if bare else ",".join(map(str, stored[request.adapter].ranks)),
            f"{len(request.prompt)}+{len(request.tokens)}",
            "" if bare else f"{verdict.effect:.2f}",
            f"{verdict.difference:.1e}",
            f"{verdict.tolerance:.1e}",
            f"{len(request.tokens) / request.seconds:.0f}",
            "ok" if verdict.passed else "[bold red]WRONG[/]",
        )
    console.print(table)
    console.print(
        "tokens: prompt + decoded. The others are of the logits, the largest:\n"
        "effect: merged model from bare model; difference: served from merged (float32);\n"
        "allowed: what rounding to the dtype explains",
        style="dim",
    )
    failed = [name for name, verdict in verdicts.items() if not verdict.passed]
    decoded = sum(len(request.tokens) for request in requests)
    console.print(f"{decoded} tokens in {seconds:.2f} s: {decoded / seconds:.0f} tokens/s")
    if refused:
        console.print(f"nothing through cupy_lora.punica_kernels: {refused}")
    else:
        nearest = max((verdicts[request.name] for request in again), key=lambda v: v.difference / (v.tolerance or 1))
        console.print(
            f"{', '.join(request.name for request in requests[:DROP_IN])} again through cupy_lora.punica_kernels, by "
            f"LoRAX's calls:\ndifference {nearest.difference:.1e}, allowed {nearest.tolerance:.1e}"
        )
    if failed:
        console.print(
            f"[bold red]{len(failed)} requests are further from their merged model than rounding:[/] {failed}"
        )
        return 1
    console.print(f"all {len(requests)} requests agree with their merged model within the rounding of {options.dtype}")
    return 0
