"""``python -m cupy_lora demo``: many requests, several adapters, one batch, each request checked.

A Llama-shaped model answers requests that use different LoRA adapters (or none) together: every step is one mixed
batch of prompts and single tokens, and every projection adds all of its LoRA updates by one ``add_lora``. Afterwards
each request's tokens go through the same model in float32 with that request's adapter merged into the weights, and the
logits must agree within the rounding of the dtype.

How far rounding alone moves a logit is measured, not guessed: the merged model runs once more with its activations and
its adapter rounded to the dtype, without any LoRA kernel. A request may differ by ``NOISE_FACTOR`` times what that run
differs.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ._arrays import BFLOAT16, FLOAT16, FLOAT32
from ._llama import GROUPS, Batch, Llama, LlamaConfig, Ops, Xp, XpArray, forward, read_config, to_float32
from .peft import PeftAdapter, load_peft, safetensors_package

ADAPTERS = Path(__file__).resolve().parent / "data" / "adapters"
PAGE_SIZE = 16  # tokens of a page of the KV cache
DTYPES = {"float16": FLOAT16, "bfloat16": BFLOAT16}

# Both runs round at nearly the same places, so their largest errors are draws from about the same distribution: over
# 480 random prompts to the bundled adapters in both dtypes their ratio had a median of 1.05 and lay within 0.7 to 1.9.
# What an adapter does to the logits is at least 12 times the tolerance in bfloat16, 98 times in float16.
NOISE_FACTOR = 3.0

DEMO_CONFIG = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=64,
)

PROMPTS = (
    "Which way to the station?",
    "Write a haiku about rain.",
    "Once upon a time",
    "2 + 2 =",
    "The capital of France is",
    "def fibonacci(n):",
    "Translate to German: good morning",
    "A",
    "List three prime numbers above one hundred, smallest first.",
)


def demo_tensors() -> dict[str, np.ndarray]:
    """The demo checkpoint's tensors, bfloat16: the same bits on every machine."""
    draw = np.random.Generator(np.random.PCG64(20240229))
    tensors = {}
    for name, shape in DEMO_CONFIG.tensor_shapes().items():
        uniform = (draw.random(shape) * 2 - 1) * np.sqrt(3.0)  # variance 1
        if len(shape) == 1:
            value = 1 + 0.1 * uniform
        elif name == "model.embed_tokens.weight":
            value = uniform
        else:
            value = uniform / np.sqrt(shape[1])
        tensors[name] = value.astype(np.float32).astype(BFLOAT16)
    tensors["lm_head.weight"] = (tensors["lm_head.weight"].astype(np.float32) * 3).astype(BFLOAT16)
    return tensors


def write_demo_model(path: Path) -> None:
    """Write the demo checkpoint in Hugging Face's layout, unless it is there."""
    if (path / "config.json").is_file():
        return
    safetensors = safetensors_package()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "bfloat16",
    }
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        config[name] = getattr(DEMO_CONFIG, name)
    for name in ("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "tie_word_embeddings"):
        config[name] = getattr(DEMO_CONFIG, name)
    path.mkdir(parents=True, exist_ok=True)
    # The config comes last and by a rename: a run that was cut short leaves no model that looks whole.
    with tempfile.TemporaryDirectory(dir=path) as scratch:
        safetensors.numpy.save_file(demo_tensors(), Path(scratch) / "model", metadata={"format": "pt"})
        (Path(scratch) / "config").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (Path(scratch) / "model").replace(path / "model.safetensors")
        (Path(scratch) / "config").replace(path / "config.json")


def cache_folder() -> Path:
    """Where the demo keeps its checkpoint: ``cupy_lora`` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cupy_lora"


@dataclass
class Request:
    """A prompt, the adapter it asks for, and what serving it produced."""

    name: str
    adapter: int  # slot, -1 = the bare model
    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    logits: list[np.ndarray] = field(default_factory=list)  # one row per token, float32
    started: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class Verdict:
    """What checking a request against its merged model found; logit differences are the largest over all tokens."""

    difference: float  # of the served request from the float32 model with the adapter merged
    noise: float  # of that model with its activations rounded to the dtype from itself
    effect: float  # of the merged model from the bare one: what the adapter does

    @property
    def tolerance(self) -> float:
        return NOISE_FACTOR * self.noise

    @property
    def passed(self) -> bool:
        return self.difference <= self.tolerance  # False for a NaN


class ServedOps(Ops):
    """The model as a server runs it, on the library's ops: base weights in common, every row's own adapter on top.

    Parameters
    ----------
    model : Llama
    dtype : numpy.dtype
        float16 or bfloat16.
    adapters : sequence of PeftAdapter
        Slot 0 and on.
    max_tokens : int
        Rows of a step, at most.
    num_pages : int
        Pages of the KV cache, of ``PAGE_SIZE`` tokens.
    """

    def __init__(
        self, model: Llama, dtype: np.dtype[Any], adapters: Sequence[PeftAdapter], max_tokens: int, num_pages: int
    ) -> None:
        super().__init__(model, dtype)
        from . import LoraBatch, LoraWeights, PagedKvCache

        slots = max(len(adapters), 1)
        device = "cpu" if self.xp is np else None  # None: the current GPU
        config = self.config
        self.cache = PagedKvCache(
            num_pages,
            config.num_hidden_layers,
            config.num_key_value_heads,
            PAGE_SIZE,
            config.head_dim,
            dtype,
            device=device,
        )
        self.schedule = LoraBatch(max_tokens, max_adapters=slots, device=device)
        self.lora: list[dict[str, Any]] = []
        loaded: set[str] = set()
        for layer in range(self.config.num_hidden_layers):
            self.lora.append({})
            for group in GROUPS:
                width, slices = self.config.widths(group)
                weights = LoraWeights(width, slices, max_adapters=slots, dtype=dtype, device=device)
                names = self.config.module_names(layer, group)
                for slot, adapter in enumerate(adapters):
                    adapter.load_into(weights, slot, *names)
                loaded.update(names)
                self.lora[layer][group] = weights
        for adapter in adapters:
            homeless = sorted(set(adapter.modules) - loaded)
            if homeless:
                raise ValueError(f"{adapter.path}: expected adapters of modules that the model has, got {homeless[0]}")

    def open(self, capacity: int) -> int:
        return int(self.cache.add())

    def close(self, sequence: int) -> None:
        self.cache.free(sequence)

    def length(self, sequence: int) -> int:
        return int(self.cache.length(sequence))

    def begin(self, batch: Batch) -> None:
        self.bounds = self.xp.asarray(np.array(batch.bounds, np.int32))
        self.schedule.update(batch.slots)
        super().begin(batch)

    def positions(self, batch: Batch) -> XpArray:
        from . import prepare_position_slot_ids

        lengths = self.xp.asarray(np.array([self.length(sequence) for sequence in batch.sequences], np.int32))
        none = self.xp.zeros_like(self.bounds)  # the pages address the cache: no slot indices are needed
        positions, slot_indices = self.xp.empty((2, batch.bounds[-1]), np.int32)
        most = int(np.diff(batch.bounds).max())
        prepare_position_slot_ids(most, lengths, self.bounds, none, positions, slot_indices)
        return positions

    def grow(self, batch: Batch) -> None:
        for sequence, count in zip(batch.sequences, np.diff(batch.bounds).tolist(), strict=True):
            self.cache.extend(sequence, count)
        self.tables = self.cache.batch(batch.sequences)

    def write_kv(self, k: XpArray, v: XpArray, layer: int, batch: Batch) -> None:
        from . import init_kv

        sizes = self.config.num_hidden_layers, layer, self.config.num_key_value_heads, PAGE_SIZE
        init_kv(*self.tables, k, v, self.bounds, *sizes)

    def attend(self, q: XpArray, layer: int, batch: Batch) -> XpArray:
        from . import batch_decode, batch_prefill

        sizes = self.config.num_hidden_layers, layer, self.config.num_key_value_heads, PAGE_SIZE
        if batch.bounds[-1] == len(batch.sequences):  # one token each
            return batch_decode(q, *self.tables, *sizes, rope=None)
        return batch_prefill(q, self.bounds, *self.tables, *sizes, rope=None)

    def rms_norm(self, x: XpArray, weight: XpArray) -> XpArray:
        from . import rms_norm

        return rms_norm(x, weight, self.config.rms_norm_eps)

    def add_rms_norm(self, x: XpArray, residual: XpArray, weight: XpArray) -> tuple[XpArray, XpArray]:
        from . import fused_add_rms_norm

        normed, total = fused_add_rms_norm(x, residual, weight, self.config.rms_norm_eps)
        return total, normed

    def linear(self, x: XpArray, layer: int, group: str) -> XpArray:
        from . import add_lora

        return add_lora(super().linear(x, layer, group), x, self.lora[layer][group], self.schedule)


class MergedOps(Ops):
    """The model with one adapter merged into float32 weights."""

    def __init__(self, model: Llama, dtype: np.dtype[Any], adapter: PeftAdapter | None) -> None:
        super().__init__(model, dtype)
        self.merged: dict[tuple[int, str], XpArray] = {}
        if adapter is None:
            return
        for layer in range(self.config.num_hidden_layers):
            for group in GROUPS:
                fused = adapter.fuse(*self.config.module_names(layer, group))
                if fused is None:
                    continue
                weight = model.layers[layer].weight[group].copy()
                stop = 0
                for out, a, b, scale in zip(self.config.widths(group)[1], *fused, strict=True):
                    start, stop = stop, stop + out
                    if a is not None and b is not None:
                        wide_a, wide_b = self.xp.asarray(to_float32(np, a)), self.xp.asarray(to_float32(np, b))
                        weight[start:stop] += self.xp.float32(scale) * (wide_b @ wide_a)
                self.merged[layer, group] = weight

    def weight(self, layer: int, group: str) -> XpArray:
        merged = self.merged.get((layer, group))
        return super().weight(layer, group) if merged is None else merged


def host(x: XpArray) -> np.ndarray:
    """A NumPy array of what may be on a GPU; waits for it."""
    return x if isinstance(x, np.ndarray) else np.asarray(x.get())


def make_requests(count: int, adapters: int, vocab_size: int) -> list[Request]:
    """Requests whose adapters go round robin, the bare model included; prompts are UTF-8 bytes as token ids."""
    requests = []
    for i in range(count):
        prompt = [byte % vocab_size for byte in PROMPTS[i % len(PROMPTS)].encode()]
        requests.append(Request(f"r{i:02d}", i % (adapters + 1) - 1, prompt))
    return requests


def pages_for(request: Request, tokens: int) -> int:
    """Pages of the KV cache that a request takes until its last token."""
    return -(-(len(request.prompt) + tokens) // PAGE_SIZE)


def serve(ops: Ops, requests: Sequence[Request], tokens: int, admit: int, tick: Any = None) -> float:
    """Answer all requests greedily, ``tokens`` each; ``admit`` new ones join per step.

    Returns
    -------
    float
        Seconds.
    """
    xp = ops.xp
    waiting, running = list(requests), list[tuple[Request, Any]]()
    begun = time.perf_counter()
    while waiting or running:
        for request in waiting[:admit]:
            request.started = time.perf_counter()
            running.append((request, ops.open(len(request.prompt) + tokens)))
        del waiting[:admit]
        fresh = [request.tokens[-1:] or request.prompt for request, _ in running]
        bounds = np.cumsum([0, *map(len, fresh)])
        slots = np.repeat(np.array([request.adapter for request, _ in running], np.int32), np.diff(bounds))
        batch = Batch(
            xp.asarray(np.concatenate(fresh)),
            [sequence for _, sequence in running],
            bounds.tolist(),
            slots,
        )
        logits = host(forward(ops, batch, xp.asarray(bounds[1:] - 1)))
        now = time.perf_counter()
        for row, (request, _) in zip(logits, running, strict=True):
            request.tokens.append(int(row.argmax()))
            request.logits.append(row)
            request.seconds = now - request.started
        for request, sequence in running:
            if len(request.tokens) == tokens:
                ops.close(sequence)
        running = [pair for pair in running if len(pair[0].tokens) < tokens]
        if tick is not None:
            tick()
    return time.perf_counter() - begun


def replay(ops: Ops, requests: Sequence[Request]) -> list[np.ndarray]:
    """The logits that ``ops`` gives for the very tokens of served requests: ``(tokens, vocab_size)`` each."""
    xp = ops.xp
    found = []
    for request in requests:
        known = np.array(request.prompt + request.tokens[:-1])
        sequence = ops.open(len(known))
        batch = Batch(xp.asarray(known), [sequence], [0, len(known)])
        rows = np.arange(len(request.prompt) - 1, len(known))
        found.append(host(forward(ops, batch, xp.asarray(rows))))
        ops.close(sequence)
    return found


def check(
    model: Llama, dtype: np.dtype[Any], adapters: Sequence[PeftAdapter], requests: Sequence[Request], tick: Any = None
) -> dict[str, Verdict]:
    """Compare each served request with the float32 model that has its adapter merged."""
    verdicts = {}
    for slot in sorted({request.adapter for request in requests}):
        mine = [request for request in requests if request.adapter == slot]
        adapter = adapters[slot] if slot >= 0 else None
        rounded = load_peft(adapter.path, dtype=dtype) if adapter is not None else None
        expected = replay(MergedOps(model, FLOAT32, adapter), mine)
        noisy = replay(MergedOps(model, dtype, rounded), mine)
        bare = replay(Ops(model), mine)
        for request, want, noise, base in zip(mine, expected, noisy, bare, strict=True):
            got = np.stack(request.logits)
            verdicts[request.name] = Verdict(
                float(np.abs(got - want).max()), float(np.abs(noise - want).max()), float(np.abs(base - want).max())
            )
        if tick is not None:
            tick(len(mine))
    return verdicts


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
    most_pages = max(sum(pages_for(request, options.tokens) for request in group) for group in groups)

    with Progress(console=console, transient=True) as progress:
        loading = progress.add_task("load", total=len(folders) + 2)
        model = Llama.read(folder, xp, dtype)
        progress.advance(loading)
        stored = []
        for path in folders.values():
            stored.append(load_peft(path))
            progress.advance(loading)
        served = ServedOps(
            model, dtype, [load_peft(path, dtype=dtype) for path in folders.values()], most_rows, most_pages
        )
        # Compiles what is missing in CuPy's cache, so that the times below are of serving alone.
        serve(served, warmup, min(2, options.tokens), len(warmup))
        progress.advance(loading)
        steps = options.tokens + (len(requests) - 1) // options.admit
        serving = progress.add_task("serve", total=steps)
        seconds = serve(served, requests, options.tokens, options.admit, lambda: progress.advance(serving))
        checking = progress.add_task("check", total=len(requests))
        verdicts = check(model, dtype, stored, requests, lambda n: progress.advance(checking, n))

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
    if failed:
        console.print(
            f"[bold red]{len(failed)} requests are further from their merged model than rounding:[/] {failed}"
        )
        return 1
    console.print(f"all {len(requests)} requests agree with their merged model within the rounding of {options.dtype}")
    return 0
