"""Swapping an adapter: ``LoraWeights.load`` of matrices that are on the device, by reference (``copy=False``)."""

from __future__ import annotations

import dataclasses
import functools

from . import bench_lora
from .bench_lora import Layer, build_batch, build_set, check_layer, layer_calls, scale_of
from .harness import Rig
from .model import Case, Work

FAMILY = "lora"
NEEDS = bench_lora.NEEDS


def cases() -> list[Case]:
    layers = {
        "swap": Layer(8, (16,), "one"),
        "swap QKV": Layer(8, (16,), "one", 4096, (4096, 1024, 1024)),
    }
    return [Case(FAMILY, name, 32 * len(layer.out_features), layer) for name, layer in layers.items()]


def shrunk(case: Case) -> Case:
    return dataclasses.replace(case, params=bench_lora.shrunk_layer(case.params))


def sets_for(case: Case, rig: Rig) -> int:
    """Two adapters that take turns in one slot."""
    del case, rig
    return 2


def build(case: Case, rig: Rig, sets: int) -> Work:
    layer: Layer = case.params
    adapters = [build_set(layer, rig, build_batch(layer, rig)) for _ in range(sets)]
    home = adapters[0]
    calls = []
    for other in adapters:
        a, b = other.a[0], other.b[0]
        pair = (a, b) if len(layer.out_features) > 1 else (a[0], b[0])
        calls.append(functools.partial(home.weights.load, 0, *pair, scale=scale_of(0), copy=False))

    def check() -> float:
        calls[-1]()
        swapped = dataclasses.replace(home, a=adapters[-1].a, b=adapters[-1].b)
        return check_layer(layer, rig, swapped, layer_calls([swapped])[0])

    return Work(calls, check)
