// The ring form: a tile of kTileRows (16 to 64) rows of one adapter, staged through shared memory.
//
// A cluster of kCluster blocks works on one (tile, slice), in stages that a ring of STAGES slots, more where a rank
// takes smaller ones, keeps in flight. The ring does not drain between the two halves:
//   shrink stage   kLeafWarps leaves of the tile's rows of x and of A
//   expand stage   kColumns columns of the tile's rows of y and of B
// The 8 or 16 warps share a shrink stage as (rank part, token part, leaf), an expand stage as (16 tokens, unit of
// 8 * kTiles columns). Between them each block owns a share of v: the blocks send it their parts, it sums
// them and sends the sum to all (two hops, but v crosses the cluster once instead of kCluster times).
//
// Shared memory of a slot, in 16-byte chunks, laid out so that no fragment load has bank conflicts:
//   x, A  rows of one leaf, chunk ^ 4 * (row & 1) where a row is a multiple of 128 bytes
//   B, y  RingSlot of lora_slots.cuh
// Shared memory of the block: 128 for mbarriers | 256 for the table of rows | received of the direct form | shares and
// v (clusters) | parts: float [leaf warps * passes][rows][rank + 4] and the slots, or the direct form's parts and v.
// `ring_shared_bytes` in cupy_lora/_lora_plan.py is the same sum.
//
// Preconditions: those of lora_slots.cuh.
#pragma once

#include "lora_direct.cuh"
#include "lora_rows.cuh"

// Ranks of v of the widest: whole blocks of 16, those past the rank being zeros.
constexpr CUPY_LORA_DEVICE int widest_ring_rank() { return chunk_of(widest_staged()); }

template <int kRank>
struct RingShape {
    static constexpr int kRows16 = chunk_of(kRank);
    static constexpr int kRankWarps = kRank <= 32 ? 1 : kTileRows < 64 ? 2 : 4;
    static constexpr int kBlocks = kRows16 / 16 / kRankWarps;  // of 16 ranks, per warp
    static constexpr int kTokenWarps = kTileRows / 8 * kRankWarps > kWarps ? kWarps / kRankWarps : kTileRows / 8;
    static constexpr int kGroups = kTileRows / 8 / kTokenWarps;  // of 8 tokens, per warp
    static constexpr int kLeafWarps = kWarps / (kRankWarps * kTokenWarps);
    static constexpr int kLeavesEach = kLeaves / (kCluster * kLeafWarps);
    static constexpr int kTiles =
        kRank > 16 && (kTileRows == 16 || kWarps > 8) ? 2 : 4;  // of 8 columns, per warp and stage
    static constexpr int kTokenTiles = kTileRows / 16;
    static constexpr int kColumns = 8 * kTiles * (kWarps / kTokenTiles);
    static constexpr int kLeafChunks = Leaf<kIn>::kColumns / 8;  // 16-byte chunks of a row of a leaf
    static constexpr int kShrinkBytes = kLeafWarps * (kTileRows + kRank) * kLeafChunks * 16;
    using Expand = RingSlot<kRank, kTiles, kColumns, kTileRows>;
    static constexpr int kExpandBytes = Expand::kBytes;
    static constexpr int kSlotBytes = kShrinkBytes > kExpandBytes ? kShrinkBytes : kExpandBytes;
    // A warp with many sums leaves them in shared memory now and then: each level of their tree is as many registers.
    // Where a block of 16 warps leaves few of these, the levels themselves are kept there.
    static constexpr bool kManySums = kBlocks * kGroups * (kWarps / 8) >= 4, kTreeInShared = kManySums && kWarps > 8;
    static constexpr int kPasses = kManySums && !kTreeInShared ? 4 : 1;
    static constexpr int kMost = Leaf<kIn>::kSteps > 4 ? 2 : 4;  // leaves of the inner tree, by registers
    static constexpr int kUnroll = kLeavesEach / kPasses < kMost ? kLeavesEach / kPasses : kMost;
    static constexpr int kTurns = kLeavesEach / kPasses / kUnroll;
    // Places of a leaf warp's sums: its parts of v (kPasses of them), or the levels of its tree, the first of which
    // gets its part in the end.
    static constexpr int kPlaces = !kTreeInShared ? kPasses : kMost == 2 ? 5 : 4;
    static constexpr int kPlaceFloats = kTileRows * (kRows16 + 4);
    static constexpr int kPartBytes = kLeafWarps * kPlaces * kPlaceFloats * 4;
    static_assert(!kTreeInShared || kTurns <= 1 << kPlaces, "a level has no place");
    // Stages that one wait and one barrier serve.
    static constexpr int kTogether = STAGES >= 6 && kLeavesEach / kPasses >= 2 ? 2 : 1;
    static_assert((kWarps == 8 || kWarps == 16) && kTileRows >= 16 && kTileRows <= 64,
                  "the ring is laid out for these");
};

// Of x and A: `row` counts the rows of all leaves of the slot.
CUPY_LORA_DEVICE int swizzle_leaf(int row, int chunk, int chunks) {
    return (row * chunks + (chunks % 8 == 0 ? chunk ^ (row & 1) * 4 : chunk)) * 16;
}

// The same 4 * step chunks further on.
CUPY_LORA_DEVICE int further(int byte, int step, int chunks) {
    return chunks % 8 == 0 ? (byte ^ (step & 1) * 64) + step / 2 * 128 : byte + step * 64;
}

// What remote blocks write, and the barriers that count it: used by ring tiles only.
struct RingExchange {
    u64* barriers;  // [2]: parts for this block's share of v; the whole v
    float* shares;  // [kCluster][share]
    float* v;       // [kTileRows][rank]
    u32 uses;
};

// The sum of `parts` over K, of four ranks of a token.
template <int kRank>
CUPY_LORA_DEVICE float4 ring_part(const float* parts, int token, int rank) {
    using S = RingShape<kRank>;
    return tree_sum<S::kLeafWarps * S::kPasses>([&](int part) {
        const float* const place = parts + part * (S::kPlaces / S::kPasses) * S::kPlaceFloats;
        return *reinterpret_cast<const float4*>(place + token * (S::kRows16 + 4) + rank);
    });
}

// Of the slots and the parts beside them: room for STAGES of any rank.
template <int kAt = 0>
constexpr CUPY_LORA_DEVICE int ring_bytes() {
    if constexpr (kAt == kRankCount) {
        return 0;
    } else if constexpr (!slot_rank(kRanks[kAt])) {
        return ring_bytes<kAt + 1>();
    } else {
        using S = RingShape<kRanks[kAt]>;
        constexpr int kMine = S::kPartBytes + STAGES * S::kSlotBytes, kRest = ring_bytes<kAt + 1>();
        return kMine > kRest ? kMine : kRest;
    }
}

// Slots of a rank's ring: what is laid out for the widest holds more of a narrow one's, whose bytes in flight are few.
template <int kRank>
constexpr CUPY_LORA_DEVICE int ring_stages() {
    constexpr int kFit = (ring_bytes() - RingShape<kRank>::kPartBytes) / RingShape<kRank>::kSlotBytes;
    return kFit < 16 ? kFit : 16;
}

constexpr int kRingRemoteBytes = kCluster > 1 ? 2 * kTileRows * widest_ring_rank() * 4 : 0;

CUPY_LORA_DEVICE RingExchange ring_at(unsigned char* barriers, unsigned char* remote, u32 uses) {
    RingExchange rx;
    rx.barriers = reinterpret_cast<u64*>(barriers);
    rx.shares = reinterpret_cast<float*>(remote);
    rx.v = rx.shares + kTileRows * widest_ring_rank();
    rx.uses = uses;
    return rx;
}

template <int kRank>
CUPY_LORA_DEVICE void ring_exchange(RingExchange& rx, Exchange& ex, const float* parts, int rows) {
    using S = RingShape<kRank>;
    constexpr int kQuads = S::kRows16 / 4, kAll = kTileRows * kQuads;
    const u32 parity = rx.uses++ & 1;
    if (threadIdx.x == 0) expect_shares<kAll>(rx.barriers, rx.barriers + 1, rows * kQuads);
    if (!ex.joined) {
        ptx::cluster_wait();
        ex.joined = true;
    }
    exchange_shares<kAll>(
        rx.barriers, parity, rx.barriers + 1, parity, rx.shares, rx.v, rows * kQuads,
        [&](int quad) { return ring_part<kRank>(parts, quad / kQuads, quad % kQuads * 4); }, [] {});
}

// 8 columns of rank `first` + g of A, zeros from kRank on: what lies there is not A.
template <int kRank>
CUPY_LORA_DEVICE uint4 row_of_a(const unsigned char* at, int first) {
    if (first >= kRank) return make_uint4(0, 0, 0, 0);
    if (first + 8 <= kRank || first + static_cast<int>(threadIdx.x % 32 / 4) < kRank) {
        return *reinterpret_cast<const uint4*>(at);
    }
    return make_uint4(0, 0, 0, 0);
}

template <int kRank>
CUPY_LORA_DEVICE void ring_tile(RingExchange& rx, Exchange& ex, unsigned char* local, const Layer& layer,
                                const RingTile& tile, const Record& w, Out* y) {
    using S = RingShape<kRank>;
    constexpr int kChunks = S::kLeafChunks, kSteps = Leaf<kIn>::kSteps;
    using E = typename S::Expand;
    const int width = width_of(layer.width);
    const int expand_stages = ceil_div(ceil_div(width, S::kColumns), kCluster);
    constexpr bool kWhole = kOneWidth && kWidest % (S::kColumns * kCluster) == 0;
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32, g = lane / 4,
              t = lane % 4;
    const int block = static_cast<int>(blockIdx.x % kCluster);
    float* const parts = reinterpret_cast<float*>(local);
    unsigned char* const ring = local + S::kPartBytes;

    // ---- the copies of a stage: each thread's share of the 16-byte chunks, all addresses made once
    constexpr int kLeafRows = kTileRows + kRank;
    constexpr int kShrinkItems = S::kLeafWarps * kLeafRows * kChunks, kShrinkEach = ceil_div(kShrinkItems, kThreads);
    constexpr bool kRegular =
        kThreads % (2 * kChunks) == 0;  // thread's next chunk: the same one of an even row further
    // A thread's chunks are those of one row in all leaves, where a leaf is one chunk a thread.
    constexpr bool kOneRow = kThreads == kLeafRows * kChunks;
    constexpr int kFroms = kOneRow ? 1 : kShrinkEach, kLeafAhead = kOneRow ? S::kLeavesEach * kChunks * 8 : 0;
    const Half* from[kFroms];
    int to[kRegular ? 1 : kShrinkEach];
    u32 wanted = 0;  // bit j: this thread's chunk j is there
#pragma unroll
    for (int j = 0; j < kShrinkEach; ++j) {
        const int item = thread + j * kThreads, leaf = item / (kLeafRows * kChunks), row = item / kChunks % kLeafRows;
        const int column = ((block * S::kLeafWarps + leaf) * S::kLeavesEach * kChunks + item % kChunks) * 8;
        if (j == 0 || !kRegular) to[j] = swizzle_leaf(item / kChunks, item % kChunks, kChunks);
        if (item < kShrinkItems && (row >= kTileRows || row < tile.rows)) wanted |= 1u << j;
        if (j < kFroms) {
            from[j] = (row < kTileRows ? layer.x + tile.row(row) * layer.x_stride
                                       : w.a + static_cast<i64>(row - kTileRows) * kIn) +
                      column;
        }
    }
    constexpr int kYChunks = S::kColumns / 8, kYEach = kTileRows * kYChunks / kThreads,
                  kBItems = S::kColumns * kRank / 8;
    static_assert(kTileRows * kYChunks % kThreads == 0, "a stage of y is whole chunks per thread");
    const int y_row = thread / kYChunks, y_chunk = thread % kYChunks;
    const int y_to = E::y_byte(y_row, y_chunk);
    const Out* y_from[kYEach];
#pragma unroll
    for (int j = 0; j < kYEach; ++j) {
        y_from[j] = y + tile.row(y_row + j * kThreads / kYChunks) * layer.y_stride + block * S::kColumns + y_chunk * 8;
    }
    const Half* b_from = w.b + static_cast<i64>(block) * S::kColumns * kRank + thread * 8;
    const int b_to = E::b_byte(thread);

    constexpr int kStages = ring_stages<kRank>();
    constexpr u32 kRingBytes = kStages * S::kSlotBytes;
    int stage_in = 0;
    u32 in = 0, out = 0;  // bytes from `ring` to the next slot to fill, and to read
    const auto request = [&] {
        unsigned char* const slot_in = ring + in;
        if (stage_in < S::kLeavesEach) {
#pragma unroll
            for (int j = 0; j < kShrinkEach; ++j) {
                if (wanted >> j & 1) {
                    unsigned char* const at = slot_in + (kRegular ? to[0] + j * kThreads * 16 : to[j]);
                    const Half* const chunk = from[kOneRow ? 0 : j] + j * kLeafAhead;
                    if constexpr (Leaf<kIn>::kExact) {
                        ptx::copy_async_16(at, chunk);
                    } else {
                        const int item = thread + j * kThreads, leaf = item / (kLeafRows * kChunks);
                        const int column = ((block * S::kLeafWarps + leaf) * S::kLeavesEach + stage_in) * kChunks * 8;
                        ptx::copy_async_16(at, chunk, column + item % kChunks * 8 < kIn);
                    }
                }
            }
#pragma unroll
            for (int j = 0; j < kFroms; ++j) from[j] += kChunks * 8;
        } else if (stage_in < S::kLeavesEach + expand_stages) {
            const int first = ((stage_in - S::kLeavesEach) * kCluster + block) * S::kColumns;  // column of the slice
#pragma unroll
            for (int j = 0; j < ceil_div(kBItems, kThreads); ++j) {
                if ((kBItems % kThreads == 0 || thread + j * kThreads < kBItems) &&
                    (kWhole || b_left(thread + j * kThreads, width - first, kRank) > 0)) {
                    ptx::copy_async_16(slot_in + b_to + j * kThreads * 16, b_from + j * kThreads * 8);
                }
            }
#pragma unroll
            for (int j = 0; j < kYEach; ++j) {
                if (y_row + j * kThreads / kYChunks < tile.rows && (kWhole || first + y_chunk * 8 < width)) {
                    ptx::copy_async_16(slot_in + y_to + j * kThreads * 16, y_from[j]);
                }
                y_from[j] += kCluster * S::kColumns;
            }
            b_from += kCluster * S::kColumns * kRank;
        }
        ++stage_in;
        in = in + S::kSlotBytes == kRingBytes ? 0 : in + S::kSlotBytes;
        ptx::copy_async_commit();
    };
    // The next kTogether stages, once they have landed for all threads; asks for those that take the slots before them.
    const auto take = [&] {
        ptx::copy_async_wait<kStages - 2 * S::kTogether>();
        __syncthreads();
#pragma unroll
        for (int i = 0; i < S::kTogether; ++i) request();
    };
    const auto next_slot = [&] {
        const unsigned char* const slot = ring + out;
        out = out + S::kSlotBytes == kRingBytes ? 0 : out + S::kSlotBytes;
        return slot;
    };
#pragma unroll 1
    for (int i = 0; i < kStages - S::kTogether; ++i) request();

    // ---- shrink
    const int rank_warp = warp % S::kRankWarps, token_warp = warp / S::kRankWarps % S::kTokenWarps;
    const int leaf_warp = warp / (S::kRankWarps * S::kTokenWarps);
    {
        constexpr int kStepUnroll = kSteps > 4 ? 2 : kSteps;
        static_assert(S::kUnroll % S::kTogether == 0, "the stages of a turn are taken together");
        constexpr int kRowBytes = kChunks * 16;
        const int x_at = swizzle_leaf(leaf_warp * kLeafRows + token_warp * S::kGroups * 8 + g, t, kChunks);
        const int a_at = swizzle_leaf(leaf_warp * kLeafRows + kTileRows + rank_warp * S::kBlocks * 16 + g, t, kChunks);
        float* part = parts + leaf_warp * S::kPlaces * S::kPlaceFloats +
                      (token_warp * S::kGroups * 8 + 2 * t) * (S::kRows16 + 4) + rank_warp * S::kBlocks * 16 + g;
        const auto offset = [](int b, int m, int e) {
            return (m * 8 + e % 2) * (S::kRows16 + 4) + b * 16 + 8 * (e / 2);
        };
#pragma unroll 1
        for (int pass = 0; pass < S::kPasses; ++pass, part += S::kPlaceFloats) {
            Tree<S::kTreeInShared ? 1 : S::kTurns, S::kBlocks, S::kGroups> tree;
#pragma unroll 1
            for (int turn = 0; turn < S::kTurns; ++turn) {
                Tree<S::kUnroll, S::kBlocks, S::kGroups> four;
                float sum[S::kBlocks][S::kGroups][4];
#pragma unroll
                for (int u = 0; u < S::kUnroll; ++u) {
                    if (u % S::kTogether == 0) take();
                    const unsigned char* const slot = next_slot();
                    four.each([&](int b, int m, int e) { sum[b][m][e] = 0.f; });
#pragma unroll kStepUnroll
                    for (int s = 0; s < kSteps; ++s) {
                        uint4 xs[S::kGroups];
#pragma unroll
                        for (int m = 0; m < S::kGroups; ++m) {
                            xs[m] =
                                *reinterpret_cast<const uint4*>(slot + further(x_at, s, kChunks) + m * 8 * kRowBytes);
                        }
#pragma unroll
                        for (int b = 0; b < S::kBlocks; ++b) {
                            const unsigned char* const at = slot + further(a_at, s, kChunks) + b * 16 * kRowBytes;
                            const int first = kRank == S::kRows16 ? 0 : (rank_warp * S::kBlocks + b) * 16;
                            const uint4 low = row_of_a<kRank>(at, first),
                                        high = row_of_a<kRank>(at + 8 * kRowBytes, first + 8);
                            shrink_step<Half>(sum[b], low, high, xs);
                        }
                    }
                    four.push(u, sum);
                }
                four.each([&](int b, int m, int e) { sum[b][m][e] = four.total(b, m, e); });
                if constexpr (S::kTreeInShared) {
                    int level = 0;
                    for (; turn >> level & 1; ++level) {
                        const float* const pending = part + level * S::kPlaceFloats;
                        four.each([&](int b, int m, int e) { sum[b][m][e] = pending[offset(b, m, e)] + sum[b][m][e]; });
                    }
                    float* const to = part + (turn == S::kTurns - 1 ? 0 : level * S::kPlaceFloats);
                    four.each([&](int b, int m, int e) { to[offset(b, m, e)] = sum[b][m][e]; });
                } else {
                    tree.push_at(turn, sum);
                }
            }
            if constexpr (!S::kTreeInShared) {
                tree.each([&](int b, int m, int e) { part[offset(b, m, e)] = tree.total(b, m, e); });
            }
        }
    }
    __syncthreads();
    if constexpr (kCluster > 1) ring_exchange<kRank>(rx, ex, parts, tile.rows);

    ptx::start_next();

    // ---- expand: this warp's 16 tokens, and its unit of each stage's columns
    const int token0 = warp % S::kTokenTiles * 16 + g, unit = warp / S::kTokenTiles * E::kUnit;
    const float scale = w.scale * layer.scale;
    typename E::V v;
    E::split(v, [&](int h, int rank) {
        float4 q;
        if constexpr (kCluster > 1) {
            q = *reinterpret_cast<const float4*>(rx.v + (token0 + 8 * h) * S::kRows16 + rank);
        } else {
            q = ring_part<kRank>(parts, token0 + 8 * h, rank);
        }
        return make_float4(q.x * scale, q.y * scale, q.z * scale, q.w * scale);
    });
    const int my_column = unit + 2 * S::kTiles * t;  // in a stage
    const typename E::Place place = E::place(unit, token0 - g);
    Out* y_out[2];
    bool writes[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        y_out[h] = y + tile.row(token0 + 8 * h) * layer.y_stride + block * S::kColumns + my_column;
        writes[h] = tile.writes(token0 + 8 * h);
    }
#pragma unroll 1
    for (int first = 0; first < expand_stages; first += S::kTogether) {
        take();
        constexpr int kUnroll =
            kRank > 32 && (sizeof(SplitV<Half>) > 24 || kWarps > 8) ? 1 : S::kTogether;  // by registers
#pragma unroll kUnroll
        for (int i = 0; i < S::kTogether; ++i) {
            const int stage = first + i;
            if (i > 0 && stage >= expand_stages) break;
            const bool inside = kWhole || (stage * kCluster + block) * S::kColumns + my_column < width;
            typename E::Y y_pair[2];
            E::multiply(y_pair, next_slot(), place, v);
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                if (writes[h] && inside) y_pair[h].store(y_out[h], 8);
                y_out[h] += kCluster * S::kColumns;
            }
        }
    }
    ptx::copy_async_wait<0>();
}
