// How the blocks of a cluster bring their parts of v together, for tiles of 8 rows.
//
// Each warp leaves its part in shared memory; each block sums its warps' parts and sends the sum to every block
// of the cluster (all at once: 16-byte stores that count on the receiver's mbarrier), and all sum what they got.
// The sums are the upper levels of the tree of lora_math.cuh. Two halves take turns, so that a block may send
// the next part while another still reads this one: nobody sends twice before all have read once.
#pragma once

#include "lora_slots.cuh"

constexpr int kThreads = 32 * kWarps;

CUPY_LORA_DEVICE unsigned char* block_shared() {
    CUPY_LORA_SHARED(shared);
    return shared;
}

// What the two phases exchange, and where in shared memory.
struct Exchange {
    u64* barriers;          // [2], one for each half of `received`
    float* parts;           // [kWarps][8][kChunk + 4]
    float* received;        // [2][kCluster][8][kChunk]
    float* whole;           // [8][kChunk]: summed over the cluster
    float* kept;            // the same, of the exchange before, where a staged rank takes two
    float* v;               // [8][kMaxRank + 4]: of every rank, where they take several exchanges
    unsigned char* stages;  // [kWarps][STAGES]: slots of B and y
    u32 uses;               // exchanges so far: half = uses % 2, parity of its barrier = uses / 2 % 2
    bool joined;            // the other blocks of the cluster are known to run
};

constexpr int kReceivedBytes = kCluster > 1 ? 2 * kCluster * 8 * kChunk * 4 : 0;
constexpr CUPY_LORA_DEVICE int widest_staged() {
    int widest = 0;
    for (int i = 0; i < kRankCount; ++i) widest = slot_rank(kRanks[i]) && kRanks[i] > widest ? kRanks[i] : widest;
    return widest;
}
// Of a slot: 64 columns of B and of 8 rows of y, half as many of a rank above 64.
constexpr CUPY_LORA_DEVICE int slot_bytes(int rank) { return (rank > 64 ? 32 : 64) * (rank + 8) * 2; }
constexpr CUPY_LORA_DEVICE int widest_slot() {
    int widest = slot_bytes(0);
    for (int i = 0; i < kRankCount; ++i) {
        if (slot_rank(kRanks[i]) && slot_bytes(kRanks[i]) > widest) widest = slot_bytes(kRanks[i]);
    }
    return widest;
}
constexpr int kStageBytes = widest_slot();
constexpr int kKeptBytes = widest_staged() > 64 ? 8 * kChunk * 4 : 0;
constexpr int kPartsBytes = kWarps * 8 * (kChunk + 4) * 4;  // then `whole` and v

// What a block keeps of its exchanges from one tile to the next; the rest are addresses.
struct ExchangeState {
    u32 uses;
    bool joined;
};

// `local`: parts and v, which no other block writes.
CUPY_LORA_DEVICE Exchange exchange_at(unsigned char* barriers, unsigned char* received, unsigned char* local,
                                      ExchangeState state) {
    Exchange ex;
    ex.barriers = reinterpret_cast<u64*>(barriers);
    ex.received = reinterpret_cast<float*>(received);
    ex.parts = reinterpret_cast<float*>(local);
    ex.whole = reinterpret_cast<float*>(local + kPartsBytes);
    ex.kept = ex.whole + 8 * kChunk;
    ex.stages = local + kPartsBytes + 8 * kChunk * 4 + kKeptBytes;  // a tile uses one of the two
    ex.v = reinterpret_cast<float*>(ex.stages);
    ex.uses = state.uses;
    ex.joined = state.joined;
    return ex;
}

CUPY_LORA_DEVICE Exchange exchange_at(unsigned char* shared, ExchangeState state) {
    return exchange_at(shared, shared + 128, shared + 128 + kReceivedBytes, state);
}

// Barriers of a cluster, initialised by one thread; the cluster barrier makes that known to the others.
CUPY_LORA_DEVICE void start_barriers(unsigned char* shared, int count) {
    if constexpr (kCluster > 1) {
        if (threadIdx.x == 0) {
            for (int i = 0; i < count; ++i) ptx::mbarrier_init(reinterpret_cast<u64*>(shared) + i, 1);
            ptx::mbarrier_init_fence();
        }
    }
}

CUPY_LORA_DEVICE Exchange exchange_start(unsigned char* shared) {
    start_barriers(shared, 2);
    return exchange_at(shared, ExchangeState{0, kCluster == 1});
}

// Whether each lane sums the blocks' parts of its own ranks. Where that takes many loads, the block sums them
// once instead, at the price of one more barrier.
template <int kWidth>
constexpr bool kReadParts = kCluster > 1 && kCluster* kWidth <= 128;

// The half of `received` that an exchange takes: of the widest, so that exchanges of other widths do not reach into the
// one before, which a slower block may still read.
CUPY_LORA_DEVICE float* half_of(const Exchange& ex, u32 half) { return ex.received + half * kCluster * 8 * kChunk; }

// Four ranks of a token, summed over this block's warps.
template <int kWidth>
CUPY_LORA_DEVICE float4 part_sum(const Exchange& ex, int token, int rank) {
    return tree_sum<kWarps>([&](int warp) {
        return *reinterpret_cast<const float4*>(ex.parts + (warp * 8 + token) * (kWidth + 4) + rank);
    });
}

// The same, of what the blocks of the cluster sent.
template <int kWidth>
CUPY_LORA_DEVICE float4 received(const Exchange& ex, u32 half, int token, int rank) {
    return tree_sum<kCluster>([&](int block) {
        return *reinterpret_cast<const float4*>(half_of(ex, half) + (block * 8 + token) * kWidth + rank);
    });
}

// Every quad of the tile by one thread, into `to`; synchronises the block.
template <int kWidth, class Sum>
CUPY_LORA_DEVICE void sum_quads(const Exchange& ex, int rows, float* to, const Sum& sum) {
#pragma unroll
    for (int first = 0; first < 8 * kWidth / 4; first += kThreads) {
        const int quad = first + static_cast<int>(threadIdx.x), token = quad / (kWidth / 4),
                  rank = quad % (kWidth / 4) * 4;
        if (token < rows) *reinterpret_cast<float4*>(to + token * kWidth + rank) = sum(token, rank);
    }
    __syncthreads();
}

// After this block's parts are in shared memory and the block has synchronised: sends their sum to the
// cluster and waits for the others'. `kWidth` is the caller's chunk (at most kChunk).
template <int kWidth>
CUPY_LORA_DEVICE void exchange_parts(Exchange& ex, int rows) {
    if constexpr (kCluster > 1) {
        constexpr int kQuads = 8 * kWidth / 4;
        const u32 half = ex.uses & 1, parity = ex.uses >> 1 & 1;
        ++ex.uses;
        u64* const barrier = ex.barriers + half;
        if (threadIdx.x == 0) ptx::mbarrier_expect(barrier, static_cast<u32>(rows * kWidth * 4 * kCluster));
        if (!ex.joined) {
            ptx::cluster_wait();
            ex.joined = true;
        }
        const u32 block = blockIdx.x % kCluster;
        float* const mine = half_of(ex, half) + block * 8 * kWidth;
#pragma unroll
        for (int first = 0; first < kQuads * kCluster; first += kThreads) {
            const int item = first + static_cast<int>(threadIdx.x);
            const int quad = item % kQuads, peer = item / kQuads;
            const int token = quad / (kWidth / 4), rank = quad % (kWidth / 4) * 4;
            if (peer < kCluster && token < rows) {
                const float4 sum = part_sum<kWidth>(ex, token, rank);
                const uint4 bits = make_uint4(__float_as_uint(sum.x), __float_as_uint(sum.y), __float_as_uint(sum.z),
                                              __float_as_uint(sum.w));
                ptx::store_async_16(ptx::map_shared(mine + token * kWidth + rank, peer), bits,
                                    ptx::map_shared(barrier, peer));
            }
        }
        ptx::mbarrier_wait(barrier, parity);
        if constexpr (!kReadParts<kWidth>) {
            sum_quads<kWidth>(ex, rows, ex.whole,
                              [&](int token, int rank) { return received<kWidth>(ex, half, token, rank); });
        }
    } else {
        sum_quads<kWidth>(ex, rows, ex.whole, [&](int token, int rank) { return part_sum<kWidth>(ex, token, rank); });
    }
}

// Four ranks of a token of the v just exchanged (not scaled).
template <int kWidth>
CUPY_LORA_DEVICE float4 exchanged(const Exchange& ex, int token, int rank) {
    if constexpr (kReadParts<kWidth>) {
        return received<kWidth>(ex, (ex.uses - 1) & 1, token, rank);
    } else {
        return *reinterpret_cast<const float4*>(ex.whole + token * kWidth + rank);
    }
}

// Leaves the v just exchanged where the next exchange does not reach it, and synchronises the block.
template <int kWidth>
CUPY_LORA_DEVICE void keep_exchanged(const Exchange& ex, int rows) {
    sum_quads<kWidth>(ex, rows, ex.kept, [&](int token, int rank) { return exchanged<kWidth>(ex, token, rank); });
}
