"""How the benchmark times: graphs that visit every set, random data, kernels of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench.harness import BFLOAT16, CALLS_PER_GRAPH, DryRig, graph_plan, random_host

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("sets", "expected_us"), [(2, 60.0), (1, 2.0), (18, 7.0), (1100, 2.5), (20_000, 2.0), (3, 900.0)]
)
def test_a_graph_plan_visits_every_set_in_turn(sets, expected_us):
    graphs, length = graph_plan(sets, expected_us)
    visited = [(g * length + i) % sets for g in range(graphs) for i in range(length)]
    assert set(visited) == set(range(sets))
    assert length >= min(CALLS_PER_GRAPH[0], sets)
    if graphs == 1:
        assert length % sets == 0  # replays go on where the last one ended
    # The next use of a set is nearly a whole rotation away.
    last = {}
    for at, which in enumerate(visited):
        assert at - last.get(which, -sets) >= sets
        last[which] = at


def test_random_data_is_spread_and_repeats():
    values = random_host(10_000, np.dtype(np.float32), 5, 2.0)
    assert -2.0 <= values.min() < -1.9
    assert 1.9 < values.max() < 2.0
    assert abs(values.mean()) < 0.05
    assert len(np.unique(values)) > 9_900
    assert np.array_equal(values, random_host(10_000, np.dtype(np.float32), 5, 2.0))
    assert not np.array_equal(values, random_host(10_000, np.dtype(np.float32), 6, 2.0))
    rig = DryRig()
    first, second = rig.random((4, 4)), rig.random((4, 4))
    assert first.dtype == BFLOAT16
    assert not np.array_equal(first, second)
    rig.reseed()
    assert np.array_equal(first, rig.random((4, 4)))


def test_the_benchmarks_own_kernels_compile():
    nvrtc = pytest.importorskip("cupy_backends.cuda.libs.nvrtc")
    source = (ROOT / "bench" / "kernels.cu").read_text()
    for unroll in (1, 4, 8):
        program = nvrtc.createProgram(source, "kernels.cu", [], [])
        nvrtc.compileProgram(program, ("--std=c++17", f"-DUNROLL={unroll}", "-arch=sm_80"))
        text = nvrtc.getPTX(program)
        nvrtc.destroyProgram(program)
        for name in ("fill_float32", "fill_bfloat16", "read_once", "copy_once", "empty"):
            assert f".entry {name}(" in (text.decode() if isinstance(text, bytes) else text)
