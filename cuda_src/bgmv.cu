// Batched gather matrix-vector products: one adapter index per token.
//
//   bgmv_shrink  out[i, 0:rank] = scaling * (x[i] A[index[i]]^T)      x (tokens, in), A (slots, rank, in)
//   bgmv_expand  out[i, offset:offset + N] (+)= scaling * v[i] B[index[i]]^T    v (tokens, rank), B (slots, N, rank)
//
// Grid: x = CLUSTER blocks per token, y = chunks of ranks (shrink) or 1. Block: 32 * WARPS threads.
// A tile is one token: seven of the eight columns of each tensor core product repeat it, and are not
// stored. Tokens whose index is not in [0, slots) get zeros (shrink) or stay as they are (expand).
#include "lora_halves.cuh"

#if INDEX_64
using Index = i64;
#else
using Index = i32;
#endif

#if PHASE == 1
extern "C" __global__ void LAYER_CLUSTER __launch_bounds__(kThreads, MIN_BLOCKS)
    bgmv_shrink(const In* __restrict__ x, const Half* __restrict__ weights, const i64* __restrict__ pointers, Out* out,
                const Index* __restrict__ indices, i32 slots, i64 stride, i64 layer, i64 x_stride, i64 out_stride,
                float scale) {
    ptx::begin_launch();
    unsigned char* const shared = block_shared();
    const Stack stack{weights, pointers, stride, layer, slots};
    const i64 token = blockIdx.x / kCluster;
    const Index slot = indices[token];
    const Tile tile = tile_of_run(token, 1);
    if (!stack.has(slot)) {
        shrink_nothing(tile, out, out_stride);
        return;
    }
    Exchange ex = exchange_start(shared);
    if constexpr (kCluster > 1) ptx::cluster_arrive_relaxed();
    shrink_tile(ex, tile, x, x_stride, stack.at(slot), out, out_stride, scale);
}
#else
extern "C" __global__ void __launch_bounds__(kThreads, MIN_BLOCKS)
    bgmv_expand(const In* __restrict__ v, const Half* __restrict__ weights, const i64* __restrict__ pointers, Out* out,
                const Index* __restrict__ indices, i32 slots, i64 stride, i64 layer, i64 v_stride, i64 out_stride,
                float scale) {
    ptx::begin_launch();
    unsigned char* const shared = block_shared();
    const Stack stack{weights, pointers, stride, layer, slots};
    const i64 token = blockIdx.x / kCluster;
    const Index slot = indices[token];
    if (stack.has(slot)) {
        expand_tile(tile_of_run(token, 1), v, v_stride, stack.at(slot), out, out_stride, scale, shared);
    }
}
#endif
