"""Paged attention as other GPUs run it: on few multiprocessors, without copy engine or warpgroup products."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from attention_cases import Case, assert_right, build, call, check, exact, workspace
from simt.devices import on_cpu

from cupy_lora import _attention_plan
from cupy_lora._attention_plan import TileConfig

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


PREFILLS = (
    Case((150, 0, 300, 40), (101, 0, 37, 40), 2, 4, 128, 16),
    Case((90, 5, 64), (40, 9, 64), 1, 1, 64, 7, causal=False),
    Case((300,), (200,), 1, 3, 64, 16, window=60, soft_cap=5.0),
)


@pytest.mark.parametrize("case", PREFILLS, ids=["long", "not_causal", "window"])
def test_prefill_without_warpgroup_products(case: Case) -> None:
    with on_cpu(arch=80) as engine:
        check(engine, case)


@pytest.mark.parametrize("rope", ["llama", None], ids=["llama", "plain"])
def test_prefill_of_unaligned_queries_up_to_the_end_of_memory(rope: str | None) -> None:
    """Rows that are no multiple of 16 bytes apart from anything, behind the last of which is nothing."""
    with on_cpu() as engine:
        data = build(engine, Case((40, 33), (40, 33), 1, 2, 64, 16, rope=rope))
        data.q_array = engine.array(np.concatenate([data.q.ravel()[:1], data.q.ravel()]))[1:].reshape(data.q.shape)
        out, lse = call(data, return_lse=True)
        assert_right(np.array(out), np.array(lse), exact(data))


@pytest.mark.parametrize("dim", [64, 128])
def test_prefill_renews_its_angles(dim: int) -> None:
    """Over more tiles than angles are turned on from one to the next; three queries more than fit in one block."""
    with on_cpu() as engine:
        check(engine, Case((3200 if dim == 64 else 1700,), (131,), 1, 1, dim, 100, rope="llama", shared=True))


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[TileConfig], None]]:
    """Makes batch_prefill take this block of warpgroups."""

    def force(config: TileConfig) -> None:
        monkeypatch.setattr(_attention_plan, "choose_wgmma", lambda dim, rope, arch: config)
        _attention_plan.prefill_kernel.cache_clear()

    yield force
    _attention_plan.prefill_kernel.cache_clear()


def test_which_prefill_is_by_warpgroups() -> None:
    """What fits where: on compute capability 9.0 alone, for the widths whose rows are whole panels."""
    for arch in (80, 86, 89, 90, 100, 120):
        for dim in (32, 64, 96, 128, 256):
            for rope in (False, True):
                config = _attention_plan.choose_wgmma(dim, rope, arch)
                assert (config is not None) == (arch == 90 and dim in (64, 128))
                if config is not None:
                    sizes = [_attention_plan.wgmma_shared_bytes(dim, group, rope, config) for group in range(1, 200)]
                    assert max(sizes) <= _attention_plan.shared_limits(arch)[0]


def warpgroups(tile: int, stages: int, crews: int = 2, turns: bool = True) -> TileConfig:
    return TileConfig(4 * crews + 4, tile, stages, 1, 1, crews=crews, turns=turns)


OTHERS = {
    "tile 64": warpgroups(64, 4),
    "tile 96": warpgroups(96, 2),
    "three crews": warpgroups(64, 2, 3),
    "three stages, no turns": warpgroups(64, 3, turns=False),
}


@pytest.mark.parametrize("case", PREFILLS, ids=["long", "not_causal", "window"])
@pytest.mark.parametrize("config", OTHERS)
def test_other_blocks_of_warpgroups(forced: Callable[[TileConfig], None], config: str, case: Case) -> None:
    forced(OTHERS[config])
    with on_cpu() as engine:
        check(engine, case)


def test_turns_change_no_bit(forced: Callable[[TileConfig], None]) -> None:
    outs = []
    for turns in (False, True):
        forced(warpgroups(128, 2, turns=turns))
        with on_cpu(sms=1) as engine:
            outs.append(np.array(call(build(engine, PREFILLS[0]))).view(np.uint16))
    np.testing.assert_array_equal(outs[1], outs[0])


def test_warpgroups_leave_the_counters_at_zero() -> None:
    """And take no unit twice: a launch whose blocks all ask for more, behind another, in the caller's workspace."""
    case = PREFILLS[0]
    with on_cpu(sms=3) as engine:
        data = build(engine, case)
        space = engine.array(np.zeros(4 * _attention_plan.COUNTERS, np.uint8))
        for _ in range(2):
            out, lse = call(data, return_lse=True, workspace=space)
            assert_right(np.array(out), np.array(lse), exact(data))
            assert not space.any()
