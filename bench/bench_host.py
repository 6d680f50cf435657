"""What a call costs the host: eager microseconds per call, and the first call of each op in a new process."""

from __future__ import annotations

import functools
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import (
    bench_bgmv,
    bench_lora,
    bench_lora_batch,
    bench_lora_weights,
    bench_metadata,
    bench_norm,
    bench_paged_kv,
    bench_sgmv,
    targets,
)
from .bench_bgmv import Half
from .bench_lora import Layer
from .bench_metadata import Step
from .bench_norm import Norm
from .bench_paged_kv import Append
from .harness import DryRig, GpuRig
from .model import OURS, ROOT, Case, Report, Row, Work, require, stats

FAMILY = "host"
NEEDS = ()
CALLS = 200  # back to back, without a wait between: fewer than the driver's launch queue holds
ROUNDS = 15
FIRST_CALLS = ("add_lora", "rms_norm", "append_kv", "block_tables_to_ragged")  # kept by --quick: seconds each
START = "start to first result"
# The names of the library that an op needs, where that is not the op's own first word.
NEEDS_OF = {"LoraBatch.update": bench_lora.NEEDS, "LoraWeights.load": bench_lora.NEEDS}


@dataclass(frozen=True)
class Op:
    """A public function, as one small case of its family."""

    module: Any
    case: Case

    def build(self, rig: Any, sets: int = 1) -> Work:
        case = self.module.shrunk(self.case) if rig.dry else self.case
        work: Work = self.module.build(case, rig, sets)
        return work


def ops() -> dict[str, Op]:
    """Every op by its name."""
    qkv = (4096, 1024, 1024)
    table: dict[str, tuple[Any, Any]] = {
        "add_lora": (bench_lora, Layer(64, (16,), "uniform 8")),
        "add_lora QKV": (bench_lora, Layer(64, (16,), "uniform 8", 4096, qkv)),
        "LoraBatch.update": (bench_lora_batch, Layer(64, (16,), "uniform 8")),
        "LoraWeights.load": (bench_lora_weights, Layer(8, (16,), "one")),
        "bgmv_shrink": (bench_bgmv, Half("shrink", 64, 16, 4096, "uniform 8")),
        "bgmv_expand": (bench_bgmv, Half("expand", 64, 16, 4096, "uniform 8")),
        "sgmv_shrink": (bench_sgmv, Half("shrink", 512, 16, 4096, "seq 512")),
        "sgmv_expand": (bench_sgmv, Half("expand", 512, 16, 4096, "seq 512")),
        "rms_norm": (bench_norm, Norm(64, 4096)),
        "fused_add_rms_norm": (bench_norm, Norm(64, 4096, add=True)),
        "append_kv": (bench_paged_kv, Append(64, 1, 256)),
        "init_kv": (bench_paged_kv, Append(8, 32, 256)),
        **{name: (bench_metadata, Step(name, 64, 256)) for name in bench_metadata.BUILDERS},
    }
    return {name: Op(module, Case(module.FAMILY, name, 0, params)) for name, (module, params) in table.items()}


def host_target(op: str, arrays: str) -> float | None:
    """Microseconds per call to stay under."""
    if op.startswith("add_lora"):
        return targets.HOST_ADD_LORA[arrays]
    return targets.HOST_METADATA if op in {function for function, _ in targets.METADATA} else None


def cases() -> list[Case]:
    found = []
    for name in ops():
        record = targets.HOST_PEERS.get(name, ())
        for arrays in ("cupy", "torch"):
            target = host_target(name, arrays)
            found.append(Case(FAMILY, f"{name} {arrays}", 0, (name, arrays), True, target, None, record))
    for name in ops():
        found.append(Case(FAMILY, f"first call {name}", 0, (name, "first call"), name in FIRST_CALLS))
    found.append(Case(FAMILY, START, 0, ("add_lora", START), True))
    return found


def run_case(case: Case, rig: Any, report: Report, options: Any) -> None:
    """One row of host time, or the two rows of a first call (cold and warm disk cache)."""
    name, kind = case.params
    try:
        require(NEEDS_OF.get(name, (name.split(" ")[0],)))
    except LookupError as missing:
        report.add(Row(FAMILY, case.name, OURS, "", status="missing", note=str(missing)))
        return
    if kind == START:
        if options.shard is None:
            report.add(*start_rows(dry=rig.dry))
        return
    if kind == "first call":
        if options.shard is None:
            report.add(*first_call_rows(name, dry=rig.dry))
        return
    row = Row(FAMILY, case.name, OURS, "host", target_us=case.target, record=dict(case.record))
    work = ops()[name].build(rig)
    call = work.calls[0] if kind == "cupy" or rig.dry else with_torch(work.calls[0], rig)
    row.error = work.check()
    if not row.error <= 1.0:
        row.status, row.note = "wrong", "failed its check"
    elif rig.dry:
        call()
        row.status = "dry"
    elif options.shard is not None:
        call()
        rig.sync()
    else:
        row.set_time(stats(eager_us(call, rig), CALLS), None)
    report.add(row)


def eager_us(call: Callable[[], Any], rig: Any) -> list[float]:
    """Host microseconds per call, one sample a round of CALLS calls; the GPU is idle when a round begins."""
    for _ in range(20):
        call()
    rig.sync()
    samples = []
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(ROUNDS):
            began = time.perf_counter_ns()
            for _ in range(CALLS):
                call()
            samples.append((time.perf_counter_ns() - began) / 1e3 / CALLS)
            rig.sync()
    finally:
        if collecting:
            gc.enable()
    return samples


def raw_launch_us(rig: Any) -> float:
    """Host microseconds of one plain launch through CuPy: how fast this machine's host is, in the rows' own unit."""
    return float(np.median(eager_us(rig.raw_launch(), rig)))


def with_torch(call: Any, rig: Any) -> Callable[[], Any]:
    """The same call with every CuPy array replaced by a torch tensor over the same memory."""
    rig.use_torch()
    if not isinstance(call, functools.partial):
        raise TypeError(f"call: expected a functools.partial over arrays, got {type(call).__name__}")
    args = [rig.as_torch(arg) if isinstance(arg, rig.xp.ndarray) else arg for arg in call.args]
    keywords = {
        key: rig.as_torch(value) if isinstance(value, rig.xp.ndarray) else value for key, value in call.keywords.items()
    }
    return functools.partial(call.func, *args, **keywords)


# -- the first call of an op, in a process of its own


def first_call(name: str, dry: bool) -> dict[str, float]:
    """Milliseconds of this process: CuPy's import, the context, building the arguments, the op's two first calls."""
    marks = [time.perf_counter()]
    rig: Any = DryRig() if dry else None
    if not dry:
        import cupy  # noqa: F401

    marks.append(time.perf_counter())
    if rig is None:
        rig = GpuRig()
        rig.random((16,))  # the context, and the benchmark's own kernels
        rig.random((16,), np.float32)
        rig.sync()
    marks.append(time.perf_counter())
    import cupy_lora  # noqa: F401

    marks.append(time.perf_counter())
    work = ops()[name].build(rig)
    rig.sync()
    marks.append(time.perf_counter())
    for _ in range(2):
        work.calls[0]()
        rig.sync()
        marks.append(time.perf_counter())
    steps = ("import_cupy", "context", "import_cupy_lora", "build", "first_call", "second_call")
    return {step: 1e3 * (b - a) for step, a, b in zip(steps, marks, marks[1:], strict=False)}


def first_call_rows(name: str, *, dry: bool) -> list[Row]:
    """A process that compiles and one that finds the kernels in the cache; building counts too.

    The schedule of a batch and the table of the weights are compiled when they are built.
    """
    command = ["-m", "bench", "first-call", name]
    aims = (targets.FIRST_CALL_COLD_MS, targets.FIRST_CALL_CACHED_MS)
    return _fresh_rows(f"first call {name}", command, ("build", "first_call"), aims, dry=dry)


def start_rows(*, dry: bool) -> list[Row]:
    """From a started process, CuPy imported, to the first result of add_lora in host memory."""
    steps = ("context", "import_cupy_lora", "weights", "batch", "add_lora")
    return _fresh_rows(START, [str(ROOT / "bench" / "start.py")], steps, (None, targets.START_TO_RESULT_MS), dry=dry)


def _fresh_rows(
    case: str, command: list[str], counted: tuple[str, ...], aims: tuple[float | None, float | None], *, dry: bool
) -> list[Row]:
    """Two processes with a cache folder of their own: the first compiles, the second finds it there."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "CUPY_CACHE_DIR": folder, "PYTHONPATH": _path()}
        words = [sys.executable, *command, *(["--dry-run"] if dry else [])]
        for mode, aim in zip(("cold cache", "warm cache"), aims, strict=True):
            began = time.perf_counter()
            done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=180, cwd=ROOT)
            whole = 1e3 * (time.perf_counter() - began)
            if done.returncode != 0:
                raise RuntimeError(f"the process failed: {done.stderr.strip()[-400:]}")
            found = json.loads(done.stdout.strip().split("\n")[-1])
            row = Row(FAMILY, case, OURS, mode, target_us=None if aim is None else 1e3 * aim)
            row.note = (
                ", ".join(f"{step} {ms:.1f} ms" for step, ms in found.items()) + f"; whole process {whole:.0f} ms"
            )
            if dry:
                row.status = "dry"
            else:
                row.set_time(stats([1e3 * sum(found[step] for step in counted)]), None)
            rows.append(row)
    return rows


def _path() -> str:
    """The search path with the checkout first, for a script that lies in a folder of it."""
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
