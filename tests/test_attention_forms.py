"""Paged attention as other GPUs run it: on few multiprocessors, without the copy engine. The same bits."""

from __future__ import annotations

import numpy as np
import pytest
from simt.devices import on_cpu
from test_attention import Case, build, call, check, workspace

from cupy_lora import _attention_plan

pytestmark = pytest.mark.simt


@pytest.mark.parametrize("rope", ["llama", None], ids=["llama", "plain"])
@pytest.mark.parametrize("queries", [None, (1, 17, 0, 40)], ids=["decode", "prefill"])
def test_few_blocks_take_turns(queries: tuple[int, ...] | None, rope: str | None) -> None:
    case = Case((300, 17, 0, 90), queries, heads=2, group=4, rope=rope)
    outs = []
    for sms in (132, 1):
        with on_cpu(sms=sms) as engine:
            outs.append(np.array(call(build(engine, case))).view(np.uint16))
    np.testing.assert_array_equal(outs[1], outs[0])


@pytest.mark.parametrize("rope", ["llama", None], ids=["llama", "plain"])
@pytest.mark.parametrize(("group", "dim", "page"), [(4, 128, 16), (16, 64, 32), (3, 96, 8)])
def test_decode_copies_either_way(group: int, dim: int, page: int, rope: str | None) -> None:
    """By the copy engine (sm_90) and 16 bytes at a time (sm_80)."""
    case = Case((300, 17, 0, 90), None, heads=2, group=group, dim=dim, page=page, rope=rope)
    outs = []
    for arch in (80, 90):
        with on_cpu(arch=arch) as engine:
            outs.append(np.array(call(build(engine, case))).view(np.uint16))
    np.testing.assert_array_equal(outs[1], outs[0])


@pytest.mark.parametrize(("heads", "keys", "chunk"), [(4, 2048, 256), (4, 2049, 512), (1, 2560, 256)])
def test_chunks_of_a_long_sequence(heads: int, keys: int, chunk: int) -> None:
    """The cut is where attention_decode.cuh says, and changes no bit of ten chunks that are folded at the end."""
    case = Case((keys,), None, heads=heads, group=2, page=256, shared=True)
    outs = []
    with on_cpu() as engine:
        data = build(engine, case)
        for chunks in (0, 100):
            space = workspace(engine, chunks, case)
            outs.append(np.array(call(data, workspace=space)).view(np.uint16))
    np.testing.assert_array_equal(outs[1], outs[0])
    rows = space[4 * _attention_plan.COUNTERS :].view(np.float32)[: 100 * heads * case.group * 4]
    written = rows.reshape(100, -1).any(axis=1)
    assert written.sum() == -(-keys // chunk)


def test_more_sequences_than_threads() -> None:
    """Each thread of the schedule looks after a run of sequences, empty ones and split ones among them."""
    lengths = np.random.default_rng(9).integers(0, 30, 700)
    lengths[[0, 350, 699]] = 600, 0, 900
    with on_cpu() as engine:
        check(engine, Case(tuple(lengths.tolist()), None, heads=1, group=2))
