// Segmented gather matrix-vector products: runs of tokens that share an adapter.
//
//   sgmv_shrink  out[i, 0:rank] (=, +=) scaling * (x[i] A[slot]^T)    for every row i of the segment
//   sgmv_expand  out[i, offset:offset + N] (=, +=) scaling * v[i] B[slot]^T
//
// A segment s covers the rows starts[s] to starts[s] + lengths[s] (or, with ENDS=1, to lengths[s]) and
// uses slot indices[s] (without indices: slot s). Grid: x = CLUSTER blocks for each of the tiles that
// take a segment's rows in turn, y = chunks of ranks (shrink) or 1, z = segments in turn. Any x and z
// are right. Block: 32 * WARPS threads; a tile is up to 8 rows.
//
// Guarded: a segment that starts below 0 is skipped, one that reaches past `tokens` is cut there.
#include "lora_halves.cuh"

#if INDEX_64
using Index = i64;
#else
using Index = i32;
#endif
#if START_64
using Start = i64;
#else
using Start = i32;
#endif
#if LENGTH_64
using Length = i64;
#else
using Length = i32;
#endif

extern "C" __global__ void
#if PHASE == 1
    LAYER_CLUSTER
#endif
    __launch_bounds__(kThreads, MIN_BLOCKS)
        sgmv(const In* __restrict__ x, const Half* __restrict__ weights, const i64* __restrict__ pointers, Out* out,
             const Start* __restrict__ starts, const Length* __restrict__ lengths, const Index* __restrict__ indices,
             i32 segments, i64 tokens, i32 slots, i64 stride, i64 layer, i64 x_stride, i64 out_stride, float scale) {
    ptx::begin_launch();
    const Stack stack{weights, pointers, stride, layer, slots};
    const i64 step = static_cast<i64>(gridDim.x / kCluster) * kTileRows;
    unsigned char* const shared = block_shared();
#if PHASE == 1
    Exchange ex = exchange_start(shared);
    if constexpr (kCluster > 1) ptx::cluster_arrive_relaxed();
#endif
    for (int s = static_cast<int>(blockIdx.z); s < segments; s += static_cast<int>(gridDim.z)) {
        const i64 start = starts[s];
        if (start < 0) continue;
        i64 end = ENDS ? static_cast<i64>(lengths[s]) : start + static_cast<i64>(lengths[s]);
        if (end > tokens) end = tokens;
        const i64 slot = indices ? static_cast<i64>(indices[s]) : s;
        const bool present = stack.has(slot);
        for (i64 row = start + static_cast<i64>(blockIdx.x / kCluster) * kTileRows; row < end; row += step) {
            const int rows = end - row < kTileRows ? static_cast<int>(end - row) : kTileRows;
            const Tile tile = tile_of_run(row, rows);
#if PHASE == 1
            if (present) {
                shrink_tile(ex, tile, x, x_stride, stack.at(slot), out, out_stride, scale);
                __syncthreads();  // the next tile's parts overwrite this one's
            } else {
                shrink_nothing(tile, out, out_stride);
            }
#else
            if (present) expand_tile(tile, x, x_stride, stack.at(slot), out, out_stride, scale, shared);
#endif
        }
    }
#if PHASE == 1
    if constexpr (kCluster > 1) {
        if (!ex.joined) ptx::cluster_wait();
    }
#endif
}
