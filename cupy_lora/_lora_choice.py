"""How a LoRA launch is shaped: the measured rule behind ``dispatch.choose_lora``, and what its configs take."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Final

from ._jit import DeviceFacts

_STRAIGHT_RANK: Final = 64  # ranks to here take one exchange


@dataclass(frozen=True)
class LoraConfig:
    """How one LoRA launch is shaped. Every config gives the same bits; they differ in speed.

    Attributes
    ----------
    form : str
        ``"direct"``: fragments straight from global memory, tiles of 8 rows;
        ``"ring"``: staged through shared memory, tiles of 16 rows and more.
    rows : int
        Rows of a tile.
    cluster : int
        Blocks that share a tile; 1 before compute capability 9.0.
    warps : int
        Warps of a block.
    stages : int
        Slots of the ring; in the direct form, units of B and y that a warp has in flight.
    min_blocks : int
        Blocks that must fit a multiprocessor, by their registers.
    """

    form: str
    rows: int
    cluster: int
    warps: int
    stages: int = 2
    min_blocks: int = 1


def choose_halves(rank: int, tiles: int, facts: DeviceFacts) -> LoraConfig:
    """The config of a shrink or an expand on its own, with this many tiles of at most 8 rows."""
    return _direct(rank, tiles, facts)


def choose(
    rank: int,
    tokens: int,
    in_features: int,
    widths: tuple[int, ...],
    tiles: Mapping[int, int],
    ring: bool,
    ranks: frozenset[int],
    facts: DeviceFacts,
) -> LoraConfig:
    """``dispatch.choose_lora`` of checked arguments; ``ring``: whether the arrays allow that form."""
    slices = len(widths)
    coded = staged_rank(rank)
    if ring and coded:
        config = _choose_ring(rank, tokens, in_features, widths, tiles, ranks, facts)
        if config is not None:
            return config
    clusters = math.ceil(_tiles_of_eight(tokens, tiles[8]) * slices)
    if ring and not coded and rank < 32 and facts.arch >= 90 and clusters > 1.7 * facts.sm_count and 16 in tiles:
        # Two blocks a multiprocessor and tiles of 16 rows, worked off eight by eight: 1.2 to 1.4 times faster, though
        # long rows spill at the registers that leaves.
        few = tiles[16] * slices <= 1.2 * facts.sm_count
        config = _ring(ranks, 16, 4 if few else 2, in_features, facts)
        if config.stages >= 3:
            return replace(config, stages=min(config.stages, 5), min_blocks=2)
    full = tokens > 2 * tiles[8]
    # Clusters of eight go round after round, each as long as one tile takes alone; where most of the work is A's,
    # pairs that read in a loop take less: rank 96 of 13696 -> 3584, 3.8 tiles a multiprocessor: 356 us for 499.
    rounds = full and len(ranks) == 1 and _by_eight(rank, in_features, facts) and clusters > facts.sm_count
    if rounds and in_features > 2 * max(widths):
        return LoraConfig("direct", 8, 2, 16, 1)
    if (
        ring
        and rank > 32
        and len(ranks) == 1  # beside others, whose tiles are done sooner: 16.0 us for 14.2 (ranks 8 to 64, 64 tiles)
        and coded
        and not full
        and facts.arch >= 90
        and clusters > 0.25 * facts.sm_count
        and 16 in tiles
    ):
        # A and B stream through the ring without a gap; the direct form asks for as much as its registers hold.
        config = _ring(ranks, 16, 2 if tiles[16] * slices <= 0.5 * facts.sm_count else 1, in_features, facts)
        two_rounds = rank <= 48 and 0.5 < clusters / facts.sm_count <= 1  # 39 and 36 us, of the direct form 32 to 35
        if config.stages >= 5 and not two_rounds:
            return config
    return _direct(rank, clusters, facts, in_features, max(widths), alone=len(ranks) == 1)


def _tiles_of_eight(tokens: int, bound: int) -> float:
    """How many there are, as far as a bound for `tokens` says: an adapter has one at least, its last is half full."""
    adapters = bound - tokens // 8
    return bound if bound >= tokens else max(adapters, tokens / 8 + adapters * 7 / 16)


def _choose_ring(
    rank: int,
    tokens: int,
    in_features: int,
    widths: tuple[int, ...],
    tiles: Mapping[int, int],
    ranks: frozenset[int],
    facts: DeviceFacts,
) -> LoraConfig | None:
    """The ring, where tiles are more than half full and one or two blocks each fill the machine; else None."""
    # A tile reads A and B whole, through L2: tall enough that this stays below the bytes of its rows, by a sixth
    # (rank 24 at 1781 tokens 4352 -> 8704: 28 us by 32 rows of two blocks, 32 by 16 rows of one).
    wanted = rank * (in_features + sum(widths)) / (in_features + 2 * sum(widths))
    # 64 rows of rank 64 take every register: no room for widths that differ, for other ranks' code, for what older
    # parts need, for leaves whose chunks are no power of two (6144 columns: 146 us, by 32 rows 106), or for a rank in
    # between and more than short rows (48 of 6528: 61 for 43). Those of rank 32 take them for long rows.
    leaf = -(-in_features // 2048)
    between = leaf & (leaf - 1) != 0 or (not _power_rank(rank) and (rank > 48 or in_features > _SHORT_IN))
    crowded = len(set(widths)) > 1 or facts.arch < 90 or len(ranks) > 1 or between
    full = crowded if rank > 32 else rank > 16 and in_features > _TWO_BLOCKS_IN
    tallest = 32 if full else 64
    if in_features > _TWO_BLOCKS_IN and not _power_rank(rank) and (facts.arch < 90 or len(ranks) > 1):
        return None  # its code would spill there, as it does on 9.0: alone, at two thirds of the direct form's time
    share = {  # `tiles` are bounds: half of what they allow for sequences that do not end with a tile
        height: (tiles[height] + tokens / height) / 2 * len(widths) / facts.sm_count
        for height in sorted(tiles)
        if 16 <= height <= tallest and tokens > 0.6 * height * tiles[height]
    }
    alone = 0.52  # tiles a multiprocessor from which pairs would go in two rounds
    least = alone if facts.arch < 90 else 0.26
    heights = [height for height, of in share.items() if of >= least]
    if not heights:
        return None
    rows = next((height for height in heights if height >= 1.2 * wanted), heights[-1])
    while share[rows] > 1.1 and share.get(2 * rows, 0) >= alone and rows < wanted * (3 if share[rows] <= 1.5 else 2):
        rows *= 2  # the last wave would leave most of the machine idle, or A and B cross L2 more often than they must
    for height in reversed([height for height in heights if height <= rows]):
        # Where single blocks would go in two rounds, the second nearly empty, pairs go in three of half the length.
        pairs = share[height] < alone or (facts.arch >= 90 and 1.1 < share[height] <= 1.5)
        config = _ring(ranks, height, 2 if pairs else 1, in_features, facts)
        if config.stages >= 3:
            return config  # long rows take slots that fit lower tiles only
    return None


def staged_rank(rank: int) -> bool:
    """Whether a rank's code stages B and y in shared memory, in every kernel: ``slot_rank`` of lora_slots.cuh."""
    return rank <= _STRAIGHT_RANK and rank % (2 if rank <= 8 else 4 if rank <= 16 else 8) == 0


def staged_alone(rank: int, config: LoraConfig, in_features: int) -> bool:
    """Whether it does where it is the only one: ``kAlone`` of lora_slots.cuh."""
    most = 96 if config.cluster > 1 and in_features <= _SHORT_IN else _STRAIGHT_RANK
    if config.cluster * config.warps == 64:
        most = 128
    return staged_rank(rank) or (config.form == "direct" and _wide(rank) and rank <= most)


def _wide(rank: int) -> bool:
    return _STRAIGHT_RANK < rank <= 128 and rank % 8 == 0


def _power_rank(rank: int) -> bool:
    """Whether a rank's code is the lightest: its rows end nowhere within a fragment."""
    return rank in (8, 16, 32, 64)


def _ring(ranks: Collection[int], rows: int, cluster: int, in_features: int, facts: DeviceFacts) -> LoraConfig:
    # The smaller ranks do not all take smaller slots.
    sizes = [ring_slot_bytes(rows, rank, in_features) for rank in ranks if staged_rank(rank)] or [(1, 0)]
    slot, parts = (max(column) for column in zip(*sizes, strict=True))
    chunk = max(chunk_of(rank) for rank in ranks)
    remote = 2 * (8 * cluster + rows) * chunk * 4 if cluster > 1 else 0
    room = _shared_limit(facts) - 384 - remote - max(parts, 44 * 1024 - slot)
    return LoraConfig("ring", rows, cluster, 8, max(0, min(8, room // slot)))


def chunk_of(rank: int) -> int:
    """Ranks of one exchange: ``chunk_of`` of lora_config.cuh."""
    return 16 if rank <= 16 else min(_STRAIGHT_RANK, -(-rank // 32) * 32)


def ring_slot_bytes(rows: int, rank: int, in_features: int, warps: int = 8) -> tuple[int, int]:
    """Bytes of one slot of the ring, and of the parts beside it: RingShape of lora_ring.cuh."""
    rank_warps = 1 if rank <= 32 else 2 if rows < 64 else 4
    token_warps = min(rows // 8, warps // rank_warps)
    leaf_warps = warps // (rank_warps * token_warps)
    tiles = 2 if rank > 16 and (rows == 16 or warps > 8) else 4
    columns = 8 * tiles * (warps // (rows // 16))
    leaf_columns = 32 * -(-in_features // 2048)
    slot = max(leaf_warps * (rows + rank) * leaf_columns * 2, columns * (rank + rows) * 2)
    ranks = chunk_of(rank)  # of v
    blocks, groups = ranks // 16 // rank_warps, rows // 8 // token_warps
    places = 1 if blocks * groups * (warps // 8) < 4 else 5 if warps > 8 and in_features > 8192 else 4
    return slot, places * leaf_warps * rows * (ranks + 4) * 4


def _direct(
    rank: int,
    clusters: int,
    facts: DeviceFacts,
    in_features: int = 0,
    width: int = 0,
    *,
    alone: bool = True,
) -> LoraConfig:
    # Measured on 132 multiprocessors: clusters that do not all fit cost a second wave, so the fewer there are, the
    # more blocks share one; a light rank leaves room for several blocks a multiprocessor. Long rows of A take more
    # warps: what one loads at once is bound by its registers.
    light, coded = rank <= 16, staged_rank(rank)
    limit = _shared_limit(facts)
    share = clusters / facts.sm_count
    long = in_features > 6144
    if facts.arch < 90 or not (light or limit > 100 * 1024):
        return LoraConfig("direct", 8, 1, 8, 2 if light else 1)
    if alone and _wide(rank) and limit > 200 * 1024:
        if share <= _EIGHTS or _by_eight(rank, in_features, facts):
            few = width > 4.5 * in_features > 0 and not _by_eight(rank, in_features, facts)  # as below
            return LoraConfig("direct", 8, 8, 4, 2) if few else LoraConfig("direct", 8, 8, 8, 1)
        # Two units ahead: 15 to 17 us for 19 to 21 with one (rank 96 of 2688 and 3328, 0.17 and 0.21 tiles).
        return LoraConfig("direct", 8, 4, 8, 2) if share <= _FOURS else LoraConfig("direct", 8, 8, 4, 2)
    if not coded:
        if share <= 0.13:
            return LoraConfig("direct", 8, 8, 8, 1)
        if share <= 0.4:
            return LoraConfig("direct", 8, 8, 4, 2)
        if share <= 0.75 and rank < 32 and not long and limit > 200 * 1024:
            return LoraConfig("direct", 8, 2, 16, 2 if light else 1)
        two = light and in_features <= _TWO_BLOCKS_IN and limit > 200 * 1024
        return LoraConfig("direct", 8, 2, 8, 2 if light else 1, 2 if two else 1)
    if light:
        if share <= (0.22 if long else 0.4):
            eight = share <= _EIGHTS and (long or width > _WIDE_OUT)  # a third slower where they go in rounds
            return LoraConfig("direct", 8, 8, 8, 1) if eight else LoraConfig("direct", 8, 8, 4, 2)
        if limit <= 200 * 1024:
            return LoraConfig("direct", 8, 2, 8 if share <= 1.0 else 4, 2)
        if share <= 0.5:
            # 7.8 to 9.1 us for 8.5 to 9.9 at rank 8 of long rows; at rank 16 their registers allow fewer warps.
            return LoraConfig("direct", 8, 2, 8, 2) if long and rank > 8 else LoraConfig("direct", 8, 2, 16, 1)
        if share <= 1.0:
            # One round; pairs of so many warps would take two: 17 us for 19 (8 warps) and 25 (16) at 0.73.
            return LoraConfig("direct", 8, 1, 8, 4)
        if share <= 1.5:
            return LoraConfig("direct", 8, 2, 4, 4)
        if rank < 8:
            # Little to load for each tile, so as many warps as registers allow: 37 us for 44 to 51 (rank 4, 2.3 tiles).
            return LoraConfig("direct", 8, 8, 4, 2) if long else LoraConfig("direct", 8, 2, 16, 1)
        if not _power_rank(rank):
            return LoraConfig("direct", 8, 2, 4, 2)  # two blocks of 8 warps would spill; 86 us, of 4 unpaired 101
        return LoraConfig("direct", 8, 1, 8, 2, 2 if in_features <= _TWO_BLOCKS_IN and width <= 8192 else 1)
    if share <= _EIGHTS:
        # Few columns of A for each warp, many of B: two units ahead (rank 24 of 1408 -> 6656: 4.7 us for 5.2).
        few = width > 4.5 * in_features > 0
        return LoraConfig("direct", 8, 8, 4, 2) if few else LoraConfig("direct", 8, 8, 8, 1)
    if rank > 48 and not long and (share <= 0.25 or not alone):
        # Two units of rank 64 leave a warp few registers for A: 9.9 us for 10.7 to 11.0 at 0.18. Beside other ranks
        # small blocks of clusters of eight even out what the tiles differ by.
        return LoraConfig("direct", 8, 8, 4, 1)
    if share <= _FOURS:
        return LoraConfig("direct", 8, 4, 8, 2)
    if rank <= 32 and share <= 0.53:
        wide = in_features > _TWO_BLOCKS_IN  # in pairs of 8 warps 15 us for 17 at 10240, 26 for 24 at 13056
        return LoraConfig("direct", 8, 2, 16, 1) if wide else LoraConfig("direct", 8, 2, 8, 2)
    if rank <= 32:
        return LoraConfig("direct", 8, 2, 4, 2)
    # Two units ahead: 8 to 20 % faster at rank 48, 7 % slower at 64, where one already fills the registers.
    return LoraConfig("direct", 8, 2, 8, 2 if rank <= 48 else 1)


def _by_eight(rank: int, in_features: int, facts: DeviceFacts) -> bool:
    """Whether a wide rank's staged code needs clusters of eight: the registers of fewer warps would spill."""
    fewer = rank <= 96 and in_features <= _SHORT_IN and facts.arch < 100
    return _wide(rank) and not fewer and _shared_limit(facts) > 200 * 1024


_EIGHTS: Final = 0.115  # tiles a multiprocessor to which clusters of eight, a block each, go in one round: 15 of 132
_FOURS: Final = 0.23  # and clusters of four: 30 of 132
_WIDE_OUT: Final = 7168  # columns of y from which more warps load B: rank 16 of 1152 -> 11392 4.4 us for 5.0
_SHORT_IN: Final = 4096  # columns of x to which ranks to 96 are staged by few warps too
_TWO_BLOCKS_IN: Final = 12288  # a step of a longer leaf takes more registers than half a multiprocessor has


def _shared_limit(facts: DeviceFacts) -> int:
    """Bytes of shared memory that a block may have."""
    return {80: 163, 86: 99, 89: 99, 120: 99}.get(facts.arch, 227) * 1024
