"""RMS norm, alone and with the residual added."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import targets
from .bench_lora import sample_rows, worst
from .harness import BFLOAT16, Rig
from .model import Case, Work

FAMILY = "norm"
NEEDS = ("rms_norm", "fused_add_rms_norm")
EPSILON = 1e-6


@dataclass(frozen=True)
class Norm:
    """Rows and columns, bfloat16; ``add``: fused with the residual."""

    rows: int
    columns: int
    add: bool = False

    @property
    def name(self) -> str:
        return f"{'add ' if self.add else ''}{self.rows} x {self.columns}"


def norm_bytes(norm: Norm) -> int:
    """Each element read and written once (with the residual: both), the weight once."""
    return 2 * (norm.rows * norm.columns * (4 if norm.add else 2) + norm.columns)


def _case(norm: Norm) -> Case:
    figure = None if norm.add else targets.NORM.get((norm.rows, norm.columns))
    target = figure.target if figure else None
    return Case(FAMILY, norm.name, norm_bytes(norm), norm, bool(figure), target, None, figure.peers if figure else ())


def cases() -> list[Case]:
    norms = [Norm(*shape) for shape in targets.NORM]
    norms += [Norm(rows, 4096, add=True) for rows in (1, 64, 2048, 8192)]
    norms += [Norm(rows, columns) for columns in (2048, 3584, 5120, 8192, 14336) for rows in (64, 2048)]
    norms += [Norm(256, 4096), Norm(512, 4096), Norm(2048, 128)]
    return [_case(norm) for norm in norms]


def shrunk(case: Case) -> Case:
    norm = case.params
    small = dataclasses.replace(norm, rows=min(norm.rows, 4), columns=norm.columns // 16)
    return dataclasses.replace(case, params=small, nbytes=norm_bytes(small))


def sets_for(case: Case, rig: Rig) -> int:
    """One row is 8 KB each way: many sets, shared out over several graphs."""
    return rig.sets_for(case.nbytes, most=20_000)


@dataclass
class NormSet:
    input: Any
    weight: Any
    out: Any  # the residual, with add


def build(case: Case, rig: Rig, sets: int) -> Work:
    import cupy_lora

    norm: Norm = case.params
    shape = (norm.rows, norm.columns)
    # Slices of a few large arrays: an allocation a set would take longer than all the timing.
    inputs = rig.random((sets, *shape), BFLOAT16)
    outs = rig.random((sets, *shape), BFLOAT16)
    weights = rig.random((sets, norm.columns), BFLOAT16)
    data = [NormSet(inputs[s], weights[s], outs[s]) for s in range(sets)]
    if norm.add:
        calls = [functools.partial(cupy_lora.fused_add_rms_norm, d.input, d.out, d.weight, EPSILON) for d in data]
    else:
        calls = [functools.partial(cupy_lora.rms_norm, d.input, d.weight, EPSILON, out=d.out) for d in data]
    return Work(calls, lambda: check_norm(norm, rig, data[0], calls[0], lambda: data[0].out), data=data)


def check_norm(norm: Norm, rig: Rig, data: NormSet, call: Any, out: Any, slack: float = 1.0) -> float:
    """Run one call; the worst error over one rounding (times ``slack``). ``out()`` is where the result is after it."""
    rows = sample_rows(norm.rows)
    x = rig.host(data.input)[rows].astype(np.float64)
    weight = rig.host(data.weight).astype(np.float64)
    if norm.add:
        # The stored sum is what is normalised: it is rounded to the dtype once, as the residual is.
        x = (x + rig.host(data.out)[rows].astype(np.float64)).astype(np.float32).astype(BFLOAT16).astype(np.float64)
    call()
    rig.sync()
    got = rig.host(data.input if norm.add else out())[rows].astype(np.float64)
    want = x / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + EPSILON) * weight
    # The sum is taken before its rounding by some and after it by others: half an ulp of x more.
    roundings = slack * (2.0 if norm.add else 1.0)
    return worst(got, want, roundings * 1.01 * 2.0**-8 * np.abs(want) + 2e-6)
