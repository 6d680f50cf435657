"""Paged attention as other GPUs run it: on few multiprocessors, without the copy engine. The same bits."""

from __future__ import annotations

import numpy as np
import pytest
from simt.devices import on_cpu
from test_attention import Case, build, call

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
