"""Shrink and expand alone, one adapter per row, weights stacked; bench_sgmv.py has the same by segment."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .bench_lora import Layer, num_slots, sample_rows, slots_of, worst
from .harness import BFLOAT16, Rig
from .model import Case, Work

FAMILY = "bgmv"
NEEDS = ("bgmv_shrink", "bgmv_expand")


@dataclass(frozen=True)
class Half:
    """One half of a LoRA layer: ``op`` is shrink (to float32) or expand (float32 in, added to bfloat16)."""

    op: str
    tokens: int
    rank: int
    width: int
    pattern: str

    @property
    def name(self) -> str:
        return f"{self.op} {self.tokens} r{self.rank} {self.pattern}" + ("" if self.width == 4096 else f" {self.width}")

    @property
    def layer(self) -> Layer:
        return Layer(self.tokens, (self.rank,), self.pattern)


def half_bytes(half: Half) -> int:
    """The fewest bytes: each adapter in use once, the float32 side once, the bfloat16 side once (expand: twice)."""
    slots = slots_of(half.layer)
    used, rows = len(np.unique(slots[slots >= 0])), int((slots >= 0).sum())
    passes = 1 if half.op == "shrink" else 2
    return 2 * used * half.rank * half.width + rows * (4 * half.rank + 2 * passes * half.width)


def make_cases(family: str, halves: list[Half]) -> list[Case]:
    return [Case(family, half.name, half_bytes(half), half) for half in halves]


def cases() -> list[Case]:
    shapes = [(1, 16, "one"), (64, 8, "distinct"), (64, 16, "distinct"), (64, 16, "uniform 8"), (64, 64, "distinct")]
    shapes += [(256, 16, "uniform 16"), (64, 16, "half distinct")]
    return make_cases(FAMILY, [Half(op, t, r, 4096, p) for t, r, p in shapes for op in ("shrink", "expand")])


def shrunk(case: Case) -> Case:
    half: Half = case.params
    pattern = "seq 5" if half.pattern.startswith("seq") else half.pattern
    small = dataclasses.replace(half, tokens=min(half.tokens, 12), width=half.width // 64, pattern=pattern)
    return dataclasses.replace(case, params=small, nbytes=half_bytes(small))


def build_halves(
    half: Half, rig: Rig, sets: int, call_of: Callable[[Half, Rig, Any, Any, Any], Callable[[], Any]]
) -> Work:
    """Sets of buffers; ``call_of(half, rig, inputs, weights, output)`` makes the call over one."""
    slots, n = slots_of(half.layer), num_slots(half.layer)
    shrink = half.op == "shrink"
    data, calls = [], []
    for _ in range(sets):
        if shrink:
            weights = rig.random((n, half.rank, half.width), BFLOAT16, half.width**-0.5)
            inputs = rig.random((half.tokens, half.width), BFLOAT16)
            output = rig.zeros((half.tokens, half.rank), np.float32)
        else:
            weights = rig.random((n, half.width, half.rank), BFLOAT16, half.rank**-0.5)
            inputs = rig.random((half.tokens, half.rank), np.float32)
            output = rig.random((half.tokens, half.width), BFLOAT16)
        data.append((inputs, weights, output))
        calls.append(call_of(half, rig, inputs, weights, output))

    def check() -> float:
        inputs, weights, output = data[0]
        before = rig.host(output).astype(np.float64)
        calls[0]()
        rig.sync()
        rows = sample_rows(half.tokens)
        got = rig.host(output)[rows].astype(np.float64)
        x = rig.host(inputs)[rows].astype(np.float64)
        w = rig.host(weights).astype(np.float64)
        want = np.zeros_like(got) if shrink else before[rows]
        magnitude = np.abs(want)
        for i, slot in enumerate(slots[rows]):
            if slot >= 0:
                want[i] += w[slot] @ x[i]
                magnitude[i] += np.abs(w[slot]) @ np.abs(x[i])
        half_ulp = 2.0**-24 if shrink else 2.0**-8
        return worst(got, want, 1.01 * half_ulp * np.abs(want) + 2e-6 * magnitude)

    return Work(calls, check, data=data)


def build(case: Case, rig: Rig, sets: int) -> Work:
    import cupy_lora

    op = {"shrink": cupy_lora.bgmv_shrink, "expand": cupy_lora.bgmv_expand}[case.params.op]

    def call_of(half: Half, rig: Rig, inputs: Any, weights: Any, output: Any) -> Callable[[], Any]:
        return functools.partial(op, inputs, weights, output, rig.array(slots_of(half.layer)))

    return build_halves(case.params, rig, sets, call_of)
