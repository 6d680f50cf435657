"""Shrink and expand alone, by segment of rows (prefill)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from . import bench_bgmv
from .bench_bgmv import Half, build_halves, make_cases
from .bench_lora import slots_of
from .harness import Rig
from .model import Case, Work

FAMILY = "sgmv"
NEEDS = ("sgmv_shrink", "sgmv_expand")
shrunk = bench_bgmv.shrunk


def cases() -> list[Case]:
    shapes = [(512, 16), (2048, 16), (8192, 16), (8192, 64)]
    return make_cases(FAMILY, [Half(op, t, r, 4096, "seq 512") for t, r in shapes for op in ("shrink", "expand")])


def segments(half: Half) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First row, number of rows and adapter of each segment, int32."""
    slots = slots_of(half.layer)
    starts = np.flatnonzero(np.diff(slots, prepend=-2))
    lengths = np.diff(starts, append=half.tokens)
    return starts.astype(np.int32), lengths.astype(np.int32), slots[starts]


def build(case: Case, rig: Rig, sets: int) -> Work:
    import cupy_lora

    shrink = case.params.op == "shrink"
    starts, lengths, owners = segments(case.params)
    arrays = [rig.array(values) for values in (starts, lengths, owners)]
    longest = int(lengths.max())

    def call_of(half: Half, rig: Rig, inputs: Any, weights: Any, output: Any) -> Callable[[], Any]:
        del half, rig
        args = (inputs, weights, output, *arrays, len(starts), longest)
        if shrink:
            return functools.partial(cupy_lora.sgmv_shrink, *args, 1.0)
        return functools.partial(cupy_lora.sgmv_expand, *args, add_inputs=True)

    return build_halves(case.params, rig, sets, call_of)
