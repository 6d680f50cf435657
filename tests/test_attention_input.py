"""batch_decode and batch_prefill: tables that are wrong, and arguments that are."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from attention_cases import (
    BF16,
    F16,
    Case,
    Exact,
    assert_right,
    build,
    call,
    check,
    exact,
)
from engines import Engine

import cupy_lora

# ---- tables that are wrong ----------------------------------------------------------------------
BROKEN = {
    "pointer 0": (lambda t: t[0].__setitem__(2, 0), "kv_ptrs: expected an address that is not 0 .* at 2"),
    "pointer off by 8": (lambda t: t[0].__setitem__(2, t[0][2] + 8), "kv_ptrs: expected an address"),
    "offset 0": (lambda t: t[2].__setitem__(1, 0), "last_page_offset: expected 1 .. 16, got 0 for sequence 1"),
    "offset too large": (lambda t: t[2].__setitem__(1, 17), "last_page_offset: expected 1 .. 16, got 17"),
    "pages out of the table": (lambda t: t[1].__setitem__(-1, 99), "kv_indptr: expected ascending entries"),
    "pages negative": (lambda t: t[1].__setitem__(0, -1), "kv_indptr: expected ascending entries"),
    "pages descending": (lambda t: t[1].__setitem__(1, t[1][2] + 1), "kv_indptr: expected ascending entries"),
}


@pytest.mark.parametrize("fault", BROKEN)
@pytest.mark.parametrize("queries", [None, (2, 6, 3)], ids=["decode", "prefill"])
def test_wrong_tables_are_survived_and_named_under_debug(
    engine: Engine, queries: tuple[int, ...] | None, fault: str, monkeypatch: pytest.MonkeyPatch
):
    data = build(engine, Case((40, 20, 35), queries, 1, 2, 64, 16))
    tables = [engine.numpy(table).copy() for table in data.tables]
    tables[0][-1] = tables[0][-2]  # what a sequence may reach by a wrong table is memory that is there
    break_it, text = BROKEN[fault]
    break_it(tables)
    case = data.case
    lengths = []
    for i in range(3):
        first, end, last = int(tables[1][i]), int(tables[1][i + 1]), int(tables[2][i])
        fits = 0 <= first < end <= len(tables[0]) and 1 <= last <= case.page
        lengths.append((end - first - 1) * case.page + last if fits else 0)
    if "pointer" in fault:  # the second page of the first sequence counts as zeros
        data.keys[0][16:32], data.values[0][16:32] = 0, 0
    whole = [i for i in range(3) if lengths[i] in (0, case.lengths[i])]
    data.case = dataclasses.replace(case, lengths=tuple(lengths[i] if i in whole else 0 for i in range(3)))
    data.tables = tuple(engine.array(table) for table in tables)
    out, lse = call(data, return_lse=True)
    want, starts = exact(data), np.concatenate([[0], np.cumsum(case.counts)])
    rows = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in whole])
    picked = Exact(want.out[rows], want.lse[rows], want.allowed[rows], want.allowed_lse[rows])
    assert_right(engine.numpy(out)[rows], engine.numpy(lse)[rows], picked)
    monkeypatch.setenv("CUPY_LORA_DEBUG", "1")
    with pytest.raises(ValueError, match=text):
        call(data)


@pytest.mark.parametrize(
    "starts", [[0, 4, 2, 2], [3, 5, 7, 11], [0, 4, 8, 40], [-5, 4, 8, 11], [11, 8, 4, 0], [0, 0, 11, 11]]
)
def test_wrong_qo_indptr_never_leaves_the_queries(engine: Engine, starts: list[int], monkeypatch: pytest.MonkeyPatch):
    data = build(engine, Case((40, 9, 35), (2, 6, 3), 1, 2, 64, 16))
    data.indptr = engine.array(np.array(starts, np.int32))
    call(data, return_lse=True)  # the guard pages around the arrays of simt notice what leaves them
    monkeypatch.setenv("CUPY_LORA_DEBUG", "1")
    with pytest.raises(ValueError, match="qo_indptr: expected"):
        call(data)


def test_debug_accepts_what_is_right(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUPY_LORA_DEBUG", "1")
    check(engine, Case((40, 0, 35), None, 1, 2, 64, 16))
    check(engine, Case((40, 0, 35), (40, 0, 3), 1, 2, 64, 16))
    data = build(engine, Case((40,), None, 1, 2, 64, 16))
    dirty = engine.array(np.ones(1 << 17, np.uint8))
    with pytest.raises(ValueError, match="workspace: expected zeros in the first 65536 bytes"):
        call(data, workspace=dirty)


# ---- arguments ----------------------------------------------------------------------------------
def good() -> dict[str, Any]:
    return {
        "q": np.ones((2, 4, 64), BF16), "kv_ptrs": np.zeros(2, np.int64), "kv_indptr": np.array([0, 0, 0], np.int32),
        "last_page_offset": np.ones(2, np.int32), "num_layers": 2, "layer_idx": 1, "num_kv_heads": 2, "page_size": 4,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"q": np.ones((2, 4, 64), np.float32)}, TypeError, "q: expected dtype float16 or bfloat16, got float32"),
        ({"q": np.ones((2, 256), BF16)}, ValueError, r"q: expected shape \(tokens, num_heads, head_dim\)"),
        ({"q": np.ones((2, 4, 72), BF16)}, ValueError, "q: expected at least one head and a head_dim that is a multip"),
        ({"q": np.ones((2, 4, 272), BF16)}, ValueError, "q: expected .* up to 256"),
        ({"q": np.ones((2, 4, 128), BF16)[:, :, ::2]}, ValueError, "q: expected contiguous rows"),
        ({"q": np.ones((3, 4, 64), BF16)}, ValueError, r"kv_indptr: expected shape \(4\), got \(3,\)"),
        ({"q": np.ones((2, 5, 64), BF16)}, ValueError, "num_kv_heads: expected a divisor of the 5 heads of q, got 2"),
        ({"kv_ptrs": np.zeros(2, np.int32)}, TypeError, "kv_ptrs: expected dtype int64, got int32"),
        ({"kv_indptr": np.zeros(3, np.int64)}, TypeError, "kv_indptr: expected dtype int32, got int64"),
        ({"last_page_offset": np.ones(3, np.int32)}, ValueError, r"last_page_offset: expected shape \(2\)"),
        ({"layer_idx": 2}, ValueError, "layer_idx: expected an integer in 0 .. 1, got 2"),
        ({"page_size": 0}, ValueError, "page_size: expected an integer of at least 1"),
        ({"page_size": 2**30}, ValueError, r"kv_ptrs: expected pages of fewer than 2\*\*31 tokens"),
        ({"rope": "neox"}, ValueError, "rope: expected 'llama' or None, got 'neox'"),
        ({"rope": True}, TypeError, "rope: expected 'llama' or None, got bool"),
        ({"rope_theta": 0.0}, ValueError, "rope_theta: expected a finite number above 0, got 0.0"),
        ({"rope_scale": "1"}, TypeError, "rope_scale: expected a real number, got str"),
        ({"sm_scale": -1.0}, ValueError, "sm_scale: expected a finite number above 0, got -1.0"),
        ({"soft_cap": math.inf}, ValueError, "soft_cap: expected a finite number above 0, got inf"),
        ({"window": 0}, ValueError, "window: expected an integer of at least 1, got 0"),
        ({"window": 2.5}, TypeError, "window: expected an integer, got float"),
        ({"out": np.ones((2, 4, 64), F16)}, TypeError, "out: expected dtype bfloat16, got float16"),
        ({"out": np.ones((2, 4, 32), BF16)}, ValueError, r"out: expected shape \(2, 4, 64\)"),
        ({"workspace": np.zeros(1 << 17, np.int8)}, TypeError, "workspace: expected dtype uint8, got int8"),
        ({"workspace": np.zeros(100, np.uint8)}, ValueError, "workspace: expected at least 65536 bytes"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], text: str):
    with pytest.raises(error, match=text):
        cupy_lora.batch_decode(**{**good(), **change})


def test_output_apart_from_input():
    arguments = good()
    with pytest.raises(ValueError, match="out: expected memory of its own, got memory that overlaps q"):
        cupy_lora.batch_decode(**arguments, out=arguments["q"])


def test_prefill_checks_its_indptr():
    with pytest.raises(TypeError, match="qo_indptr: expected dtype int32, got int64"):
        cupy_lora.batch_prefill(**good(), qo_indptr=np.zeros(3, np.int64))
    with pytest.raises(ValueError, match=r"qo_indptr: expected shape \(3\), got \(4,\)"):
        cupy_lora.batch_prefill(**good(), qo_indptr=np.zeros(4, np.int32))
