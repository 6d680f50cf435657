// One specialisation of a LoRA kernel, from the macros that the plan sets (cupy_lora/_lora_plan.py), and
// what a tile of work is.
//
//   WEIGHT_T, X_T, OUT_T   element types: bf16, f16 (X_T of an expand and OUT_T also float)
//   IN                     columns of x and A (1 where there is no shrink)
//   WIDTHS                 columns of each slice of y, comma-separated (1 where there is no expand)
//   RANKS                  ranks with code of their own, comma-separated; a rank that is not in the list
//                          takes the path with run-time loops (ANY_RANK=1) or cannot occur (ANY_RANK=0)
//   PHASE                  0 fused, 1 shrink only, 2 expand only
//   CLUSTER, WARPS         blocks that share a tile, warps per block
//   STAGES                 slots of the ring, or units of B and y that a warp has in flight
//   MIN_BLOCKS             blocks that must fit a multiprocessor, by their registers
//   TILES                  0 list of tiles of a LoraBatch, 1 one token a tile, 2 segments
//   TILE_ROWS              rows of a tile
//   X_VECTORS, A_VECTORS, B_VECTORS, Y_VECTORS   1: 16-byte accesses are aligned
//   TRANSPOSED             1: A is stored (in, rank), B (rank, out)
//   ADD                    1: the output is added to, 0: overwritten
#pragma once

#include "common.cuh"

using Half = WEIGHT_T;
using In = X_T;
using Out = OUT_T;

constexpr int kIn = IN;
__device__ constexpr int kWidths[] = {WIDTHS};
constexpr int kSlices = sizeof(kWidths) / sizeof(int);
__device__ constexpr int kRanks[] = {RANKS};
constexpr int kRankCount = sizeof(kRanks) / sizeof(int);
constexpr bool kAnyRank = ANY_RANK;
constexpr bool kShrinks = PHASE != 2, kExpands = PHASE != 1;
constexpr int kCluster = CLUSTER;
constexpr int kWarps = WARPS;
constexpr int kTileRows = TILE_ROWS;
constexpr bool kXVectors = X_VECTORS, kAVectors = A_VECTORS, kBVectors = B_VECTORS, kYVectors = Y_VECTORS;
constexpr bool kTransposed = TRANSPOSED;
constexpr bool kAddToY = ADD;

#if CLUSTER > 1
#define LAYER_CLUSTER CUPY_LORA_CLUSTER(CLUSTER)
#else
#define LAYER_CLUSTER
#endif

constexpr int kMaxRank = 1024;  // of a fused layer: its v is kept in shared memory

static_assert(kCluster * kWarps <= 64 && 64 % (kCluster * kWarps) == 0, "blocks times warps must divide the leaves");

// Ranks of one exchange, for a rank known at compile time: whole groups of four runs, at most 64.
constexpr CUPY_LORA_DEVICE int chunk_of(int rank) {
    return rank <= 16 ? 16 : rank >= 64 ? 64 : ceil_div(rank, 32) * 32;
}
constexpr int kAnyChunk = 16;  // for a rank that is not
// Registers for loads of x and A in flight; for a rank known at run time only, which must not cost the others.
constexpr int kShrinkBudget = 72;
constexpr int kAnyBudget = 24;

constexpr CUPY_LORA_DEVICE int widest_chunk() {
    int widest = kAnyRank ? kAnyChunk : 0;
    for (int i = 0; i < kRankCount; ++i) widest = chunk_of(kRanks[i]) > widest ? chunk_of(kRanks[i]) : widest;
    return widest;
}
constexpr int kChunk = widest_chunk();

// Elements of B that one access may take, for rows of `rank` elements.
constexpr CUPY_LORA_DEVICE int b_vector(int rank) {
    if (!kBVectors || kTransposed) return 1;
    return rank % 8 == 0 ? 8 : rank % 4 == 0 ? 4 : rank % 2 == 0 ? 2 : 1;
}

// Elements between the rows and columns of A (rank x in) and of B (out x rank).
constexpr i64 kARow = kTransposed ? 1 : kIn, kAColumn = kTransposed ? kRanks[0] : 1;
constexpr i64 kBColumn = kTransposed ? kWidths[0] : 1;
constexpr CUPY_LORA_DEVICE i64 b_row(int rank) { return kTransposed ? 1 : rank; }

// One (slot, slice) of a LoraWeights: 32 bytes, written by set_slot.
struct __align__(16) Record {
    const Half* a;  // (rank, in), null where there is no adapter
    const Half* b;  // (out, rank)
    i32 rank;
    float scale;
    i64 spare;
};

// Rows of one adapter: up to kTileRows of them, in a list or one after another.
struct Tile {
    int slot;
    int rows;
    const i32* list;  // of `rows` row numbers, kTileRows of them readable; null: first, first + 1, ...
    i64 first;
    i32 tokens;  // of a list: rows from here on are not the caller's (a graph may be replayed with another batch)

    // Row `i` of the tile; past its end, some row that is safe to read.
    CUPY_LORA_DEVICE i64 row(int i) const {
        if (!list) return first + (i < rows ? i : rows - 1);
        const int listed = list[i], safe = list[0];  // both at once: no load waits for `rows`
        const int chosen = i < rows ? listed : safe;
        return chosen < tokens ? chosen : 0;
    }
    CUPY_LORA_DEVICE bool writes(int i) const { return i < rows && (!list || list[i] < tokens); }
};

// What every tile of a fused layer shares.
struct Layer {
    const In* x;
    Out* y;
    i64 x_stride, y_stride;  // elements between rows
    i32 tokens;
    float scale;
};
