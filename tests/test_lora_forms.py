"""The LoRA kernels in every form, and with blocks that walk over many tiles, as on a small GPU: the same bits."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from simt.devices import on_cpu

import cupy_lora
from cupy_lora import _arrays, _jit
from cupy_lora.dispatch import LoraConfig

pytestmark = pytest.mark.simt

FORMS = {
    "direct": LoraConfig("direct", 8, 2, 4),
    "direct-8-blocks": LoraConfig("direct", 8, 8, 4),
    "direct-16-blocks": LoraConfig("direct", 8, 16, 4, 1),
    "direct-a-leaf-a-warp": LoraConfig("direct", 8, 8, 8, 1),
    "direct-one-block": LoraConfig("direct", 8, 1, 8),
    "direct-16-warps": LoraConfig("direct", 8, 1, 16, 1),
    "direct-one-unit-ahead": LoraConfig("direct", 8, 1, 4, 1),
    "ring": LoraConfig("ring", 16, 2, 8, 4),
    "ring-one-block": LoraConfig("ring", 16, 1, 8, 3),
    "ring-32-rows": LoraConfig("ring", 32, 2, 8, 3),
    "ring-64-rows": LoraConfig("ring", 64, 1, 8, 3),
    "ring-in-pairs": LoraConfig("ring", 32, 1, 8, 6),
    "ring-16-warps": LoraConfig("ring", 64, 1, 16, 6),
    "ring-16-warps-32-rows": LoraConfig("ring", 32, 2, 16, 3),
}


def add_lora(
    rank: int,
    form: str,
    clusters: int | None = None,
    *,
    outs: tuple[int, ...] = (256, 64),
    wide: int = 256,
    tokens: int = 90,
    padded: int | None = None,
) -> np.ndarray:
    """y after one launch; ``padded``: the rank that the adapters have by adding ranks of zeros."""
    rng = np.random.default_rng(21)
    adapters = 3
    slots = rng.integers(-1, adapters, tokens)
    a = rng.standard_normal((adapters, len(outs), rank, wide)).astype(np.float16)
    b = [rng.standard_normal((adapters, n, rank)).astype(np.float16) for n in outs]
    if padded is not None:
        a = np.pad(a, ((0, 0), (0, 0), (0, padded - rank), (0, 0)))
        b = [np.pad(m, ((0, 0), (0, 0), (0, padded - rank))) for m in b]
    x = rng.standard_normal((tokens, wide)).astype(np.float16)
    y = (100 * rng.standard_normal((tokens, sum(outs)))).astype(np.float16)
    with on_cpu(clusters=clusters) as engine:
        weights = cupy_lora.LoraWeights(wide, outs, max_adapters=adapters, dtype="float16", device="cpu")
        for slot in range(adapters):
            weights.load(
                slot, [engine.array(m) for m in a[slot]], [engine.array(m[slot]) for m in b], scale=0.5, copy=False
            )
        batch = cupy_lora.LoraBatch(1024, max_adapters=adapters, device="cpu")  # so many have lists of 32 rows
        for tiles in batch.tiles.values():  # a record that no tile wrote may hold anything
            tiles[...] = adapters
        batch.update(engine.array(slots))
        out = engine.array(y)
        cupy_lora.add_lora(out, engine.array(x), weights, batch, config=FORMS[form])
    return np.array(out)


@functools.cache
def usual(rank: int) -> np.ndarray:
    return add_lora(rank, "direct")


@pytest.mark.parametrize("clusters", [None, 1], ids=["", "loops"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [16, 64])
def test_same_bits_in_every_form(rank: int, form: str, clusters: int | None) -> None:
    np.testing.assert_array_equal(add_lora(rank, form, clusters).view(np.uint16), usual(rank).view(np.uint16))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [4, 12, 24, 48])
def test_same_bits_of_ranks_between_powers_of_two(rank: int, form: str) -> None:
    np.testing.assert_array_equal(add_lora(rank, form).view(np.uint16), usual(rank).view(np.uint16))


@pytest.mark.parametrize("form", ["direct-8-blocks", "direct-a-leaf-a-warp", "direct-one-block"])
@pytest.mark.parametrize("rank", [72, 96, 128])
def test_same_bits_of_ranks_that_take_two_exchanges(rank: int, form: str) -> None:
    np.testing.assert_array_equal(add_lora(rank, form).view(np.uint16), usual(rank).view(np.uint16))
    np.testing.assert_array_equal(usual(rank), add_lora(rank, "ring", 1))  # in a loop there
    np.testing.assert_array_equal(usual(rank), add_lora(rank, form, padded=200))


@pytest.mark.parametrize("rank", [2, 6, 40, 56])
def test_same_bits_of_ranks_that_end_in_a_group(rank: int) -> None:
    np.testing.assert_array_equal(add_lora(rank, "ring").view(np.uint16), usual(rank).view(np.uint16))


@pytest.mark.parametrize("form", ["direct", "direct-one-block", "ring"])
def test_same_bits_at_a_rank_without_code_of_its_own(form: str) -> None:
    np.testing.assert_array_equal(add_lora(100, form, 1).view(np.uint16), usual(100).view(np.uint16))


@functools.cache
def usual_of_one_width(rank: int, outs: tuple[int, ...]) -> np.ndarray:
    return add_lora(rank, "direct-8-blocks", outs=outs)


@pytest.mark.parametrize("outs", [(512,), (256, 256)], ids=["512", "256+256"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [16, 64, 100])
def test_same_bits_where_units_fill_the_width(rank: int, form: str, outs: tuple[int, ...]) -> None:
    got = add_lora(rank, form, 1, outs=outs)
    np.testing.assert_array_equal(got.view(np.uint16), usual_of_one_width(rank, outs).view(np.uint16))


@pytest.mark.parametrize(("wide", "form"), [(4104, "direct"), (6144, "direct-one-block")])
@pytest.mark.parametrize(("rank", "padded"), [(5, 16), (4, 8), (12, 16), (24, 32), (40, 64)])
def test_ranks_of_zeros_change_no_bit(rank: int, padded: int, wide: int, form: str) -> None:
    """Code for any rank, whose steps of so wide a leaf are not taken in equal shares, and for ranks between powers of
    two, against that for one.
    """
    outs = (64,)
    plain = add_lora(rank, form, wide=wide, tokens=9, outs=outs)
    np.testing.assert_array_equal(plain, add_lora(rank, form, wide=wide, tokens=9, outs=outs, padded=padded))


def test_same_bits_at_the_largest_rank() -> None:
    plain = add_lora(1000, "direct", tokens=9, outs=(64,))
    np.testing.assert_array_equal(plain, add_lora(1000, "direct", tokens=9, outs=(64,), padded=1024))


@pytest.mark.parametrize("form", ["direct", "direct-8-blocks", "ring", "ring-32-rows"])
@pytest.mark.parametrize("ranks", [(64, 16, 8), (8, 32, 64), (100, 16, 40)], ids=["64+16+8", "8+32+64", "100+16+40"])
def test_clusters_that_exchange_one_width_after_another(ranks: tuple[int, ...], form: str) -> None:
    """A block that is ahead sends the next tile's parts while another still reads this one's."""
    rng = np.random.default_rng(25)
    wide, out, tokens = 256, 128, 40
    x = rng.standard_normal((tokens, wide)).astype(np.float16)
    slots = rng.integers(0, len(ranks), tokens)
    found = []
    for clusters in (1, None):
        with on_cpu(clusters=clusters) as engine:
            weights = cupy_lora.LoraWeights(wide, out, max_adapters=len(ranks), dtype="float16", device="cpu")
            draw = np.random.default_rng(26)
            for slot, rank in enumerate(ranks):
                a, b = draw.standard_normal((rank, wide)), draw.standard_normal((out, rank))
                weights.load(slot, engine.array(a.astype(np.float16)), engine.array(b.astype(np.float16)), copy=False)
            batch = cupy_lora.LoraBatch(1024, max_adapters=len(ranks), device="cpu")  # so many have lists of 32 rows
            batch.update(engine.array(slots))
            y = engine.array(np.zeros((tokens, out), np.float16))
            cupy_lora.add_lora(y, engine.array(x), weights, batch, config=FORMS[form])
        found.append(np.array(y).view(np.uint16))
    assert found[0].any()
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("form", ["direct", "direct-16-warps", "ring", "ring-one-block"])
@pytest.mark.parametrize("later", [3, 40, 90])
def test_a_launch_replayed_with_another_batch(later: int, form: str) -> None:
    """As by a graph: the rows that its arrays lack are skipped, the others are those of the new batch."""
    rng = np.random.default_rng(24)
    wide, out, rank, adapters, tokens = 256, 128, 16, 2, 40
    a = rng.standard_normal((adapters, rank, wide)).astype(np.float16)
    b = rng.standard_normal((adapters, out, rank)).astype(np.float16)
    x = rng.standard_normal((tokens, wide)).astype(np.float16)
    slots = rng.integers(-1, adapters, later)
    slots[tokens : tokens + 1] = 0  # the first row that the arrays lack is listed
    launches: list[_jit.Launch] = []
    with on_cpu() as engine:
        weights = cupy_lora.LoraWeights(wide, out, max_adapters=adapters, dtype="float16", device="cpu")
        for slot in range(adapters):
            weights.load(slot, engine.array(a[slot]), engine.array(b[slot]), copy=False)
        batch = cupy_lora.LoraBatch(1024, max_adapters=adapters, device="cpu")
        batch.update(engine.array(np.zeros(tokens, np.int64)))
        x_array, y = engine.array(x), engine.array(np.zeros((tokens, out), np.float16))
        with _jit.host_runner(launches.append):
            cupy_lora.add_lora(y, x_array, weights, batch, config=FORMS[form])
        for tiles in batch.tiles.values():
            tiles[...] = adapters
        batch.update(engine.array(slots))
        _jit.run(launches[0], _arrays.CPU, None)
        wanted = engine.array(np.zeros((tokens, out), np.float16))
        known = np.full(tokens, -1)
        known[:later] = slots[:tokens]
        batch.update(engine.array(known))
        cupy_lora.add_lora(wanted, x_array, weights, batch, config=FORMS[form])
    assert np.abs(wanted.astype(np.float32)).max() > 0
    np.testing.assert_array_equal(y.view(np.uint16), wanted.view(np.uint16))


def add_mixed(
    config: LoraConfig, ranks: tuple[int, ...], tokens: int, clusters: int | None = None, outs: tuple[int, ...] = (128,)
) -> np.ndarray:
    """y after one launch over adapters of several ranks, a row or two each; the last slot is empty."""
    rng = np.random.default_rng(25)
    wide, adapters = 136, tokens * 3 // 4
    slots = rng.permutation(np.arange(tokens) % (adapters + 1))
    slots[tokens // 2] = -1
    x = rng.standard_normal((tokens, wide)).astype(np.float16)
    y = (100 * rng.standard_normal((tokens, sum(outs)))).astype(np.float16)
    with on_cpu(clusters=clusters) as engine:
        weights = cupy_lora.LoraWeights(wide, outs, max_adapters=adapters + 1, dtype="float16", device="cpu")
        for slot in range(adapters):
            rank = ranks[slot % len(ranks)]
            a = [engine.array(rng.standard_normal((rank, wide)).astype(np.float16)) for _ in outs]
            b = [engine.array(rng.standard_normal((out, rank)).astype(np.float16)) for out in outs]
            weights.load(slot, a, b, scale=0.5, copy=False)
        batch = cupy_lora.LoraBatch(tokens, max_adapters=adapters + 1, device="cpu")
        for tiles in batch.tiles.values():
            tiles[...] = adapters + 1
        batch.update(engine.array(slots))
        out = engine.array(y)
        cupy_lora.add_lora(out, engine.array(x), weights, batch, config=config)
    return np.array(out)


RANKS = {
    "coded": (8, 16, 32, 64),
    "some-without-code": (64, 8, 12, 200, 16, 1),
    "two": (16, 64),
    "none-with-code": (3, 7),
}


@functools.cache
def usual_mixed(ranks: tuple[int, ...], tokens: int, outs: tuple[int, ...]) -> np.ndarray:
    return add_mixed(LoraConfig("direct", 8, 1, 8), ranks, tokens, outs=outs)


@pytest.mark.parametrize("clusters", [None, 1])
@pytest.mark.parametrize("form", ["direct-8-blocks", "direct-one-unit-ahead", "ring", "ring-one-block"])
@pytest.mark.parametrize("ranks", RANKS)
def test_same_bits_of_several_ranks(ranks: str, form: str, clusters: int | None) -> None:
    """Clusters that take tiles of one rank after those of another, some by code of their own."""
    got = add_mixed(FORMS[form], RANKS[ranks], 40, clusters)
    np.testing.assert_array_equal(got.view(np.uint16), usual_mixed(RANKS[ranks], 40, (128,)).view(np.uint16))


@pytest.mark.parametrize("outs", [(128, 128), (128, 40)], ids=["one-width", "two-widths"])
def test_same_bits_of_several_ranks_over_slices(outs: tuple[int, ...]) -> None:
    got = add_mixed(FORMS["ring"], RANKS["coded"], 20, outs=outs)
    np.testing.assert_array_equal(got.view(np.uint16), usual_mixed(RANKS["coded"], 20, outs).view(np.uint16))


def bgmv(rank: int, **device: int) -> np.ndarray:
    rng = np.random.default_rng(22)
    tokens, wide, adapters = 5, 264, 3
    a = rng.standard_normal((adapters, rank, wide)).astype(np.float16)
    b = rng.standard_normal((adapters, wide, rank)).astype(np.float16)
    x, slots = rng.standard_normal((tokens, wide)).astype(np.float16), rng.integers(-1, adapters, tokens)
    with on_cpu(**device) as engine:
        v, y = engine.array(np.zeros((tokens, rank), np.float32)), engine.array(x.copy())
        cupy_lora.bgmv_shrink(engine.array(x), engine.array(a), v, engine.array(slots))
        cupy_lora.bgmv_expand(v, engine.array(b), y, engine.array(slots))
    return np.concatenate([v.ravel(), y.astype(np.float32).ravel()])


def sgmv(rank: int, **device: int) -> np.ndarray:
    rng = np.random.default_rng(23)
    lengths, wide, adapters = np.array([19, 0, 3, 11, 1], np.int64), 264, 3
    starts, slots = np.cumsum(lengths) - lengths, np.array([2, 0, 1, 2, -1])
    tokens = int(lengths.sum())
    a = rng.standard_normal((adapters, rank, wide)).astype(np.float16)
    b = rng.standard_normal((adapters, wide, rank)).astype(np.float16)
    x = rng.standard_normal((tokens, wide)).astype(np.float16)
    with on_cpu(**device) as engine:
        v, y = engine.array(np.zeros((tokens, rank), np.float32)), engine.array(x.copy())
        segments = [engine.array(part) for part in (starts, lengths, slots)]
        cupy_lora.sgmv_shrink(engine.array(x), engine.array(a), v, *segments, len(lengths), 19, 1.0)
        cupy_lora.sgmv_expand(v, engine.array(b), y, *segments, len(lengths), 19, add_inputs=True)
    return np.concatenate([v.ravel(), y.astype(np.float32).ravel()])


@pytest.mark.parametrize("rank", [16, 40])
@pytest.mark.parametrize(
    ("op", "device"),
    [(bgmv, {"arch": 80}), (sgmv, {"arch": 80}), (sgmv, {"clusters": 1}), (sgmv, {"arch": 80, "clusters": 1})],
    ids=["bgmv-arch80", "sgmv-arch80", "sgmv-loops", "sgmv-arch80-loops"],
)
def test_same_bits_on_every_kind_of_gpu(op: Any, device: dict[str, int], rank: int) -> None:
    np.testing.assert_array_equal(op(rank, **device).view(np.uint32), op(rank).view(np.uint32))
