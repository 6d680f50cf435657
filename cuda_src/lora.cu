// The whole LoRA layer in one launch.
//
//   y[i, slice] += scale * scale[slot, slice] * (x[i] A[slot, slice]^T) B[slot, slice]^T
//   x (tokens, in), y (tokens, sum of the slices' widths), A (rank, in), B (width, rank)
//
// Grid: x = clusters of CLUSTER blocks that take tiles in turn (any number of them is right, as many as
// there are tiles is fastest), y = slices. Block: 32 * WARPS threads. A tile is up to TILE_ROWS tokens of
// one slot, listed by build_tiles (lora_batch.cu). The forms are described in lora_direct.cuh and
// lora_ring.cuh; both give the same bits (lora_math.cuh).
//
// Preconditions: every listed slot is one of the table's; CLUSTER > 1 needs sm_90. Rows from `tokens` on are
// skipped.
#include "lora_direct.cuh"
#if TILE_ROWS > 8
#include "lora_ring.cuh"
#endif

// One tile of one slice by the direct form; kRank 0: the rank is known at run time only.
template <int kRank, int N>
CUPY_LORA_DEVICE void direct_tile(Exchange& ex, const Layer& layer, const Tile& tile, const Record& w, Out* y) {
    const int g = threadIdx.x % 32 / 4;
    const In* const x_row = layer.x + tile.row(g) * layer.x_stride;
    const float scale = w.scale * layer.scale;
    if constexpr (kStaged<kRank>) {
        constexpr int kWidth = chunk_of(kRank);
        ExpandStaged<kRank, N> expand;
        shrink_leaves<kWidth / 16, kShrinkBudget>(ex, x_row, w.a, kRank,
                                                  [&] { expand.request(ex.stages, tile, y, layer.y_stride, w.b); });
        __syncthreads();
        exchange_parts<kWidth>(ex, tile.rows);
        expand.finish([&](int rank) {
            const float4 q = exchanged<kWidth>(ex, g, rank);
            return make_float4(q.x * scale, q.y * scale, q.z * scale, q.w * scale);
        });
    } else {
        const int rank = kRank ? kRank : w.rank;
        shrink_chunks<kRank ? chunk_of(kRank) : kAnyChunk, kRank ? kShrinkBudget : kAnyBudget>(ex, x_row, w.a, rank, tile.rows);
        expand_any<N, kRank>(tile, y, layer.y_stride, w.b, rank,
                             [&](int at) { return ex.v[g * (kMaxRank + 4) + at] * scale; });
    }
}

// What a block keeps from one tile to the next.
struct Block {
    Exchange ex;
#if TILE_ROWS > 8
    RingExchange ring;
    unsigned char* local;
#endif
};

#if TILE_ROWS > 8
using Rows = RingTile;
#else
using Rows = Tile;
#endif

template <int kRank, int N>
CUPY_LORA_DEVICE void tile_of(Block& block, const Layer& layer, const Rows& tile, const Record& w, Out* y) {
#if TILE_ROWS > 8
    if constexpr (kStaged<kRank>) {
        ring_tile<kRank, N>(block.ring, block.ex, block.local, layer, tile, w, y);
    } else {
        for (int first = 0; first < tile.rows; first += 8) {
            const int rows = tile.rows - first < 8 ? tile.rows - first : 8;
            const Tile eight = tile_of_list(tile.list[first + threadIdx.x % 8], rows, tile.tokens);
            direct_tile<kRank, N>(block.ex, layer, eight, w, y);
            __syncthreads();  // the next rows' parts overwrite these
        }
    }
#else
    direct_tile<kRank, N>(block.ex, layer, tile, w, y);
#endif
}

// Picks the code for this tile's rank.
template <int N, int kAt = 0>
CUPY_LORA_DEVICE void tile_of_rank(Block& block, const Layer& layer, const Rows& tile, const Record& w, Out* y) {
    if constexpr (kAt < kRankCount) {
        if ((!kAnyRank && kRankCount == kAt + 1) || w.rank == kRanks[kAt]) {
            tile_of<kRanks[kAt], N>(block, layer, tile, w, y);
        } else {
            tile_of_rank<N, kAt + 1>(block, layer, tile, w, y);
        }
    } else if constexpr (kAnyRank) {
        tile_of<0, N>(block, layer, tile, w, y);
    }
}

// Picks the code for this slice's width: slices of one width share it.
template <int kAt = 0>
CUPY_LORA_DEVICE void tile_of_slice(Block& block, const Layer& layer, const Rows& tile, const Record& w, Out* y,
                                    int width) {
    constexpr bool kLast = [] {
        for (int i = kAt + 1; i < kSlices; ++i) {
            if (kWidths[i] != kWidths[kAt]) return false;
        }
        return true;
    }();
    if (kLast || width == kWidths[kAt]) {
        tile_of_rank<kWidths[kAt]>(block, layer, tile, w, y);
    } else if constexpr (!kLast) {
        tile_of_slice<kAt + 1>(block, layer, tile, w, y, width);
    }
}

extern "C" __global__ void LAYER_CLUSTER __launch_bounds__(kThreads, MIN_BLOCKS)
    add_lora(const In* __restrict__ x, Out* y, const Record* __restrict__ table, const i32* __restrict__ tiles,
             const i32* __restrict__ tile_count, i32 tokens, i64 x_stride, i64 y_stride, float scale) {
    CUPY_LORA_SHARED(shared);
    constexpr int kStride = 8 + kTileRows;
    const Layer layer{x, y, x_stride, y_stride, tokens, scale};
    const int slice = static_cast<int>(blockIdx.y);
    int width = kWidths[0];
    i64 offset = 0;
#pragma unroll
    for (int s = 1; s < kSlices; ++s) {
        if (slice >= s) offset += kWidths[s - 1], width = kWidths[s];
    }
    int at = static_cast<int>(blockIdx.x) / kCluster;
    const int step = static_cast<int>(gridDim.x) / kCluster;
    // The first record is read beside the count, not after it: the grid is within the capacity.
    const i32* record = tiles + static_cast<i64>(at) * kStride;
    int2 head = ptx::load_int2(record);
    int listed = ptx::load_int(record + 8 + threadIdx.x % 8);
    const int count = ptx::load_int(tile_count);
#if TILE_ROWS > 8
    unsigned char* const remote = shared + 128 + kReceivedBytes;
    Block block{exchange_start(shared, shared + 128, remote + kRingRemoteBytes), ring_start(shared + 16, remote),
                remote + kRingRemoteBytes};
#else
    Block block{exchange_start(shared)};
#endif
    if (at >= count) return;
    if constexpr (kCluster > 1) ptx::cluster_arrive_relaxed();
    while (true) {
        const Record w = load_record(table + static_cast<i64>(head.x) * kSlices + slice);
#if TILE_ROWS > 8
        const Rows tile{head.y, record + 8, tokens};
#else
        const Rows tile = tile_of_list(listed, head.y, tokens);
#endif
        if (w.rank > 0) tile_of_slice(block, layer, tile, w, y + offset, width);
        at += step;
        if (at >= count) break;
        record = tiles + static_cast<i64>(at) * kStride;
        head = ptx::load_int2(record);
        listed = ptx::load_int(record + 8 + threadIdx.x % 8);
        __syncthreads();  // the next tile's parts overwrite this one's
    }
    if constexpr (kCluster > 1) {
        if (!block.ex.joined) ptx::cluster_wait();
    }
}
