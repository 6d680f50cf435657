"""The LoRA layer, y += scale * (x A^T) B^T in one launch."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import targets
from .harness import BFLOAT16, Rig
from .model import Case, Work

FAMILY = "lora"
NEEDS = ("LoraWeights", "LoraBatch", "add_lora")
WIDTHS = (2048, 3584, 5120, 8192, 11008, 14336)
RANKS = (4, 8, 16, 32, 64, 128, 256)
SEQUENCE = 512  # tokens of a prefill sequence
SKEW = 1.5  # each adapter of a skewed batch serves this many times the tokens of the next


@dataclass(frozen=True)
class Layer:
    """Shapes of one LoRA layer and of its batch.

    ``pattern``: ``distinct``, ``one``, ``none``, ``uniform N`` (N adapters, as many tokens each), ``zipf``
    (sizes grow by SKEW from one adapter to the next: 9 adapters for 64 tokens), ``seq N`` (contiguous sequences of N
    tokens, an adapter each); ``half PATTERN`` takes the adapter away from every second token, or with ``seq``, from
    every second sequence. ``ranks`` repeat over the adapters.
    """

    tokens: int
    ranks: tuple[int, ...] = (16,)
    pattern: str = "distinct"
    in_features: int = 4096
    out_features: tuple[int, ...] = (4096,)
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        rank = "r" + "+".join(map(str, self.ranks))
        sequence = self.pattern.rpartition("seq ")
        if sequence[1]:
            length = int(sequence[2])
            usual = length == min(SEQUENCE, self.tokens)
            parts = ["prefill", str(self.tokens), rank, *([] if usual else [f"seq {length}"])]
            parts += ["half"] if sequence[0] else []
        else:
            parts = ["decode", str(self.tokens), rank, self.pattern]
        if (self.in_features, self.out_features) != (4096, (4096,)):
            parts.append(f"{self.in_features}->{'+'.join(map(str, self.out_features))}")
        if self.dtype != "bfloat16":
            parts.append(self.dtype)
        return " ".join(parts)

    @property
    def out_total(self) -> int:
        return sum(self.out_features)


@functools.cache
def slots_of(layer: Layer) -> np.ndarray:
    """The adapter slot of each token, int32, -1 for none; the same in every run. Read-only."""
    tokens, pattern = layer.tokens, layer.pattern
    half, pattern = pattern.startswith("half "), pattern.removeprefix("half ")
    kind, _, count = pattern.partition(" ")
    token = np.arange(tokens)
    if kind == "seq":
        sequence = token // int(count)
        slots = np.where(sequence % 2 == 0, sequence // 2, -1) if half else sequence
    else:
        if kind == "distinct":
            slots = token
        elif kind == "one":
            slots = np.zeros(tokens, np.int64)
        elif kind == "none":
            slots = np.full(tokens, -1)
        elif kind == "uniform":
            slots = token % int(count)
        elif kind == "zipf":
            sizes = np.ceil(SKEW ** np.arange(64.0)).astype(np.int64)
            slots = np.repeat(np.arange(64), np.minimum(sizes, tokens))[:tokens]
        else:
            raise ValueError(f"pattern: expected one of those Layer names, got {layer.pattern!r}")
        if half:
            slots = np.unique(np.where(token % 2 == 0, slots, -1), return_inverse=True)[1] - 1
        slots = np.random.default_rng(tokens).permutation(slots)
    slots = slots.astype(np.int32)
    slots.setflags(write=False)
    return slots


def num_slots(layer: Layer) -> int:
    """Slots that the weights of this layer need (at least one)."""
    return int(slots_of(layer).max(initial=0)) + 1


def rank_of(layer: Layer, slot: int) -> int:
    return layer.ranks[slot % len(layer.ranks)]


def scale_of(slot: int) -> float:
    return 0.5 + (slot % 7) / 8


def layer_bytes(layer: Layer) -> int:
    """The fewest bytes: each adapter in use once, x once, y read and written once, of the rows with an adapter."""
    slots = slots_of(layer)
    used = np.unique(slots[slots >= 0])
    columns = len(layer.out_features) * layer.in_features + layer.out_total
    weights = sum(rank_of(layer, int(slot)) for slot in used) * columns
    rows = int((slots >= 0).sum()) * (layer.in_features + 2 * layer.out_total)
    return 2 * (weights + rows)


def layer_case(layer: Layer, *, quick: bool = False) -> Case:
    figure = targets.LORA.get(layer.name)
    target, over_read = (figure.target if figure else None), None
    if layer.pattern == "none":
        target = targets.LORA_NO_ADAPTER
    elif len(layer.ranks) > 1:
        over_read = targets.LORA_MIXED_OVER_READ
    record = figure.peers if figure else ()
    return Case(FAMILY, layer.name, layer_bytes(layer), layer, quick or bool(figure), target, over_read, record)


def _record_layers() -> list[Layer]:
    qkv, gate_up = (4096, 1024, 1024), (14336, 14336)
    decode = [
        Layer(1, (16,), "one"),
        Layer(8, (16,), "distinct"),
        Layer(8, (16,), "one"),
        Layer(64, (8,), "distinct"),
        *(Layer(64, (16,), pattern) for pattern in ("distinct", "uniform 8", "zipf", "one")),
        *(Layer(64, (64,), pattern) for pattern in ("distinct", "uniform 8")),
        *(Layer(256, (16,), pattern) for pattern in ("distinct", "uniform 16")),
        Layer(256, (64,), "distinct"),
        Layer(64, (16,), "distinct", 4096, qkv),
        Layer(64, (16,), "distinct", 4096, gate_up),
    ]
    prefill = [_prefill(tokens, 16) for tokens in (512, 2048, 8192)] + [_prefill(8192, 64)]
    return [*decode, *prefill, Layer(64, (8, 16, 32, 64), "distinct"), Layer(64, (16,), "none")]


def _prefill(tokens: int, *ranks: int, **rest: Any) -> Layer:
    return Layer(tokens, ranks, f"seq {min(SEQUENCE, tokens)}", **rest)


def _wide_layers() -> list[Layer]:
    layers: list[Layer] = []
    for width in WIDTHS:
        for shape in ((4096, (width,)), (width, (4096,))):
            layers += [Layer(64, (16,), pattern, *shape) for pattern in ("distinct", "uniform 8")]
            layers.append(_prefill(2048, 16, in_features=shape[0], out_features=shape[1]))
    for rank in RANKS:
        layers += [Layer(64, (rank,), pattern) for pattern in ("distinct", "uniform 8", "one")]
        layers += [_prefill(2048, rank)]
    for tokens in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512):
        layers += [Layer(tokens, (16,), pattern) for pattern in ("distinct", "one")]
        layers += [Layer(tokens, (64,), "distinct")]
        layers += [Layer(tokens, (16,), "uniform 8")] if tokens > 8 else []
    for tokens in (128, 256, 512, 1024, 2048, 4096, 8192, 16384):
        layers += [_prefill(tokens, 16), _prefill(tokens, 64)]
    for pattern in ("uniform 2", "uniform 4", "uniform 16", "uniform 32", "zipf"):
        layers += [Layer(64, (16,), pattern), Layer(64, (64,), pattern)]
    layers += [Layer(256, (16,), "zipf"), Layer(512, (16,), "zipf")]
    for ranks in ((8, 16, 32, 64), (4, 256), (16, 128)):
        layers += [Layer(64, ranks, "distinct"), Layer(64, ranks, "uniform 8"), _prefill(2048, *ranks)]
    layers += [Layer(64, (16,), "half distinct"), Layer(256, (16,), "half uniform 16"), Layer(64, (64,), "half zipf")]
    layers += [dataclasses.replace(_prefill(tokens, 16), pattern=f"half seq {SEQUENCE}") for tokens in (2048, 8192)]
    layers += [Layer(tokens, (16,), "none") for tokens in (1, 2048)]
    layers += [Layer(64, (16,), "uniform 8", 4096, shape) for shape in ((4096, 1024, 1024), (14336, 14336))]
    layers += [_prefill(2048, 16, out_features=shape) for shape in ((4096, 1024, 1024), (14336, 14336))]
    layers += [Layer(64, (16,), "distinct", dtype="float16"), _prefill(2048, 16, dtype="float16")]
    return layers


def cases() -> list[Case]:
    """Every case, the rows of record first; each once."""
    found = [layer_case(layer, quick=True) for layer in _record_layers()]
    found += [layer_case(layer) for layer in _wide_layers()]
    once: dict[str, Case] = {}
    for case in found:
        once.setdefault(case.name, case)
    return list(once.values())


def shrunk_layer(layer: Layer) -> Layer:
    """The same layer at a size that NumPy runs in milliseconds."""
    return dataclasses.replace(
        layer,
        tokens=min(layer.tokens, 12),
        pattern=layer.pattern.replace(f"seq {min(SEQUENCE, layer.tokens)}", "seq 5"),
        in_features=max(layer.in_features // 64, 1),
        out_features=tuple(max(width // 64, 1) for width in layer.out_features),
    )


def shrunk(case: Case) -> Case:
    small = shrunk_layer(case.params)
    return dataclasses.replace(case, nbytes=layer_bytes(small), params=small)


# -- building


@dataclass
class LayerSet:
    """One rotating set: buffers, the adapters as loaded, the library's two objects."""

    x: Any
    y: Any
    a: list[list[Any]]  # by slot, then slice
    b: list[list[Any]]
    weights: Any
    batch: Any


def build_batch(layer: Layer, rig: Rig) -> Any:
    """The schedule: one for all sets, as one serves all layers of a step; the peers' is shared alike."""
    from cupy_lora import LoraBatch

    batch = LoraBatch(layer.tokens, max_adapters=num_slots(layer), **device_of(rig))
    batch.update(rig.array(slots_of(layer)))
    return batch


def build_set(layer: Layer, rig: Rig, batch: Any) -> LayerSet:
    """Random data for one set, loaded into the library."""
    from cupy_lora import LoraWeights

    dtype = BFLOAT16 if layer.dtype == "bfloat16" else np.dtype(layer.dtype)
    slots = num_slots(layer)
    weights = LoraWeights(layer.in_features, _widths(layer), max_adapters=slots, dtype=layer.dtype, **device_of(rig))
    a: list[list[Any]] = []
    b: list[list[Any]] = []
    for slot in range(slots):
        rank = rank_of(layer, slot)
        a.append([rig.random((rank, layer.in_features), dtype, layer.in_features**-0.5) for _ in layer.out_features])
        b.append([rig.random((width, rank), dtype, rank**-0.5) for width in layer.out_features])
        single = len(layer.out_features) == 1
        weights.load(slot, a[-1][0] if single else a[-1], b[-1][0] if single else b[-1], scale=scale_of(slot))
    x = rig.random((layer.tokens, layer.in_features), dtype)
    y = rig.random((layer.tokens, layer.out_total), dtype)
    return LayerSet(x, y, a, b, weights, batch)


def device_of(rig: Rig) -> dict[str, str]:
    """The keyword that puts the library's objects where the rig's buffers are."""
    return {"device": "cpu"} if rig.dry else {}


def _widths(layer: Layer) -> int | tuple[int, ...]:
    return layer.out_features[0] if len(layer.out_features) == 1 else layer.out_features


def layer_calls(sets: list[LayerSet], config: Any = None) -> list[Any]:
    """One call per set; ``config`` forces a choice (a ``dispatch.LoraConfig``)."""
    from cupy_lora import add_lora

    forced = {} if config is None else {"config": config}
    return [functools.partial(add_lora, s.y, s.x, s.weights, s.batch, **forced) for s in sets]


def build(case: Case, rig: Rig, sets: int) -> Work:
    """The library's own call over ``sets`` rotating sets."""
    layer: Layer = case.params
    batch = build_batch(layer, rig)
    data = [build_set(layer, rig, batch) for _ in range(sets)]
    calls = layer_calls(data)
    return Work(calls, lambda: check_layer(layer, rig, data[0], calls[0]), data=data)


def sets_for(case: Case, rig: Rig) -> int:
    """A batch without adapters touches nothing: a few sets serve."""
    return min(rig.sets_for(case.nbytes), 1200 if case.nbytes else 64)


# -- correctness


def sample_rows(tokens: int, most: int = 24) -> np.ndarray:
    """Row numbers to check: the ends and a spread between them."""
    return np.unique(np.linspace(0, tokens - 1, min(tokens, most)).astype(np.int64))


def reference_rows(layer: Layer, data: LayerSet, y: np.ndarray, rig: Rig, rows: np.ndarray) -> tuple[Any, Any]:
    """Those rows of the result in float64, and the sum of the magnitudes that went into each element."""
    slots = slots_of(layer)
    x = rig.host(data.x)[rows].astype(np.float64)
    want = y[rows].astype(np.float64)
    magnitude = np.abs(want)
    starts = np.cumsum((0, *layer.out_features))
    for slot in np.unique(slots[rows]):
        if slot < 0:
            continue
        mine = np.flatnonzero(slots[rows] == slot)
        for s, width in enumerate(layer.out_features):
            a = rig.host(data.a[slot][s]).astype(np.float64)
            b = rig.host(data.b[slot][s]).astype(np.float64)
            part = np.ix_(mine, np.arange(starts[s], starts[s] + width))
            want[part] += scale_of(slot) * (x[mine] @ a.T) @ b.T
            magnitude[part] += scale_of(slot) * (np.abs(x[mine]) @ np.abs(a).T) @ np.abs(b).T
    return want, magnitude


def check_layer(layer: Layer, rig: Rig, data: LayerSet, call: Any) -> float:
    """Run one call; the worst error over what one rounding and float32 sums allow.

    Raises
    ------
    AssertionError
        If a row without an adapter changed.
    """
    before = rig.host(data.y)
    call()
    rig.sync()
    after = rig.host(data.y)
    idle = slots_of(layer) < 0
    if not np.array_equal(before[idle].view(np.uint16), after[idle].view(np.uint16)):
        raise AssertionError("a row without an adapter changed")
    rows = sample_rows(layer.tokens)
    want, magnitude = reference_rows(layer, data, before, rig, rows)
    half_ulp = 2.0**-8 if layer.dtype == "bfloat16" else 2.0**-11
    allowed = 1.01 * half_ulp * np.abs(want) + 2e-6 * magnitude
    return worst(after[rows], want, allowed)


def check_layer_loosely(layer: Layer, rig: Rig, data: LayerSet, call: Any) -> float:
    """The same for a peer, which may round v and the delta to 16 bits: 2 % of the delta's RMS, 10 % at worst."""
    before = rig.host(data.y)
    call()
    rig.sync()
    rows = sample_rows(layer.tokens)
    after = rig.host(data.y)[rows].astype(np.float64)
    want, _ = reference_rows(layer, data, before, rig, rows)
    delta = want - before[rows].astype(np.float64)
    size = float(np.sqrt(np.mean(delta**2)))
    error = np.abs(after - want)
    rounding = 2.0**-8 * np.abs(want)
    if size == 0:
        return float((error > 0).any()) * 2
    rms = float(np.sqrt(np.mean(np.maximum(error - rounding, 0) ** 2)))
    return max(rms / (0.02 * size), float(np.max(error - 2 * rounding)) / (0.1 * size), 0.0)


def worst(got: np.ndarray, want: np.ndarray, allowed: np.ndarray) -> float:
    """The largest error in units of what is allowed; infinite for a NaN."""
    error = np.abs(got.astype(np.float64) - want)
    if not np.isfinite(error).all():
        return float("inf")
    return float(np.max(error / np.maximum(allowed, 1e-30), initial=0.0))
