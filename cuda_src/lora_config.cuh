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

constexpr CUPY_LORA_DEVICE int widest_slice() {
    int widest = 0;
    for (int i = 0; i < kSlices; ++i) widest = kWidths[i] > widest ? kWidths[i] : widest;
    return widest;
}
constexpr int kWidest = widest_slice();
constexpr CUPY_LORA_DEVICE bool one_width() {
    for (int i = 0; i < kSlices; ++i) {
        if (kWidths[i] != kWidest) return false;
    }
    return true;
}
constexpr bool kOneWidth = one_width();
// The width of a slice: a constant where all have the same. The code is laid out for the widest, and stops early.
CUPY_LORA_DEVICE int width_of(int width) { return kOneWidth ? kWidest : width; }

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

// All of it at once: a plain copy would be loaded field by field, the pointers behind the branch on the rank.
CUPY_LORA_DEVICE Record load_record(const Record* from) {
    const uint4 pointers = ptx::load_once_16(from), rest = ptx::load_once_16(reinterpret_cast<const uint4*>(from) + 1);
    Record r;
    r.a = reinterpret_cast<const Half*>(static_cast<u64>(pointers.y) << 32 | pointers.x);
    r.b = reinterpret_cast<const Half*>(static_cast<u64>(pointers.w) << 32 | pointers.z);
    r.rank = static_cast<i32>(rest.x);
    r.scale = __uint_as_float(rest.y);
    r.spare = 0;
    return r;
}

// Up to 8 rows of one adapter. Lane i % 8 of each warp holds row i, so that one load serves all who ask:
// every lane of the warp must.
struct Tile {
    int rows;
    int own;      // row of this lane, from `first` on; of a missing row, one that is safe to read
    u32 written;  // bit i: row i exists
    u64 first;

    CUPY_LORA_DEVICE u64 row(int i) const { return first + static_cast<u32>(__shfl_sync(0xffffffffu, own, i)); }
    CUPY_LORA_DEVICE bool writes(int i) const { return written >> i & 1; }
};

// Rows first, first + 1, ...
CUPY_LORA_DEVICE Tile tile_of_run(u64 first, int rows) {
    const int i = threadIdx.x % 8;
    return Tile{rows, i < rows ? i : 0, (1u << rows) - 1, first};
}

// Rows that a list names, `listed` being its entry of this lane. Those from `tokens` on are not the caller's: a
// graph may be replayed with another batch.
CUPY_LORA_DEVICE Tile tile_of_list(int listed, int rows, i32 tokens) {
    const int i = threadIdx.x % 8, safe = __shfl_sync(0xffffffffu, listed, 0);
    const int chosen = i < rows ? listed : safe;
    const u32 written = __ballot_sync(0xffffffffu, i < rows && chosen < tokens) & 0xffu;
    return Tile{rows, chosen < tokens ? chosen : 0, written, 0};
}

// What every tile of a fused layer shares.
struct Layer {
    const In* x;
    Out* y;
    u32 x_stride, y_stride;  // elements between rows: 32 bits, so that a row's address is one multiply-add
    i32 tokens;
    float scale;
    int width;  // columns of this block's slice
};
