"""Start to compile before a kernel is called for: while the caller loads weights, beside the schedule's own compile.

A cold start waits for the slowest kernel instead of for one after another: what the next :func:`~cupy_lora.add_lora`
of each layer takes is known once there are weights with adapters and a batch of some size. Only the compiler runs
here, no call of the GPU's; a guess that is wrong (a float32 y) costs time of another core.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import numpy as np

from . import _cubins, _env, _jit
from ._arrays import CPU, INT32, Array

if TYPE_CHECKING:
    from .lora_batch import LoraBatch
    from .lora_weights import LoraWeights

_weights: weakref.WeakSet[LoraWeights] = weakref.WeakSet()
_batches: weakref.WeakSet[LoraBatch] = weakref.WeakSet()


def new_weights(weights: LoraWeights) -> None:
    """The kernel that writes the table."""
    if weights.device == CPU or _env.DISABLE_SGMV.on:
        return
    from . import _lora_plan
    from .lora_weights import RECORD

    facts = _jit.device_facts(weights.device)
    launch = _lora_plan.set_slot(weights.table_view, 0, np.zeros(weights.num_slices, RECORD), facts)
    _cubins.start([launch.kernel], facts.arch)
    _weights.add(weights)


def new_batch(batch: LoraBatch) -> None:
    """The kernel that builds the tiles, for indices of the common dtype."""
    if batch.device == CPU or _env.DISABLE_SGMV.on:
        return
    from . import _lora_plan

    slots = Array(0, (batch.max_tokens,), (1,), INT32, batch.device, None)
    _cubins.start([_lora_plan.build_tiles(slots, batch).kernel], _jit.device_arch(batch.device))
    _batches.add(batch)


def new_size(batch: LoraBatch, tokens: int) -> None:
    """The layers' kernels for a batch that has this many rows from now on."""
    if batch.device != CPU:
        _start([weights for weights in _weights if weights.rank_set], [(batch, tokens)])


def new_ranks(weights: LoraWeights) -> None:
    """The layer's kernels for the ranks that are loaded now."""
    if weights.device != CPU and weights.rank_set:
        _start([weights], [(batch, batch.num_tokens) for batch in _batches])


def _start(layers: list[LoraWeights], batches: list[tuple[LoraBatch, int]]) -> None:
    from . import _lora_plan

    seen = set()
    for batch, tokens in batches:
        for weights in layers:
            kind = (batch, weights.in_features, weights.slices, weights.dtype, weights.rank_set, weights.max_adapters)
            same = weights.device == batch.device and weights.max_adapters >= batch.max_adapters
            if tokens == 0 or not same or kind in seen:
                continue
            seen.add(kind)
            x, y = (
                Array(0, (tokens, width), (width, 1), weights.dtype, weights.device, None)
                for width in (weights.in_features, weights.width)
            )
            facts = _jit.device_facts(weights.device)
            _cubins.start([_lora_plan.add_lora(y, x, weights, batch, 1.0, facts).kernel], facts.arch)
