"""The check of the demo: each request's tokens again, through a model with the adapter merged into its weights.

How far rounding alone moves a logit is measured, not guessed: the merged model runs once more with its activations and
its adapter rounded to the dtype, without any LoRA kernel. A request may differ by ``NOISE_FACTOR`` times what that run
differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ._arrays import FLOAT32
from ._llama import GROUPS, Batch, Llama, Ops, XpArray, forward, to_float32
from ._server import Request, host
from .peft import PeftAdapter, load_peft

# Both runs round at nearly the same places, so their largest errors are draws from about the same distribution: over
# 480 random prompts to the bundled adapters in both dtypes their ratio had a median of 1.05 and lay within 0.7 to 1.9.
# What an adapter does to the logits is at least 12 times the tolerance in bfloat16, 98 times in float16.
NOISE_FACTOR = 3.0


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
