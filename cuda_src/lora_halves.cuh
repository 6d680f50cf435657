// The two halves of a LoRA layer as launches of their own, for one tile: what bgmv.cu and sgmv.cu share.
//
//   shrink   out[row, 0:rank]  (=, or += with ADD)  scale * (x[row] A^T)
//   expand   out[row, 0:N]     (=, or += with ADD)  scale * v[row] B^T
//
// A tile of a shrink covers one chunk of ranks (blockIdx.y); a cluster shares it along K. A tile of an
// expand is shared by kCluster independent blocks along N. Weights are a stack of slots, or one pointer
// a slot (POINTERS=1) to which `layer` elements are added; a pointer of 0, or one that is not a multiple
// of 16, is no adapter.
#pragma once

#include "lora_direct.cuh"

static_assert(kRankCount == 1 && kSlices == 1, "bgmv and sgmv have one rank and one slice");
constexpr int kRank = kRanks[0];

struct Stack {
    const Half* weights;
    const i64* pointers;
    i64 stride;  // elements from one slot's weights to the next
    i64 layer;
    i32 slots;

    CUPY_LORA_DEVICE bool has(i64 slot) const {
        if (slot < 0 || slot >= slots) return false;
        return !POINTERS || (pointers[slot] != 0 && pointers[slot] % 16 == 0);
    }
    CUPY_LORA_DEVICE const Half* at(i64 slot) const {
        return POINTERS ? reinterpret_cast<const Half*>(pointers[slot]) + layer : weights + slot * stride;
    }
};

#if PHASE == 1
CUPY_LORA_DEVICE void shrink_tile(Exchange& ex, const Tile& tile, const In* x, i64 x_stride, const Half* a, Out* out,
                                  i64 out_stride, float scale) {
    constexpr int kWidth = chunk_of(kRank);
    const int g = threadIdx.x % 32 / 4, first = static_cast<int>(blockIdx.y) * kWidth;
    shrink_leaves<kWidth / 16, kShrinkBudget>(ex, x + tile.row(g) * x_stride, a + first * kARow, kRank - first,
                                              [&] { open_exchange<kWidth>(ex, tile.rows); });
    __syncthreads();
    exchange_parts<kWidth>(ex, tile.rows);
    const int block = static_cast<int>(blockIdx.x) % kCluster;
    for (int quad = block * kThreads + threadIdx.x; quad < tile.rows * (kWidth / 4); quad += kCluster * kThreads) {
        const int token = quad / (kWidth / 4), rank = quad % (kWidth / 4) * 4;
        const float4 sum = exchanged<kWidth>(ex, token, rank);
        const float part[4] = {sum.x, sum.y, sum.z, sum.w};
        Out* const to = out + (tile.first + token) * out_stride + first + rank;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (first + rank + i < kRank) {
                const float before = kAddToY ? to_float(to[i]) : 0.f;
                to[i] = from_float<Out>(kAddToY ? before + part[i] * scale : part[i] * scale);
            }
        }
    }
}

// A shrink overwrites: rows without an adapter become zeros.
CUPY_LORA_DEVICE void shrink_nothing(const Tile& tile, Out* out, i64 out_stride) {
    if constexpr (!kAddToY) {
        constexpr int kWidth = chunk_of(kRank);
        const int first = static_cast<int>(blockIdx.y) * kWidth, block = static_cast<int>(blockIdx.x) % kCluster;
        for (int at = block * kThreads + threadIdx.x; at < tile.rows * kWidth; at += kCluster * kThreads) {
            const int token = at / kWidth, rank = first + at % kWidth;
            if (rank < kRank) out[(tile.first + token) * out_stride + rank] = from_float<Out>(0.f);
        }
    }
}
#else
template <int kOf = kRank>  // a template, so that only the branch taken is compiled
CUPY_LORA_DEVICE void expand_tile(const Tile& tile, const In* v, i64 v_stride, const Half* b, Out* out, i64 out_stride,
                                  float scale, unsigned char* stages) {
    const In* const v_row = v + tile.row(threadIdx.x % 32 / 4) * v_stride;
    const auto v_of = [&](int at) { return to_float(v_row[at]) * scale; };
    if constexpr (kStaged<kOf>) {
        ExpandStaged<kOf> expand;
        expand.request(stages, tile, out, out_stride, b, kWidest);
        expand.take_early();
        const auto v_quad = [&](int at) {
            return make_float4(at < kRank ? v_of(at) : 0.f, at + 1 < kRank ? v_of(at + 1) : 0.f,
                               at + 2 < kRank ? v_of(at + 2) : 0.f, at + 3 < kRank ? v_of(at + 3) : 0.f);
        };
        expand.template take<0>(v_quad);
        if constexpr (kOf > 64) expand.template take<64>(v_quad);
        expand.finish();
    } else {
        expand_any<kRank>(tile, out, out_stride, b, kRank, kWidest, v_of);
    }
}
#endif
