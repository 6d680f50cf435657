"""Paged attention: decode of a batch, prefill of prompts, with the rotation in the kernel and without."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import targets
from .bench_lora import worst
from .harness import BFLOAT16, Rig
from .model import Case, Work

FAMILY = "attention"
NEEDS = ("batch_decode", "batch_prefill")
UNIT = 2.0**-9  # half a unit in the last place of bfloat16, relative


@dataclass(frozen=True)
class Attention:
    """Sequences of these ``lengths``: the last ``new`` tokens of each are queries (prefill), or its last one (0)."""

    lengths: tuple[int, ...]
    new: int = 0
    rope: bool = False
    group: int = 4
    heads: int = 8  # of keys
    page: int = 16
    head_dim: int = 128
    label: str = ""

    @property
    def tokens(self) -> int:
        return len(self.lengths) * max(self.new, 1)

    @property
    def pages(self) -> tuple[int, ...]:
        """Pages of each sequence."""
        return tuple(-(-length // self.page) for length in self.lengths)

    @property
    def name(self) -> str:
        batch, longest = len(self.lengths), max(self.lengths)
        what = self.label or (f"context {longest}" if not self.new else f"{batch} x {longest}")
        parts = ["prefill", what] if self.new else ["decode", str(batch), what]
        if self.new not in (0, longest):
            parts.append(f"new {self.new}")
        parts += [
            f"{name} {value}"
            for name, value, usual in (
                ("heads", self.heads, 8), ("group", self.group, 4), ("page", self.page, 16), ("dim", self.head_dim, 128)
            )
            if value != usual
        ]  # fmt: skip
        return " ".join([*parts, *(["rope"] if self.rope else [])])


def attention_bytes(attention: Attention) -> int:
    """Keys and values of every token once, queries read and outputs written once."""
    keys = 2 * sum(attention.lengths) * attention.heads
    queries = 2 * attention.tokens * attention.heads * attention.group
    return 2 * attention.head_dim * (keys + queries)


def _case(attention: Attention) -> Case:
    figure = targets.ATTENTION.get(attention.name.removesuffix(" rope"))
    if figure is None:
        target = None
        if attention.lengths == (131072,):
            target = attention_bytes(attention) / (targets.LONG_DECODE_OF_COPY * targets.COPY_TBPS * 1e6)
        return Case(FAMILY, attention.name, attention_bytes(attention), attention, target is not None, target)
    factor = targets.ATTENTION_ROPE_FACTOR if attention.rope else 1.0
    record = () if attention.rope else figure.peers
    return Case(
        FAMILY, attention.name, attention_bytes(attention), attention, True, figure.target * factor, None, record
    )


def cases() -> list[Case]:
    shapes = [Attention((context,) * 64) for context in (1024, 8192)]
    shapes += [Attention((1024,) * 8, new=1024)]
    shapes += [dataclasses.replace(shape, rope=True) for shape in shapes]
    shapes += [Attention((131072,)), Attention((131072,), rope=True)]
    shapes += [Attention((1024,) * batch) for batch in (1, 8, 32, 128, 256)]
    skewed = (32768, *(256,) * 63)
    shapes += [Attention((4096,)), Attention((4096,) * 16), Attention(skewed, label="one of 32768, others of 256")]
    shapes += [Attention((1024,) * 64, group=group, heads=32 // group) for group in (1, 2, 8, 16)]
    shapes += [Attention((1024,) * 64, page=page) for page in (1, 64)]
    shapes += [Attention((1024,) * 64, head_dim=dim) for dim in (64, 96, 256)]
    shapes += [Attention((4096,) * 2, new=4096), Attention((512,) * 32, new=512), Attention((8192,), new=512)]
    shapes += [Attention((1024,) * 8, new=1024, head_dim=dim) for dim in (64, 96, 256)]
    shapes += [Attention((1024,) * 8, new=1024, group=1, heads=32)]
    return [_case(shape) for shape in shapes]


def shrunk(case: Case) -> Case:
    attention: Attention = case.params
    longest = max(attention.lengths)
    lengths = tuple(max(1, 40 * length // longest) for length in attention.lengths[:3])
    small = dataclasses.replace(
        attention, lengths=lengths, new=min(attention.new, min(lengths)), heads=min(attention.heads, 2), head_dim=32
    )
    return dataclasses.replace(case, params=small, nbytes=attention_bytes(small))


def sets_for(case: Case, rig: Rig) -> int:
    """Together at most a quarter of the GPU's memory, where that is not the minimum of two."""
    return rig.sets_for(case.nbytes, most=max(rig.memory_bytes // 4 // max(case.nbytes, 1), 2))


@dataclass
class AttentionSet:
    pool: Any  # (pages, layers 1, 2, heads, page, head_dim)
    q: Any
    out: Any
    order: np.ndarray  # page numbers, sequence after sequence
    tables: tuple[Any, Any, Any]  # kv_ptrs, kv_indptr, last_page_offset
    indptr: Any  # of the queries


def _build_set(attention: Attention, rig: Rig, seed: int) -> AttentionSet:
    from cupy_lora._arrays import view

    count = sum(attention.pages)
    pool = rig.random((count, 1, 2, attention.heads, attention.page, attention.head_dim), BFLOAT16)
    order = np.random.default_rng(seed).permutation(count)
    page_bytes = 4 * attention.heads * attention.page * attention.head_dim
    pointers = view("pool", pool).ptr + order.astype(np.int64) * page_bytes
    indptr = np.concatenate([[0], np.cumsum(attention.pages)]).astype(np.int32)
    last = [n - (pages - 1) * attention.page for n, pages in zip(attention.lengths, attention.pages, strict=True)]
    shape = (attention.tokens, attention.heads * attention.group, attention.head_dim)
    q, out = rig.random(shape, BFLOAT16), rig.zeros(shape, BFLOAT16)
    starts = np.arange(len(attention.lengths) + 1, dtype=np.int32) * max(attention.new, 1)
    tables = rig.array(pointers), rig.array(indptr), rig.array(np.array(last, np.int32))
    return AttentionSet(pool, q, out, order, tables, rig.array(starts))


def build(case: Case, rig: Rig, sets: int) -> Work:
    import cupy_lora

    attention: Attention = case.params
    data = [_build_set(attention, rig, seed) for seed in range(sets)]
    layout = (1, 0, attention.heads, attention.page)
    rope = "llama" if attention.rope else None
    calls: list[Callable[[], Any]] = []
    for d in data:
        if attention.new:
            calls.append(
                functools.partial(cupy_lora.batch_prefill, d.q, d.indptr, *d.tables, *layout, out=d.out, rope=rope)
            )
        else:
            calls.append(functools.partial(cupy_lora.batch_decode, d.q, *d.tables, *layout, out=d.out, rope=rope))
    return Work(calls, lambda: check_attention(attention, rig, data[0], calls[0]), data=data)


def _rotated(x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    half = x.shape[1] // 2
    angles = np.outer(positions, 1e4 ** (-np.arange(half) / half))
    pairs = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angles)
    return np.concatenate([pairs.real, pairs.imag], axis=1)


def check_attention(
    attention: Attention, rig: Rig, data: AttentionSet, call: Callable[[], Any], slack: float = 1.0
) -> float:
    """Run one call; the worst error of some rows over what rounding weights, rotations and output allows."""
    call()
    rig.sync()
    new, dim = max(attention.new, 1), attention.head_dim
    bounds = np.concatenate([[0], np.cumsum(attention.pages)])
    rng = np.random.default_rng(0)
    result = 0.0
    for _ in range(8):
        sequence, i = int(rng.integers(len(attention.lengths))), int(rng.integers(new))
        head = int(rng.integers(attention.heads * attention.group))
        length, row = attention.lengths[sequence], sequence * new + i
        seen = length - new + i + 1
        pages = rig.xp.asarray(data.order[bounds[sequence] : bounds[sequence + 1]])
        held = rig.host(data.pool.view(np.uint16)[pages, 0, :, head // attention.group]).view(BFLOAT16)
        keys, values = held.astype(np.float64).transpose(1, 0, 2, 3).reshape(2, -1, dim)[:, :seen]
        q = rig.host(data.q[row, head]).astype(np.float64)[None]
        if attention.rope:
            keys, q = _rotated(keys, np.arange(seen)), _rotated(q, np.array([seen - 1]))
        products = keys * q / math.sqrt(dim)
        scores = products.sum(axis=1)
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        want, magnitude = weights @ values, weights @ np.abs(values)
        error = 2.0**-19 + (6 * UNIT * np.sqrt((products**2).sum(axis=1).max()) if attention.rope else 0.0)
        allowed = UNIT * (np.abs(want) + magnitude) + error * (np.abs(want) + magnitude) + 2e-6
        got = rig.host(data.out[row, head]).astype(np.float64)
        result = max(result, worst(got, want, slack * allowed))
    return result
