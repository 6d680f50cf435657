"""From nothing to a first result: run as a script in a new process, prints milliseconds as one line of JSON.

It imports what a server's worker would and nothing of the benchmark, which would hide imports and compiles.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from typing import Any

STEPS = ("import_cupy", "context", "import_cupy_lora", "weights", "batch", "add_lora", "second_add_lora")
WIDTH, RANK, TOKENS, SLOTS = 4096, 16, 64, 8


def measure(dry: bool) -> dict[str, float]:
    """Each step in milliseconds; the steps from the context to the first ``add_lora`` lead to the first result."""
    marks = [time.perf_counter()]

    def mark() -> None:
        if not dry:
            cupy.cuda.get_current_stream().synchronize()
        marks.append(time.perf_counter())

    if dry:
        marks.append(time.perf_counter())
    else:
        import cupy

        marks.append(time.perf_counter())
        cupy.cuda.runtime.memGetInfo()  # the first call that needs a context makes it
    mark()
    import numpy as np

    from cupy_lora import LoraBatch, LoraWeights, add_lora

    mark()
    spent = time.perf_counter()
    rng = np.random.default_rng(0)
    width = WIDTH // 64 if dry else WIDTH

    def draw(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape, np.float32) / 64).astype(np.float16)

    adapters = [(draw(RANK, width), draw(width, RANK)) for _ in range(SLOTS)]
    x, y = draw(TOKENS, width), draw(TOKENS, width)
    spent = time.perf_counter() - spent  # making up the numbers is no part of it
    where = {"device": "cpu"} if dry else {}
    weights = LoraWeights(width, width, max_adapters=SLOTS, dtype="float16", **where)
    for slot, (a, b) in enumerate(adapters):
        weights.load(slot, a, b)
    mark()
    batch = LoraBatch(TOKENS, max_adapters=SLOTS, **where)
    batch.update(np.arange(TOKENS, dtype=np.int32) % SLOTS)
    mark()
    inputs, out = (x, y.copy()) if dry else (cupy.asarray(x), cupy.asarray(y))
    for _ in range(2):
        add_lora(out, inputs, weights, batch)
        got = out if dry else out.get()
        marks.append(time.perf_counter())
        if len(marks) == len(STEPS):
            first = np.array(got)
    check(first, x, y, adapters)
    took = {step: 1e3 * (b - a) for step, (a, b) in zip(STEPS, itertools.pairwise(marks), strict=True)}
    took["weights"] -= 1e3 * spent
    return took


def check(got: Any, x: Any, y: Any, adapters: Any) -> None:
    """ValueError where the first result is wrong."""
    import numpy as np

    want = np.array(y, np.float64)
    for row in range(TOKENS):
        a, b = adapters[row % SLOTS]
        want[row] += b.astype(np.float64) @ (a.astype(np.float64) @ np.asarray(x, np.float64)[row])
    if not np.allclose(np.asarray(got, np.float64), want, rtol=2**-10, atol=1e-5):
        raise ValueError("the first result is wrong")


if __name__ == "__main__":
    print(json.dumps(measure("--dry-run" in sys.argv)))
