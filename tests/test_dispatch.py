"""The rules by rank, and the choice of a config."""

from __future__ import annotations

import itertools
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from cupy_lora import _lora_plan, dispatch
from cupy_lora._arrays import BFLOAT16
from cupy_lora.lora_batch import tile_capacity, tile_heights


def test_constants() -> None:
    assert dispatch.MIN_SGMV_RANK == 8
    assert dispatch.MIN_RANK_CUSTOM == 16
    assert dispatch.MAX_RANK_CUSTOM == 128
    assert dispatch.SGMV_BLOCK_SIZE == 16
    assert dispatch.BGMV_MAX_RANK == 128


@pytest.mark.parametrize(("value", "has"), [("1", False), ("true", False), ("0", True), ("", True), ("off", True)])
def test_has_sgmv(monkeypatch: pytest.MonkeyPatch, value: str, has: bool) -> None:
    monkeypatch.setenv("DISABLE_SGMV", value)
    assert dispatch.has_sgmv() is has


def test_has_sgmv_without_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISABLE_SGMV", raising=False)
    assert dispatch.has_sgmv() is True


@pytest.mark.parametrize(
    ("rank", "least", "padded"),
    [(1, 8, 8), (8, 8, 8), (9, 8, 16), (16, 8, 16), (17, 8, 32), (33, 8, 48), (64, 8, 64), (16, 32, 32), (40, 32, 48)],
)
def test_pad_to_min_rank(rank: int, least: int, padded: int) -> None:
    t = np.arange(rank * 3, dtype=np.float32).reshape(3, rank) + 1
    for dim in (1, -1):
        got = dispatch.pad_to_min_rank(t, dim, least)
        assert got.shape == (3, padded)
        assert got.dtype == t.dtype
        assert np.array_equal(got[:, :rank], t)
        assert not got[:, rank:].any()
        assert (got is t) == (padded == rank)
    assert dispatch.pad_to_min_rank(t.T, 0, least).shape == (padded, 3)


def test_pad_rank_counts_the_world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISABLE_SGMV", raising=False)
    t = np.ones((4, 2))
    assert dispatch.pad_rank(t, 0, 1).shape == (8, 2)
    assert dispatch.pad_rank(t, 0, 4).shape == (32, 2)
    assert dispatch.pad_rank(t, 1, 2).shape == (4, 16)
    monkeypatch.setenv("DISABLE_SGMV", "1")
    assert dispatch.pad_rank(t, 0, 4) is t


def test_pad_torch() -> None:
    torch = pytest.importorskip("torch")
    got = dispatch.pad_to_min_rank(torch.ones(2, 3, 5), 1, 8)
    assert got.shape == (2, 8, 5)
    assert got[:, :3].eq(1).all()
    assert got[:, 3:].eq(0).all()


def test_pad_jax() -> None:
    jax = pytest.importorskip("jax")
    got = dispatch.pad_to_min_rank(jax.numpy.ones((3, 5)), 0, 8)
    assert got.shape == (8, 5)
    assert float(got.sum()) == 15


@pytest.mark.gpu
def test_pad_cupy() -> None:
    import cupy

    got = dispatch.pad_to_min_rank(cupy.ones((3, 5)), 0, 8)
    assert got.shape == (8, 5)
    assert float(got.sum()) == 15


def test_pad_bad_input() -> None:
    t = np.ones((2, 3))
    with pytest.raises(ValueError, match=r"dim: expected an integer in -2 .. 1, got 2"):
        dispatch.pad_to_min_rank(t, 2, 8)
    with pytest.raises(TypeError, match=r"dim: expected an integer, got float"):
        dispatch.pad_to_min_rank(t, 1.0, 8)
    with pytest.raises(ValueError, match=r"world_size: expected an integer of at least 1, got 0"):
        dispatch.pad_rank(t, 0, 0)


@pytest.mark.parametrize(
    ("rank", "cutlass"), [(1, True), (8, True), (15, True), (16, False), (128, False), (256, False)]
)
def test_use_cutlass_shrink(rank: int, cutlass: bool) -> None:
    assert dispatch.use_cutlass_shrink(rank) is cutlass


@pytest.mark.parametrize(
    ("rank", "turned"), [(8, False), (15, False), (16, True), (64, True), (128, True), (129, False)]
)
def test_orient_for_rank(rank: int, turned: bool) -> None:
    t = np.arange(24).reshape(2, 3, 4)
    got = dispatch.orient_for_rank(t, rank)
    assert np.shares_memory(got, t)
    assert np.array_equal(got, t.transpose(1, 0, 2) if turned else t)


def test_no_gpu_package_is_imported() -> None:
    code = (
        "import sys, numpy, cupy_lora.dispatch as d; d.pad_rank(numpy.ones((2, 2)), 0, 1); "
        "assert not {'cupy', 'torch', 'jax'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


GPUS = [(80, 108), (80, 16), (86, 84), (89, 142), (90, 132), (90, 16), (100, 148), (120, 128)]


@pytest.mark.parametrize(("arch", "sm_count"), GPUS)
@pytest.mark.parametrize("widths", [(4096,), (4096, 1024, 1024), (14336, 14336), (7,)])
@pytest.mark.parametrize("in_features", [1, 2048, 4096, 14336, 28672])
def test_every_choice_can_be_launched(arch: int, sm_count: int, widths: tuple[int, ...], in_features: int) -> None:
    """Any rank and batch: clusters only where there are any, leaves dealt evenly, shared memory that fits."""
    limit = {80: 163, 86: 99, 89: 99, 120: 99}.get(arch, 227) * 1024
    for rank, tokens, adapters, aligned, mixed in itertools.product(
        (1, 8, 13, 16, 24, 32, 48, 64, 96, 100, 512),
        (1, 8, 64, 256, 512, 8192),
        (1, 16, 4096),
        (True, False),
        (True, False),
    ):
        tiles = {height: tile_capacity(tokens, adapters, height) for height in tile_heights(tokens)}
        ranks = frozenset({r for r in (rank, 24, 16, 8) if r <= rank} if mixed else {rank})
        config = dispatch.choose_lora(
            rank,
            tokens,
            in_features,
            widths,
            arch=arch,
            sm_count=sm_count,
            tiles=tiles,
            aligned=aligned,
            ranks=ranks,
        )
        assert config.rows in tiles
        assert config.form == ("direct" if config.rows == 8 else "ring")
        assert aligned or config.form == "direct"
        assert config.cluster == 1 or arch >= 90
        assert 64 % (config.cluster * config.warps) == 0
        coded = _lora_plan.coded_ranks(ranks, config, in_features, widths)
        kernel = _lora_plan._layer_kernel(config, BFLOAT16, BFLOAT16, in_features, widths, coded, aligned, aligned)
        assert kernel.shared <= limit, (config, rank)


def test_choices_follow_the_batch() -> None:
    """Few tiles are shared by many blocks, many by few; full tiles are staged; float32 outputs are not."""
    few = dispatch.choose_lora(16, 1, 4096, [4096])
    many = dispatch.choose_lora(16, 256, 4096, [4096])
    full = dispatch.choose_lora(16, 8192, 4096, [4096], tiles={8: 1024, 16: 512, 32: 256, 64: 128})
    wide = dispatch.choose_lora(16, 8192, 4096, [4096], tiles={8: 1024, 16: 512, 32: 256, 64: 128}, dtype=np.float32)
    assert few.cluster > many.cluster
    assert (few.form, many.form, full.form, wide.form) == ("direct", "direct", "ring", "direct")
    assert dispatch.choose_lora(16, 1, 4096, [4096], arch=80).cluster == 1


PREFILL = 512  # tokens of a sequence, an adapter each


@pytest.mark.parametrize(
    ("tokens", "adapters", "rank", "in_features", "out", "chosen"),
    [  # of the fastest configs that were timed on 9.0 with 132 multiprocessors, or within 10 % of them
        (1, 1, 16, 4096, 4096, ("direct", 8, 8, 4, 2)),
        (8, 8, 16, 4096, 4096, ("direct", 8, 8, 4, 2)),
        (64, 64, 8, 4096, 4096, ("direct", 8, 2, 16, 1)),
        (64, 64, 16, 4096, 4096, ("direct", 8, 2, 16, 1)),
        (64, 8, 64, 4096, 4096, ("direct", 8, 8, 8, 1)),
        (64, 64, 64, 4096, 4096, ("ring", 16, 2, 8, 8)),
        (256, 256, 64, 4096, 4096, ("ring", 16, 1, 8, 8)),
        (256, 16, 16, 4096, 4096, ("direct", 8, 8, 4, 2)),
        (512, PREFILL, 16, 4096, 4096, ("direct", 8, 2, 16, 1)),
        (2048, PREFILL, 16, 4096, 4096, ("ring", 16, 1, 8, 8)),
        (2048, PREFILL, 64, 4096, 4096, ("ring", 32, 2, 8, 7)),
        (8192, PREFILL, 64, 4096, 4096, ("ring", 64, 1, 8, 8)),
        (17, 17, 4, 3840, 14464, ("direct", 8, 8, 4, 2)),
        (31, 4, 24, 1408, 6656, ("direct", 8, 8, 4, 2)),
        (32, 32, 48, 1280, 4864, ("direct", 8, 2, 8, 2)),
        (39, 32, 8, 14080, 9216, ("direct", 8, 2, 16, 1)),
        (103, 16, 96, 2688, 8576, ("direct", 8, 4, 8, 2)),
        (131, 11, 16, 14592, 4096, ("direct", 8, 8, 4, 2)),
        (135, 16, 96, 2176, 9600, ("direct", 8, 4, 8, 2)),
        (243, 32, 8, 2048, 10496, ("direct", 8, 8, 4, 2)),
        (294, 32, 24, 13184, 6528, ("direct", 8, 2, 16, 1)),
        (306, 306, 4, 11008, 7936, ("direct", 8, 8, 4, 2)),
        (1478, PREFILL, 96, 15232, 1792, ("direct", 8, 2, 16, 1)),
        (1781, PREFILL, 24, 4352, 8704, ("ring", 32, 2, 8, 8)),
        (3128, PREFILL, 48, 13568, 1536, ("ring", 32, 1, 8, 6)),
        (4202, PREFILL, 48, 6528, 768, ("ring", 32, 1, 8, 8)),
        (5625, PREFILL, 12, 11904, 4992, ("ring", 32, 2, 8, 6)),
        (5998, PREFILL, 64, 6144, 6784, ("ring", 32, 2, 8, 7)),
        (3964, PREFILL, 96, 13696, 3584, ("direct", 8, 2, 16, 1)),
    ],
)
def test_choices_that_were_timed(
    tokens: int, adapters: int, rank: int, in_features: int, out: int, chosen: tuple[Any, ...]
) -> None:
    adapters = -(-tokens // PREFILL) if adapters == PREFILL else adapters
    tiles = {height: tile_capacity(tokens, adapters, height) for height in tile_heights(tokens)}
    assert dispatch.choose_lora(rank, tokens, in_features, [out], tiles=tiles) == dispatch.LoraConfig(*chosen)


def test_rings_take_lower_tiles_where_long_rows_leave_no_room() -> None:
    """64 rows of rank 64 would have two slots: 32 rows have five, and are still staged."""
    tiles = {height: tile_capacity(8192, 16, height) for height in tile_heights(8192)}
    short, long = (dispatch.choose_lora(64, 8192, width, [4096], tiles=tiles) for width in (4096, 14336))
    assert (short.form, short.rows) == ("ring", 64)
    assert (long.form, long.rows) == ("ring", 32)
    assert long.stages >= 3


def test_explain_says_what_is_chosen() -> None:
    text = dispatch.explain(16, 64, 4096, (4096, 1024, 1024), tiles={8: 9, 16: 8})
    assert "rank 16, 64 tokens, 4096 -> 4096 + 1024 + 1024: the direct form" in text
    assert "9 tiles (at most) of up to 8 rows by 3 slices: 27 on 132 SMs" in text
    assert "no clusters" in dispatch.explain(16, 1, 64, (64,), arch=86)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [((0, 1, 64, [64]), ValueError), ((8, 1, 64, []), ValueError), ((8, 1.5, 64, [64]), TypeError)],
)
def test_choice_of_bad_sizes(arguments: tuple[Any, ...], error: type[Exception]) -> None:
    with pytest.raises(error, match="expected"):
        dispatch.choose_lora(*arguments)
