"""The LoRA cases that every engine runs: shapes, ranks, index patterns, dtypes; and the data for them."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import engines
import ml_dtypes
import numpy as np
import tolerance
from hypothesis import strategies as st

from cupy_lora import LoraBatch, LoraWeights
from cupy_lora.lora_weights import Part
from cupy_lora.reference.lora import add_rows

DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}

PATTERNS = ("distinct", "one", "random", "none", "runs", "descending", "out_of_range", "skewed")


def index_pattern(pattern: str, tokens: int, slots: int, rng: np.random.Generator) -> np.ndarray:
    """Slot of each token; negative and too large ones mean none."""
    position = np.arange(tokens)
    if pattern == "distinct":
        return position % slots
    if pattern == "one":
        return np.full(tokens, slots - 1)
    if pattern == "random":
        return rng.integers(-1, slots, tokens)
    if pattern == "none":
        return -1 - position % 3
    if pattern == "runs":
        return np.sort(rng.integers(-1, slots, tokens))
    if pattern == "descending":
        return (tokens - 1 - position) % slots
    if pattern == "out_of_range":
        far = np.array([slots, slots + 1, 2**31 - 1, -(2**31), -7])
        return np.where(position % 2 == 0, far[position % len(far)], position % slots)
    if pattern == "skewed":
        return np.minimum(rng.zipf(1.5, tokens) - 1, slots - 1)
    raise ValueError(pattern)


def valid(indices: np.ndarray, slots: int) -> np.ndarray:
    """Which rows have an adapter."""
    return (indices >= 0) & (indices < slots)


@dataclass(frozen=True)
class Case:
    """One LoRA problem.

    Attributes
    ----------
    ranks : tuple
        Of each slot: one rank, or one per slice; 0: no adapter.
    out : str
        Dtype of the output.
    pad : (int, int)
        Columns before and after each row of x and y in memory: row strides, alignment.
    small : bool
        Whether the ``simt`` engine runs it too: few multiply-adds, and a specialisation of its own to build.
    """

    tokens: int
    in_features: int
    outs: tuple[int, ...]
    ranks: tuple[int | tuple[int, ...], ...]
    pattern: str = "random"
    dtype: str = "bfloat16"
    out: str = "bfloat16"
    pad: tuple[int, int] = (0, 0)
    scale: float = 1.0
    index: str = "int32"
    small: bool = True

    @property
    def id(self) -> str:
        outs = "_".join(map(str, self.outs))
        shown = "_".join("".join(str(rank).split()) for rank in dict.fromkeys(self.ranks))
        text = f"{self.tokens}x{self.in_features}to{outs}-r{shown}-{self.pattern}-{self.dtype}"
        text += "" if self.out == self.dtype else f"-to_{self.out}"
        text += "" if self.pad == (0, 0) else f"-pad{self.pad[0]}_{self.pad[1]}"
        text += "" if self.index == "int32" else f"-{self.index}"
        return text + ("" if self.scale == 1.0 else f"-scale{self.scale}")

    @property
    def rng(self) -> np.random.Generator:
        return np.random.default_rng(zlib.crc32(self.id.encode()))

    def rank_of(self, slot: int, part: int) -> int:
        rank = self.ranks[slot]
        return rank if isinstance(rank, int) else rank[part]


@dataclass(frozen=True)
class Data:
    """Host arrays of a case."""

    case: Case
    x: np.ndarray
    y: np.ndarray
    indices: np.ndarray
    a: list[list[np.ndarray | None]]  # [slot][slice]
    b: list[list[np.ndarray | None]]
    scales: list[float]


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, deviation: float = 1.0) -> np.ndarray:
    return (rng.standard_normal(shape) * deviation).astype(DTYPES[dtype])


def build(case: Case) -> Data:
    rng = case.rng
    x = normal(rng, (case.tokens, case.in_features), case.dtype)
    y = normal(rng, (case.tokens, sum(case.outs)), case.out)
    indices = index_pattern(case.pattern, case.tokens, len(case.ranks), rng).astype(case.index)
    a: list[list[np.ndarray | None]] = []
    b: list[list[np.ndarray | None]] = []
    for slot in range(len(case.ranks)):
        ranks = [case.rank_of(slot, part) for part in range(len(case.outs))]
        a.append([normal(rng, (r, case.in_features), case.dtype, case.in_features**-0.5) if r else None for r in ranks])
        b.append([normal(rng, (w, r), case.dtype) if r else None for w, r in zip(case.outs, ranks, strict=True)])
    scales = [float(np.float32(rng.uniform(0.25, 4))) for _ in case.ranks]
    return Data(case, x, y, indices, a, b, scales)


def absolute(data: Data) -> Data:
    """The same problem with every number made positive: its result is the sum of the terms' absolute values."""

    def parts(matrices: list[list[np.ndarray | None]]) -> list[list[np.ndarray | None]]:
        return [[None if one is None else np.abs(one) for one in row] for row in matrices]

    scales = [abs(scale) for scale in data.scales]
    case = replace(data.case, scale=abs(data.case.scale))
    return Data(case, np.abs(data.x), np.abs(data.y), data.indices, parts(data.a), parts(data.b), scales)


def load(data: Data, device: Any, array: Any = np.asarray, **options: Any) -> tuple[LoraWeights, LoraBatch]:
    """Weights with every adapter of the case, and a batch with its indices."""
    case = data.case
    outs = case.outs[0] if len(case.outs) == 1 else case.outs
    weights = LoraWeights(case.in_features, outs, max_adapters=len(case.ranks), dtype=case.dtype, device=device)
    for slot in range(len(case.ranks)):
        a = [None if one is None else array(one) for one in data.a[slot]]
        b = [None if one is None else array(one) for one in data.b[slot]]
        weights.load(slot, a, b, scale=data.scales[slot], **options)
    batch = LoraBatch(max(case.tokens, 1), max_adapters=len(case.ranks), device=device)
    batch.update(array(data.indices))
    return weights, batch


def exact_add(data: Data) -> tuple[np.ndarray, np.ndarray]:
    """The result of add_lora in float64, unrounded, and the sum of the absolute values of its terms."""
    results = []
    for one in (data, absolute(data)):
        y = one.y.astype(np.float64)
        add_rows(np, np.float64, y, one.x, Plain(one), one.indices, one.case.scale)
        results.append(y)
    return results[0], results[1]


class Plain:
    """What the reference reads of a LoraWeights, straight from the case: no table, no launch."""

    def __init__(self, data: Data) -> None:
        self.max_adapters = len(data.case.ranks)
        self.slices = data.case.outs
        self._data = data

    def slot(self, slot: int) -> tuple[Part | None, ...]:
        pairs = zip(self._data.a[slot], self._data.b[slot], strict=True)
        scale = self._data.scales[slot]
        return tuple(None if a is None else Part(a, b, len(a), scale) for a, b in pairs)


def terms(case: Case) -> int:
    """How many products and sums make up one element at most."""
    ranks = [case.rank_of(slot, part) for slot in range(len(case.ranks)) for part in range(len(case.outs))]
    return case.in_features + max(ranks, default=0) + 1


def assert_added(y: np.ndarray, data: Data) -> None:
    """Fail unless ``y`` is the result of add_lora, within rounding."""
    exact, magnitude = exact_add(data)
    tolerance.assert_close(y, exact, magnitude, terms(data.case), "y")


def framed(engine: engines.Engine, host: np.ndarray, case: Case) -> engines.Frame:
    return engines.frame(engine, host, *case.pad)


_MIXED = (8, 16, 32, 64)

# Small enough for every engine: alignments, tails, ranks, patterns, slices, dtypes, one at a time.
ADD_LORA = [
    Case(1, 256, (128,), (16, 16)),
    Case(5, 256, (128,), (16, 16, 16), "distinct"),
    Case(9, 256, (128,), (16, 16, 16), "one"),
    Case(17, 256, (128,), (16, 16, 16), "random", "float16", "float16"),
    Case(33, 256, (128,), (16,) * 5, "runs"),
    Case(12, 256, (128,), (16,) * 5, "descending", "float16", "float32"),
    Case(12, 256, (128,), (16,) * 5, "random", "bfloat16", "float32", scale=0.5),
    Case(7, 256, (128,), (16, 16, 16), "none"),
    Case(11, 256, (128,), (16, 16, 16), "out_of_range", index="int64"),
    Case(12, 256, (128,), (16, 0, 16), "distinct"),
    Case(12, 256, (128,), (16, 16, 16), "distinct", pad=(8, 8)),
    Case(12, 256, (128,), (16, 16, 16), "distinct", pad=(3, 6)),
    Case(12, 256, (128,), (16, 16, 16), "distinct", pad=(4, 0)),  # the first row is aligned, the next are not
    Case(12, 256, (128,), _MIXED, "distinct", scale=-2.0),
    Case(40, 256, (128,), _MIXED, "skewed", "float16", "float16"),
    Case(6, 257, (131,), (16, 16), "distinct"),
    Case(6, 257, (131,), (5, 9), "random", "float16", "float16"),
    Case(6, 100, (36,), (1, 2, 3, 4), "distinct"),
    Case(3, 1, (1,), (1,), "one"),
    Case(3, 7, (3,), (2, 16), "distinct"),
    Case(5, 192, (64,), (24, 40), "distinct"),
    Case(5, 128, (64,), (128,), "one"),
    Case(3, 128, (64,), (200,), "one"),
    Case(3, 64, (32,), (512,), "one"),
    Case(2, 64, (32,), (1024, 3), "distinct"),
    Case(4, 2100, (64,), (16, 8), "distinct"),
    Case(4, 4096, (64,), (16,), "one"),
    Case(9, 128, (128, 32, 32), (16, (16, 0, 16), (8, 4, 16)), "distinct"),
    Case(9, 128, (65, 33), ((16, 16), (0, 7), (3, 0)), "random", "float16", "float16"),
    Case(5, 256, (384, 384), (16, 64), "distinct"),
    Case(70, 128, (64,), (16, 16), "runs"),
    Case(70, 128, (64,), (32,), "one", "float16", "float16"),
    Case(130, 64, (48,), (64, 16, 8), "runs"),
    Case(0, 128, (64,), (16,)),
]

# The GPU and NumPy also run sizes that models have.
ADD_LORA_LARGE = [
    Case(1, 4096, (4096,), (16,) * 4, "one", small=False),
    Case(8, 4096, (4096,), (16,) * 8, "distinct", small=False),
    Case(64, 4096, (4096,), (16,) * 64, "distinct", small=False),
    Case(64, 4096, (4096,), (8, 16, 32, 64) * 16, "distinct", small=False),
    Case(96, 4096, (1024,), (8, 16, 32, 64) * 24, "distinct", "float16", "float16", small=False),
    Case(64, 4096, (1024,), (64,) * 8, "skewed", "float16", "float16", small=False),
    Case(64, 4096, (1024,), (4,) * 64, "distinct", small=False),
    Case(64, 4096, (1024,), (12,) * 64, "distinct", "float16", "float16", small=False),
    Case(64, 4096, (4096,), (24, 48) * 32, "distinct", small=False),
    Case(64, 4096, (1024,), (128,) * 64, "distinct", small=False),
    Case(40, 4096, (1024,), (96,) * 40, "distinct", "float16", "float16", small=False),
    Case(64, 9600, (512,), (120,) * 4, "random", small=False),
    Case(900, 2048, (1024,), (24,) * 2, "runs", small=False),
    Case(900, 2048, (1024,), (48,) * 2, "runs", "float16", "float16", small=False),
    Case(64, 2048, (2048, 512, 512), (16,) * 16, "distinct", small=False),
    Case(32, 2048, (5632, 5632), (16,) * 8, "random", small=False),
    Case(256, 3584, (512,), (256, 128, 8), "random", small=False),
    Case(512, 4096, (512,), (16,) * 2, "runs", small=False),
    Case(700, 1000, (333,), (16, 64, 5, 33), "runs", "float16", "float32", pad=(1, 2), small=False),
    Case(2048, 1024, (1024,), (64, 16), "runs", small=False),
    Case(16, 14336, (512,), (16,) * 4, "random", small=False),
]


@dataclass(frozen=True)
class Stacked:
    """One problem of the bgmv and sgmv calls: adapters of one rank in one array."""

    tokens: int
    wide: int  # in_features of a shrink, out_features of an expand
    rank: int
    adapters: int = 3
    pattern: str = "random"
    dtype: str = "bfloat16"
    other: str = "float32"  # dtype of the output of a shrink, of the input of an expand
    pad: tuple[int, int] = (0, 0)
    layers: bool = False  # weights (n, 1, ., .)
    index: str = "int64"
    small: bool = True

    @property
    def id(self) -> str:
        text = f"{self.tokens}x{self.wide}-r{self.rank}-{self.pattern}-{self.dtype}-{self.other}-{self.index}"
        text += "" if self.pad == (0, 0) else f"-pad{self.pad[0]}_{self.pad[1]}"
        return text + ("-4d" if self.layers else "")

    @property
    def rng(self) -> np.random.Generator:
        return np.random.default_rng(zlib.crc32(self.id.encode()))

    def weights(self, rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
        shape = (self.adapters, 1, rows, columns) if self.layers else (self.adapters, rows, columns)
        return normal(rng, shape, self.dtype, columns**-0.5)


STACKED = [
    Stacked(1, 256, 16),
    Stacked(5, 256, 16, pattern="distinct", index="int32"),
    Stacked(5, 256, 16, pattern="distinct", other="bfloat16", layers=True),
    Stacked(9, 256, 16, dtype="float16", other="float16", pattern="one"),
    Stacked(9, 256, 16, dtype="float16", other="float32", pattern="out_of_range"),
    Stacked(9, 256, 16, pattern="none"),
    Stacked(6, 256, 16, pad=(8, 8), pattern="runs"),
    Stacked(6, 256, 16, pad=(1, 2), pattern="descending"),
    Stacked(6, 256, 16, pad=(4, 0), pattern="distinct"),
    Stacked(6, 257, 16, pattern="distinct"),
    Stacked(6, 131, 5, pattern="distinct", dtype="float16"),
    Stacked(6, 1, 1, pattern="distinct"),
    Stacked(6, 100, 8, pattern="skewed", index="int32"),
    Stacked(6, 128, 64, pattern="distinct"),
    Stacked(3, 64, 129, pattern="distinct"),
    Stacked(3, 64, 512, pattern="distinct"),
    Stacked(37, 128, 32, pattern="runs"),
    Stacked(0, 128, 16),
]
STACKED_LARGE = [
    Stacked(64, 4096, 16, adapters=64, pattern="distinct", small=False),
    Stacked(256, 4096, 64, adapters=8, pattern="random", other="bfloat16", small=False),
    Stacked(300, 5000, 33, adapters=8, pattern="skewed", dtype="float16", pad=(3, 2), small=False),
]


def segments(indices: np.ndarray, dtype: str = "int64") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Starts, lengths and slots of the runs of equal slots, an empty segment after the first of them."""
    change = np.flatnonzero(np.diff(indices)) + 1
    starts = np.concatenate([[0], change]) if indices.size else np.zeros(0, np.int64)
    lengths = np.diff(np.concatenate([starts, [indices.size]]))
    slots = indices[starts]
    if starts.size:
        starts = np.insert(starts, 1, starts[0] + lengths[0])
        lengths = np.insert(lengths, 1, 0)
        slots = np.insert(slots, 1, 0)
    return starts.astype(dtype), lengths.astype(dtype), slots.astype(dtype)


def draw_stacked(data: st.DataObject) -> Stacked:
    dtype = data.draw(st.sampled_from(("float16", "bfloat16")), "dtype")
    return Stacked(
        tokens=data.draw(st.integers(0, 70), "tokens"),
        wide=data.draw(st.one_of(st.integers(1, 300), st.sampled_from((512, 1024, 2048))), "wide"),
        rank=data.draw(st.integers(1, 256), "rank"),
        adapters=data.draw(st.integers(1, 9), "adapters"),
        pattern=data.draw(st.sampled_from(PATTERNS), "pattern"),
        dtype=dtype,
        other=data.draw(st.sampled_from((dtype, "float32")), "other"),
        pad=data.draw(st.sampled_from(((0, 0), (8, 8), (1, 0), (0, 3))), "pad"),
        layers=data.draw(st.booleans(), "layers"),
        index=data.draw(st.sampled_from(("int32", "int64")), "index"),
    )


Exact = Callable[[Callable[[np.ndarray], np.ndarray], np.ndarray], object]  # run(sign, out): of sign(inputs), by NumPy


def assert_shrunk(case: Stacked, y: np.ndarray, indices: np.ndarray, run: Exact) -> None:
    """``y`` is what ``run(sign, out)`` computes; zeros where there is no adapter."""
    exact, magnitude = np.zeros(y.shape), np.zeros(y.shape)
    run(np.asarray, exact)
    run(np.abs, magnitude)
    tolerance.assert_close(y, exact, np.abs(magnitude), case.wide)
    assert not y[~valid(indices, case.adapters)].any()


def assert_expanded(
    case: Stacked, y: np.ndarray, before: np.ndarray, indices: np.ndarray, left: int, run: Exact
) -> None:
    """What ``run(sign, out)`` computes stands in the columns from ``left`` on; everything else has the bits it had."""
    bare, inside = ~valid(indices, case.adapters), slice(left, left + case.wide)
    tolerance.assert_same_bits(y[bare], before[bare], "rows without an adapter")
    tolerance.assert_same_bits(y[:, :left], before[:, :left], "columns ahead of the slice")
    tolerance.assert_same_bits(y[:, inside.stop :], before[:, inside.stop :], "columns after the slice")
    exact = before[:, inside].astype(np.float64)
    magnitude = np.abs(exact)
    run(np.asarray, exact)
    run(np.abs, magnitude)
    tolerance.assert_close(y[:, inside], exact, magnitude, case.rank + 1)
