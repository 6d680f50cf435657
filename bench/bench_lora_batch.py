"""The schedule of a batch: ``LoraBatch.update`` with indices on the device, once a step."""

from __future__ import annotations

import dataclasses
import functools

from . import bench_lora, targets
from .bench_lora import Layer, build_batch, build_set, check_layer, device_of, layer_calls, num_slots, slots_of
from .harness import Rig
from .model import Case, Work

FAMILY = "lora"
NEEDS = bench_lora.NEEDS


def batch_case(layer: Layer) -> Case:
    """``nbytes`` is the indices alone: the time is a launch and a few dependent steps, not bandwidth."""
    target = next((us for most, us in targets.LORA_SCHEDULE if layer.tokens <= most), None)
    return Case(FAMILY, f"update {layer.tokens} {layer.pattern}", 4 * layer.tokens, layer, target is not None, target)


def cases() -> list[Case]:
    batches = [(1, "one"), (8, "distinct"), (64, "distinct"), (64, "uniform 8"), (64, "zipf"), (64, "none")]
    batches += [(256, "distinct"), (256, "uniform 16"), (512, "seq 512"), (2048, "seq 512"), (2048, "uniform 64")]
    batches += [(8192, "seq 512"), (8192, "uniform 64"), (8192, "half uniform 256"), (16384, "seq 512")]
    return [batch_case(Layer(tokens, (16,), pattern)) for tokens, pattern in batches]


def shrunk(case: Case) -> Case:
    return dataclasses.replace(case, params=bench_lora.shrunk_layer(case.params))


def sets_for(case: Case, rig: Rig) -> int:
    """The indices are hot in a server too: they were just written. A few sets serve."""
    return min(rig.sets_for(case.nbytes), 64)


def build(case: Case, rig: Rig, sets: int) -> Work:
    from cupy_lora import LoraBatch

    layer: Layer = case.params
    calls = []
    for _ in range(sets):
        batch = LoraBatch(layer.tokens, max_adapters=num_slots(layer), **device_of(rig))
        calls.append(functools.partial(batch.update, rig.array(slots_of(layer))))
    return Work(calls, lambda: check_batch(layer, rig))


def check_batch(layer: Layer, rig: Rig) -> float:
    """A narrow layer over the schedule: every row must get its own adapter."""
    small = dataclasses.replace(layer, in_features=64, out_features=(64,))
    data = build_set(small, rig, build_batch(layer, rig))
    return check_layer(small, rig, data, layer_calls([data])[0])
