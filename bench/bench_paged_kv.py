"""Writing new keys and values into the pages: one token a sequence, and chunks of a prompt."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import targets
from .harness import BFLOAT16, Rig
from .model import Case, Work

FAMILY = "kv"
NEEDS = ("append_kv", "init_kv")


@dataclass(frozen=True)
class Append:
    """``chunk`` new tokens for each of ``batch`` sequences, the last of ``context`` tokens."""

    batch: int
    chunk: int
    context: int
    heads: int = 8
    page: int = 16
    head_dim: int = 128

    @property
    def tokens(self) -> int:
        return self.batch * self.chunk

    @property
    def name(self) -> str:
        how = "append" if self.chunk == 1 else f"init chunk {self.chunk}"
        return f"{how} {self.tokens} context {self.context}"

    @property
    def pages(self) -> int:
        """Pages of one sequence."""
        return -(-self.context // self.page)


def append_bytes(append: Append) -> int:
    """K and V of the new tokens, read and written once."""
    return 2 * 2 * 2 * append.tokens * append.heads * append.head_dim


def _case(append: Append) -> Case:
    figure = targets.KV_APPEND.get(append.tokens) if (append.page, append.head_dim) == (16, 128) else None
    target, record = (figure.target, figure.peers) if figure else (None, ())
    return Case(FAMILY, append.name, append_bytes(append), append, bool(figure), target, None, record)


def cases() -> list[Case]:
    shapes = [Append(64, 1, 64), Append(8, 256, 1024), Append(1, 1, 64), Append(256, 1, 64)]
    shapes += [Append(1, 512, 512), Append(16, 512, 512)]
    return [_case(append) for append in shapes]


def shrunk(case: Case) -> Case:
    append: Append = case.params
    small = dataclasses.replace(
        append, batch=min(append.batch, 3), chunk=min(append.chunk, 9), context=21, heads=2, page=4, head_dim=64
    )
    return dataclasses.replace(case, params=small, nbytes=append_bytes(small))


@dataclass
class KvSet:
    pool: Any  # (pages, layers 1, 2, heads, page, head_dim)
    k: Any
    v: Any
    order: np.ndarray  # page numbers, sequence after sequence
    arrays: tuple[Any, Any, Any]  # kv_ptrs, kv_indptr, last_page_offset


def _address(array: Any) -> int:
    from cupy_lora._arrays import view

    return view("pool", array).ptr


def build_pages(append: Append, rig: Rig, seed: int) -> KvSet:
    """A pool whose pages are handed out in random order."""
    count = append.batch * append.pages
    shape = (count, 1, 2, append.heads, append.page, append.head_dim)
    pool = rig.zeros(shape, BFLOAT16)
    order = np.random.default_rng(seed).permutation(count)
    pointers = _address(pool) + order.astype(np.int64) * (2 * int(np.prod(shape[1:])))
    indptr = np.arange(append.batch + 1, dtype=np.int32) * append.pages
    last = np.full(append.batch, append.context - (append.pages - 1) * append.page, np.int32)
    k, v = (rig.random((append.tokens, append.heads, append.head_dim), BFLOAT16) for _ in range(2))
    return KvSet(pool, k, v, order, (rig.array(pointers), rig.array(indptr), rig.array(last)))


def sets_for(case: Case, rig: Rig) -> int:
    """Each set holds the pages of the whole context; together a quarter of the GPU's memory at most."""
    append: Append = case.params
    held = 4 * append.batch * append.pages * append.page * append.heads * append.head_dim
    return rig.sets_for(case.nbytes, most=max(rig.memory_bytes // 4 // held, 2))


def build(case: Case, rig: Rig, sets: int) -> Work:
    import cupy_lora

    append: Append = case.params
    data = [build_pages(append, rig, seed) for seed in range(sets)]
    indptr = rig.array(np.arange(append.batch + 1, dtype=np.int32) * append.chunk)
    layout = (1, 0, append.heads, append.page)
    if append.chunk == 1:
        calls = [functools.partial(cupy_lora.append_kv, *d.arrays, d.k, d.v, *layout) for d in data]
    else:
        calls = [functools.partial(cupy_lora.init_kv, *d.arrays, d.k, d.v, indptr, *layout) for d in data]
    return Work(calls, lambda: check_pages(append, rig, data[0], calls[0]), data=data)


def check_pages(append: Append, rig: Rig, data: KvSet, call: Any) -> float:
    """0 where the new tokens are in their places bit for bit and nothing else was written; infinite otherwise."""
    call()
    rig.sync()
    got = rig.host(data.pool).view(np.uint16)
    want = np.zeros_like(got)
    for side, new in enumerate((data.k, data.v)):
        rows = rig.host(new).view(np.uint16).reshape(append.batch, append.chunk, append.heads, append.head_dim)
        for b in range(append.batch):
            for i in range(append.chunk):
                page, offset = divmod(append.context - append.chunk + i, append.page)
                want[data.order[b * append.pages + page], 0, side, :, offset, :] = rows[b, i]
    return 0.0 if np.array_equal(got, want) else float("inf")
