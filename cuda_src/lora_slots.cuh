// Columns of B and y staged in shared memory, and the products of one lane with them: the expand of both forms.
//
// A slot holds kColumns columns of a slice: their rows of B, then kTokens rows of y, in 16-byte chunks placed so
// that a warp's fragment loads have no bank conflicts; the rows of B of a rank that is no power of two from 8 on lie
// as they do in global memory, chunks across rows, and cost up to four reads instead of one.
//   Slot      8 tokens, B the 16-row operand: lane (g, t) takes 2 * kPairs neighbouring columns, from 2 * kPairs * g
//             on, of tokens 2t and 2t + 1
//   RingSlot  16 tokens a warp, v the 16-row operand, made once for all slots: lane (g, t) takes 2 * kTiles
//             neighbouring columns, from 2 * kTiles * t on, of tokens g and g + 8; B is read half as often
//
// Preconditions: a rank of at most 64, of the direct form 128, in whole runs, so that a lane's reads are aligned; y of
// the weights' 16-bit type; rows 16-byte aligned.
#pragma once

#include "lora_config.cuh"
#include "lora_math.cuh"

// Above 64 by registers: in the direct form, alone in the kernel, where a warp has one leaf; to 96 a few short ones.
constexpr int kAlone = kCluster * kWarps == kLeaves ? 128 : kCluster > 1 && kIn <= 4096 ? 96 : 64;
constexpr int kSlotRanks = kTileRows <= 8 && kRankCount == 1 ? kAlone : 64;
constexpr CUPY_LORA_DEVICE bool slot_rank(int rank) {
    return rank > 0 && rank <= kSlotRanks && rank % rank_run(rank) == 0;
}

// Whether the rows of B trade places against bank conflicts.
constexpr CUPY_LORA_DEVICE bool placed_rank(int rank) {
    return rank == 8 || rank == 16 || rank == 32 || rank == 64 || rank == 128;
}

// Elements of B in a slot from its 16-byte chunk `item` on, where only `columns` columns are there. The chunk is
// copied where there are any: widths are multiples of 8, so that no chunk is there in part.
constexpr CUPY_LORA_DEVICE int b_left(int item, int columns, int rank) { return columns * rank - item * 8; }

// kRun 16-bit elements.
template <int kWords>
CUPY_LORA_DEVICE void read_run(u32 (&words)[kWords], const unsigned char* from) {
    if constexpr (kWords == 4) {
        const uint4 q = *reinterpret_cast<const uint4*>(from);
        words[0] = q.x, words[1] = q.y, words[2] = q.z, words[3] = q.w;
    } else if constexpr (kWords == 2) {
        const uint2 q = *reinterpret_cast<const uint2*>(from);
        words[0] = q.x, words[1] = q.y;
    } else {
        words[0] = *reinterpret_cast<const u32*>(from);
    }
}

// This lane's run of group `group` of a row of B; zeros where the rank ends before.
template <int kRank, int kWords>
CUPY_LORA_DEVICE void read_ranks(u32 (&words)[kWords], const unsigned char* from, int group) {
    constexpr int kAll = 4 * rank_run(kRank);
    if ((group + 1) * kAll <= kRank || group * kAll + static_cast<int>(threadIdx.x % 4) * rank_run(kRank) < kRank) {
        read_run(words, from);
    } else {
#pragma unroll
        for (int i = 0; i < kWords; ++i) words[i] = 0;
    }
}

template <int kRank, int kPairs, int kColumns, int kTokens>
struct Slot {
    static constexpr int kRun = rank_run(kRank), kGroups = ceil_div(kRank, 4 * kRun);
    static constexpr int kYChunks = kColumns / 8;    // of a row
    static constexpr int kY = kColumns * kRank * 2;  // byte where y starts
    static constexpr int kBytes = kY + kTokens * kColumns * 2;
    static constexpr bool kPlaced = placed_rank(kRank);
    static constexpr bool kWhole128 = kRank % 64 == 0;
    static constexpr int kSwap = kPlaced && kRank < 64 ? 64 / kRank : 1;
    static_assert(kYChunks >= 4 && kPairs >= 2, "a slot holds at least 32 columns");

    // Chunk `item` of B. Rows of one lane group are 2 * kPairs apart from the next's: a row of whole 128 bytes is split
    // between their halves, shorter ones trade places within their group.
    static CUPY_LORA_DEVICE int b_byte(int item) {
        if constexpr (!kPlaced) {
            return item * 16;
        } else {
            const int row = item / (kRank / 8), chunk = item % (kRank / 8), group = row / (2 * kPairs);
            if constexpr (kWhole128) {
                return row * kRank * 2 + (chunk ^ (group & 1) * 4) * 16;
            } else {
                return (row ^ (group & (kSwap - 1) & (2 * kPairs - 1))) * kRank * 2 + chunk * 16;
            }
        }
    }

    static CUPY_LORA_DEVICE int y_byte(int row, int chunk) {
        return kY + (row * kYChunks + (kYChunks >= 8 ? chunk ^ (row & 6) : chunk ^ (row / 2 & 3))) * 16;
    }

    // This lane's v: of token `row` of the warp's eight, from v_quad(rank).
    using V = SplitV<Half>[kGroups][kRun > 4 ? 2 : 1];

    // Its groups `kFrom` to `kTo` - 1.
    template <int kFrom, int kTo, class VQuad>
    static CUPY_LORA_DEVICE void split(V& v, const VQuad& v_quad) {
#pragma unroll
        for (int group = kFrom; group < kTo; ++group) split_v<kRun>(v[group], 4 * kRun * group, v_quad);
    }

    // Where this lane reads: `column` its first one in the slot, `token` its warp's first one.
    struct Place {
        int b, y, swap;
    };

    static CUPY_LORA_DEVICE Place place(int column, int token) {
        const int t = threadIdx.x % 4, byte = kRun * t * 2;
        Place p;
        p.swap = column / (2 * kPairs) & (kSwap - 1) & (2 * kPairs - 1);
        p.b = kWhole128 ? b_byte(column * (kRank / 8) + byte / 16) : column * kRank * 2 + byte;
        p.y = y_byte(token + 2 * t, column / 8) + column % 8 * 2;
        return p;
    }

    using Y = Columns<Half, 2 * kPairs, true>;  // of one token
    using B = u32[kPairs][2][kRun / 2];         // the lane's columns, the ranks of one group

    static CUPY_LORA_DEVICE void read_y(Y (&y)[2], const unsigned char* slot, const Place& p) {
        if constexpr (kAddToY) {
            y[0].load(reinterpret_cast<const Half*>(slot + p.y), 8);
            y[1].load(reinterpret_cast<const Half*>(slot + p.y + kYChunks * 16),
                      8);  // 2t and 2t + 1 are swizzled alike
        }
    }

    static CUPY_LORA_DEVICE void read_b(B& b, const unsigned char* slot, const Place& p, int group) {
#pragma unroll
        for (int i = 0; i < 2 * kPairs; ++i) {
            const int row = kWhole128 ? i : (i % kSwap ^ p.swap) + i / kSwap * kSwap;
            const int at = kWhole128 ? (p.b ^ group % 2 * 64) + group / 2 * 128 : p.b + group * 64;
            read_ranks<kRank>(b[i / 2][i % 2], slot + at + row * kRank * 2, group);
        }
    }

    // The sums start from y of the lane's two tokens (where ADD says so), and are rounded to it.
    using Sum = float[kPairs][4];

    static CUPY_LORA_DEVICE void start(Sum& sum, const Y (&y)[2]) {
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
            sum[i][0] = sum[i][1] = sum[i][2] = sum[i][3] = 0.f;
            if constexpr (kAddToY) {
                y[0].get(i, sum[i][0], sum[i][2]);
                y[1].get(i, sum[i][1], sum[i][3]);
            }
        }
    }

    static CUPY_LORA_DEVICE void round(Y (&y)[2], const Sum& sum) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
            for (int i = 0; i < kPairs; ++i) y[h].set(i, sum[i][h], sum[i][h + 2]);
        }
    }

    // y plus v times B, in `y`.
    static CUPY_LORA_DEVICE void multiply(Y (&y)[2], const unsigned char* slot, const Place& p, const V& v) {
        Sum sum;
        read_y(y, slot, p);
        start(sum, y);
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
            B b;
            read_b(b, slot, p, group);
            expand_group<kRun>(sum, b, v[group]);
        }
        round(y, sum);
    }
};

template <int kRank, int kTiles, int kColumns, int kTokens>
struct RingSlot {
    static constexpr int kRun = rank_run(kRank), kGroups = ceil_div(kRank, 4 * kRun);
    static constexpr int kYChunks = kColumns / 8;    // of a row
    static constexpr int kY = kColumns * kRank * 2;  // byte where y starts
    static constexpr int kBytes = kY + kTokens * kColumns * 2;
    static constexpr int kUnit = 8 * kTiles;  // columns of a warp
    static_assert(kTiles == 4 || (kTiles == 2 && kRank > 16 && kYChunks >= 8), "the swizzles are made for these");

    // Chunk `item` of B. A lane group reads rows 2 * kTiles * (g / 2) + g % 2: neighbours in pairs.
    static CUPY_LORA_DEVICE int b_byte(int item) {
        if constexpr (!placed_rank(kRank)) {
            return item * 16;
        } else {
            const int row = item / (kRank / 8), chunk = item % (kRank / 8);
            if constexpr (kRank == 64) {
                return row * 128 + (chunk ^ (row & 1) * 4) * 16;
            } else {
                return (row ^ swap(row)) * kRank * 2 + chunk * 16;
            }
        }
    }

    static CUPY_LORA_DEVICE int swap(int row) {
        return kRank == 16 ? (row / (2 * kTiles) & 1) * 2 : kRank == 8 ? (row / (2 * kTiles) & 3) * 2 : 0;
    }

    static CUPY_LORA_DEVICE int y_byte(int row, int chunk) {
        return kY + (row * kYChunks + (kTiles == 4 ? chunk ^ (row & 1) * 4 : chunk ^ (row & 3) * 2)) * 16;
    }

    // This lane's v: of tokens g and g + 8 of the warp's sixteen, from v_quad(token, rank).
    using V = SplitV<Half>[2][kGroups][kRun > 4 ? 2 : 1];

    template <class VQuad>
    static CUPY_LORA_DEVICE void split(V& v, const VQuad& v_quad) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
            for (int group = 0; group < kGroups; ++group) {
                split_v<kRun>(v[h][group], 4 * kRun * group, [&](int rank) { return v_quad(h, rank); });
            }
        }
    }

    // Where this lane reads: `unit` the warp's first column in the slot, `token` its first row.
    struct Place {
        int b, y;
    };

    static CUPY_LORA_DEVICE Place place(int unit, int token) {
        const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, byte = kRun * t * 2;
        Place p;
        const int row = unit + 2 * kTiles * (g / 2) + g % 2;
        p.b = placed_rank(kRank) ? b_byte(row * (kRank / 8) + byte / 16) + byte % 16 : row * kRank * 2 + byte;
        p.y = y_byte(token + g, (unit + 2 * kTiles * t) / 8) + 2 * kTiles * t % 8 * 2;
        return p;
    }

    // y of the lane's two tokens (where ADD says so) plus v times B, in `y`.
    using Y = Columns<Half, 2 * kTiles, true>;

    static CUPY_LORA_DEVICE void multiply(Y (&y)[2], const unsigned char* slot, const Place& p, const V& v) {
        float sum[kTiles][4];
#pragma unroll
        for (int h = 0; h < 2; ++h) {  // rows g and g + 8 are swizzled alike
            if constexpr (kAddToY) y[h].load(reinterpret_cast<const Half*>(slot + p.y + h * 8 * kYChunks * 16), 8);
#pragma unroll
            for (int i = 0; i < kTiles; ++i) {
                sum[i][2 * h] = sum[i][2 * h + 1] = 0.f;
                if constexpr (kAddToY) y[h].get(i, sum[i][2 * h], sum[i][2 * h + 1]);
            }
        }
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
            u32 b[kTiles][kRun / 2];
#pragma unroll
            for (int i = 0; i < kTiles; ++i) {
                // Rows 2i further: of its group of 2 * kTiles, whose rows trade places by an exclusive or.
                const int at = kRank == 64 ? p.b ^ group * 64 : p.b + group * 64, row = 2 * i * kRank * 2;
                constexpr bool kTrades = kRank == 8 || kRank == 16;
                read_ranks<kRank>(b[i], slot + (kTrades ? at ^ row : at + row), group);
            }
#pragma unroll
            for (int s = 0; s < (kRun > 4 ? 2 : 1); ++s) {
#pragma unroll
                for (int i = 0; i < kTiles; ++i) {
                    u32 words[2] = {b[i][2 * s], 0};
                    if constexpr (kRun > 2) words[1] = b[i][2 * s + 1];
                    expand_step(sum[i], words, v[0][group][s], v[1][group][s]);
                }
            }
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
            for (int i = 0; i < kTiles; ++i) y[h].set(i, sum[i][2 * h], sum[i][2 * h + 1]);
        }
    }
};
