"""Compile what a model needs before its first request, in parallel; with a folder for images without a compiler."""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, TextIO

import numpy as np

from . import _cubins, _device, _env, _jit
from ._arrays import CPU, INT32, INT64, Array
from ._jit import DeviceFacts, Kernel
from ._lora_checks import MAX_RANK, integer

# Multiprocessors of the common GPU of each architecture: the choice of a kernel looks at them.
MULTIPROCESSORS: Final = {80: 108, 86: 84, 89: 142, 90: 132, 100: 148, 103: 148, 120: 188}
TOKENS: Final = (*range(1, 9), 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 2048, 4096, 8192)
_FEW: Final = 3  # up to so many ranks, every subset of them is compiled for

Layer = tuple[int, tuple[int, ...]]


def warmup(
    model: Any = None,
    *,
    layers: Iterable[tuple[int, int | Sequence[int]]] = (),
    ranks: Iterable[int] = (16,),
    tokens: Iterable[int] = TOKENS,
    max_adapters: int = 64,
    dtype: Any = "float16",
    arch: int | None = None,
    sm_count: int | None = None,
    cubins: Any = None,
    jobs: int | None = None,
    progress: TextIO | None = None,
) -> int:
    """Compile the kernels of a model's LoRA layers, of their batches and of its RMS norms.

    The machine code goes to the disk cache, where the first call of any process finds it; nothing is launched, so
    that no GPU is needed where ``arch`` is given.

    Parameters
    ----------
    model : path, optional
        A checkpoint's folder, or its config.json: its fused projections (q, k, v; o; gate, up; down) are layers.
    layers : iterable of (int, int or sequence of int)
        More layers: ``in_features`` and ``out_features`` of their :class:`~cupy_lora.LoraWeights`.
    ranks : iterable of int
        Of the adapters. Up to three: every mix of them; more: each alone, and all together.
    tokens : iterable of int
        Sizes of a batch. The default covers 1 to 8192 as the choice of the kernel does.
    max_adapters : int
        Slots of the weights and batches.
    dtype : dtype or str
        float16 or bfloat16: of weights, x and y.
    arch, sm_count : int, optional
        Compute capability (90 for 9.0) and multiprocessors to compile for. Default: those of the current GPU, or
        the multiprocessors of the common GPU of ``arch``.
    cubins : path, optional
        Also write the machine code to this folder, for ``CUPY_LORA_CUBINS``.
    jobs : int, optional
        Threads that compile. Default: one a core.
    progress : text file, optional
        Where a bar is drawn, such as ``sys.stderr``.

    Returns
    -------
    int
        How many kernels are ready.

    Raises
    ------
    TypeError, ValueError
        For wrong sizes, or a config that lacks one.
    RuntimeError
        Where there is no compiler, or a kernel does not compile.
    """
    facts = _facts(arch, sm_count)
    found = [(width, (out,) if isinstance(out, int) else tuple(out)) for width, out in layers]
    hidden: tuple[int, ...] = ()
    if model is not None:
        hidden, of_model = read_model(Path(model))
        found += of_model
    if not found:
        raise ValueError("warmup: expected a model or layers, got neither")
    kernels = [
        *lora_kernels(sorted(set(found)), ranks, tokens, max_adapters, dtype, facts),
        *norm_kernels(hidden, tokens, dtype, facts),
    ]
    bar = _Bar(len({_cubins.unit_of(kernel, facts.arch) for kernel in kernels}), progress)
    return _cubins.build(kernels, facts.arch, jobs=jobs, folder=None if cubins is None else Path(cubins), step=bar.step)


def _facts(arch: int | None, sm_count: int | None) -> DeviceFacts:
    if arch is None:
        if not _device.has_gpu_kernels():
            raise ValueError("warmup: expected a GPU and CuPy, or arch (such as 90), got neither")
        here = _jit.device_facts(_device.resolve(None))
        return here if sm_count is None else DeviceFacts(here.arch, integer("sm_count", sm_count, 1))
    arch = integer("arch", arch, _jit.OLDEST_ARCH)
    if sm_count is None:
        sm_count = MULTIPROCESSORS.get(arch)
        if sm_count is None:
            raise ValueError(f"sm_count: expected the multiprocessors of the sm_{arch} GPU, got None")
    return DeviceFacts(arch, integer("sm_count", sm_count, 1))


def read_model(path: Path) -> tuple[tuple[int, ...], list[Layer]]:
    """Widths of the norms, and the layers, of a config.json of Llama's shape."""
    path = path / "config.json" if path.is_dir() else path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{path}: expected the config of a model, got: {error}") from error

    def size(key: str, default: int | None = None) -> int:
        value = content.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{path}: {key}: expected a number of at least 1, got {value!r}")
        return value

    hidden, inner, heads = size("hidden_size"), size("intermediate_size"), size("num_attention_heads")
    head_dim = size("head_dim", hidden // heads)
    query, kv = heads * head_dim, size("num_key_value_heads", heads) * head_dim
    return (hidden,), [(hidden, (query, kv, kv)), (query, (hidden,)), (hidden, (inner, inner)), (inner, (hidden,))]


def lora_kernels(
    layers: Iterable[Layer],
    ranks: Iterable[int],
    tokens: Iterable[int],
    max_adapters: int,
    dtype: Any,
    facts: DeviceFacts,
) -> Iterator[Kernel]:
    """The kernels of add_lora, of the schedules and of the tables: pure, nothing is compiled."""
    from . import _lora_plan
    from .lora_batch import LoraBatch
    from .lora_weights import RECORD, LoraWeights

    mixes = _mixes([integer("ranks", rank, 1, MAX_RANK) for rank in ranks])
    batches = []
    for count in tokens:
        # On the host, so that it needs no GPU; the plans look at sizes and alignment.
        batch = LoraBatch(count, max_adapters=max_adapters, device="cpu")
        batch.prepare()
        batch.num_tokens = count
        batches.append(batch)
        for index in (INT32, INT64):
            yield _lora_plan.build_tiles(_matrix((count,), index), batch).kernel
    for width, slices in layers:
        weights = LoraWeights(width, slices, max_adapters=max_adapters, dtype=dtype, device="cpu")
        yield _lora_plan.set_slot(weights.table_view, 0, np.zeros(len(slices), RECORD), facts).kernel
        for batch, ranks_now in itertools.product(batches, mixes):
            weights.rank_set = ranks_now
            count = batch.num_tokens
            x, y = _matrix((count, width), weights.dtype), _matrix((count, weights.width), weights.dtype)
            # Indices that came from the device, of one adapter, and of as many as there are.
            for slots in (None, np.zeros(count, np.int32), np.arange(count) % max_adapters):
                batch.expect(slots)
                yield _lora_plan.add_lora(y, x, weights, batch, 1.0, facts).kernel


def norm_kernels(widths: Iterable[int], tokens: Iterable[int], dtype: Any, facts: DeviceFacts) -> Iterator[Kernel]:
    """The kernels of both norms over rows of these widths."""
    from . import norm

    for width, count, fused in itertools.product(widths, tokens, (False, True)):
        x, w = _matrix((count, width), np.dtype(dtype)), _matrix((width,), np.dtype(dtype))
        launch = norm.plan_rms_norm(x, x if fused else None, w, x, 1e-6, facts)
        if launch is not None:
            yield launch.kernel


def _mixes(ranks: Sequence[int]) -> list[frozenset[int]]:
    """What may be loaded at a time."""
    distinct = sorted(set(ranks))
    if not distinct:
        raise ValueError("ranks: expected at least one, got none")
    sizes = range(1, len(distinct) + 1) if len(distinct) <= _FEW else (1, len(distinct))
    return [frozenset(some) for size in sizes for some in itertools.combinations(distinct, size)]


def _matrix(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """An array for the plans to look at: contiguous, aligned, without memory."""
    return Array(0, shape, (shape[1], 1) if len(shape) == 2 else (1,), dtype, CPU, None)


class _Bar:
    """How far it is: a line that is drawn again on a terminal, a last line elsewhere."""

    def __init__(self, total: int, file: TextIO | None) -> None:
        self._total, self._file, self._done = total, file, 0
        self._began = time.monotonic()

    def step(self) -> None:
        self._done += 1
        last = self._done == self._total
        if self._file is None or not (last or self._file.isatty()):
            return
        filled = 30 * self._done // self._total
        took = time.monotonic() - self._began
        line = f"[{'#' * filled}{'.' * (30 - filled)}] {self._done}/{self._total} kernels, {took:.1f} s"
        if self._file.isatty():
            line = f"\r{line}"
        print(line, end="\n" if last or not self._file.isatty() else "", file=self._file, flush=True)


def main(options: Any) -> int:
    """The command ``python -m cupy_lora warmup``."""
    layer = options.in_features is not None, options.out_features is not None
    if layer[0] != layer[1] or layer[0] == (options.model is not None):
        raise ValueError("warmup: expected --model, or --in-features with --out-features, got neither or both")
    count = warmup(
        options.model,
        layers=[(options.in_features, tuple(options.out_features))] if layer[0] else (),
        ranks=options.ranks,
        tokens=options.tokens or TOKENS,
        max_adapters=options.max_adapters,
        dtype=options.dtype,
        arch=options.arch,
        sm_count=options.sms,
        cubins=options.cubins,
        jobs=options.jobs,
        progress=sys.stderr,
    )
    where = f"{options.cubins} (set {_env.CUBINS.name} to it) and " if options.cubins is not None else ""
    print(f"{count} kernels in {where}{_cubins.cache_folder()}")
    return 0
