// How the blocks of a cluster bring their parts of v together, for tiles of 8 rows.
//
// Each warp leaves its part in shared memory; each block sums its warps' parts and sends the sum to every block
// of the cluster (all at once: 16-byte stores that count on the receiver's mbarrier), and all sum what they got.
// Where that is many stores they go in two hops: each block gets its share of v only, sums that and sends it to all.
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
    u64* barriers;          // [2], one for each half of `received`, and one for `whole` where others write it
    float* parts;           // [kWarps][8][kChunk + 4]
    float* received;        // [2][kHalf]: [kCluster][kOneHopRows][width], or [kCluster][share of v]
    float* whole;           // [8][kChunk]: summed over the cluster
    float* kept;            // the same, of the exchange before, where a staged rank takes two
    float* v;               // [8][kMaxRank + 4]: of every rank, where they take several exchanges
    unsigned char* stages;  // [kWarps][STAGES]: slots of B and y
    u32 uses;               // exchanges so far: half = uses % 2, parity of its barrier = uses / 2 % 2
    u32 hops;               // of these, in two hops: parity of the third barrier
    bool joined;            // the other blocks of the cluster are known to run
};

// Ranks of a staged rank's second exchange, where it takes two: whole groups of four runs.
constexpr CUPY_LORA_DEVICE int rest_of(int rank) {
    const int rest = slot_rank(rank) ? rank - chunk_of(rank) : 0;
    return rest <= 0 ? 0 : rest <= 32 ? 32 : 64;
}

// What a second hop takes, in stores of a block: about 450 cycles (the first is one store a cycle: 690 for 32, 2000 for
// 1024). One hop takes kCluster stores for four ranks of a row, two hops two.
constexpr int kHopStores = 400;
// Most rows of a tile whose parts take one hop.
constexpr CUPY_LORA_DEVICE int one_hop_rows(int width) {
    const int rows = kCluster <= 2 || width == 0 ? 8 : 4 * kHopStores / (width * (kCluster - 2));
    return rows < 8 ? rows : 8;
}
template <int kWidth>
constexpr int kOneHopRows = one_hop_rows(kWidth);

// Floats that the others write in one exchange. A half is as long as that of the widest one: an exchange of another
// width must not reach into the one before, which a slower block may still read.
constexpr CUPY_LORA_DEVICE int half_of(int width) {
    const int one = kCluster * one_hop_rows(width) * width, two = one_hop_rows(width) != 8 ? 8 * width : 0;
    return one > two ? one : two;
}
constexpr CUPY_LORA_DEVICE int widest_half() {
    int widest = kAnyRank ? half_of(kAnyChunk) : 0;
    for (int i = 0; i < kRankCount; ++i) {
        const int half = half_of(chunk_of(kRanks[i])), rest = half_of(rest_of(kRanks[i]));
        widest = half > widest ? half : widest;
        widest = rest > widest ? rest : widest;
    }
    return widest;
}
constexpr int kHalf = widest_half();
constexpr int kReceivedBytes = kCluster > 1 ? 2 * kHalf * 4 : 0;
// Whether a tile may take two hops.
constexpr CUPY_LORA_DEVICE bool any_two_hops() {
    bool any = kAnyRank && one_hop_rows(kAnyChunk) != 8;
    for (int i = 0; i < kRankCount; ++i) {
        any |= one_hop_rows(chunk_of(kRanks[i])) != 8 || one_hop_rows(rest_of(kRanks[i])) != 8;
    }
    return any;
}
constexpr int kExchangeBarriers = any_two_hops() ? 3 : 2;
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
    u32 uses, hops;
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
    ex.hops = state.hops;
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
    start_barriers(shared, kExchangeBarriers);
    return exchange_at(shared, ExchangeState{0, 0, kCluster == 1});
}

// Whether each lane sums the blocks' parts of its own ranks. Where that takes many loads, the block sums them
// once instead, at the price of one more barrier.
template <int kWidth>
constexpr bool kReadParts = kCluster > 1 && kCluster* kWidth <= 128 && kOneHopRows<kWidth> == 8;

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
        return *reinterpret_cast<const float4*>(ex.received + half * kHalf +
                                                (block * kOneHopRows<kWidth> + token) * kWidth + rank);
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

CUPY_LORA_DEVICE void send_quad(float* to, float4 v, u64* barrier, int peer) {
    const uint4 bits =
        make_uint4(__float_as_uint(v.x), __float_as_uint(v.y), __float_as_uint(v.z), __float_as_uint(v.w));
    ptx::store_async_16(ptx::map_shared(to, peer), bits, ptx::map_shared(barrier, peer));
}

// ---- two hops: of v's quads (at most kQuads), block b sums the b-th share
//
// Whoever has all of v knows that each block is done with the v before (it has sent its parts since) and with its
// shares (one thread read each for all). So both may be written for the next tile at once.

// Quads of this block's share.
template <int kQuads>
CUPY_LORA_DEVICE int own_share(int quads) {
    constexpr int kShare = kQuads / kCluster;
    static_assert(kQuads % kCluster == 0, "the shares are whole quads");
    const int left = quads - static_cast<int>(blockIdx.x % kCluster) * kShare;
    return left < 0 ? 0 : left > kShare ? kShare : left;
}

// By one thread: what the two barriers will count.
template <int kQuads>
CUPY_LORA_DEVICE void expect_shares(u64* gathered, u64* spread, int quads) {
    ptx::mbarrier_expect(gathered, static_cast<u32>(own_share<kQuads>(quads) * 16 * kCluster));
    ptx::mbarrier_expect(spread, static_cast<u32>(quads * 16));
}

// part(quad): of this block. `shares`: [kCluster][share]; `whole` gets all of v.
template <int kQuads, class Part, class Meanwhile>
CUPY_LORA_DEVICE void exchange_shares(u64* gathered, u32 gathered_parity, u64* spread, u32 spread_parity, float* shares,
                                      float* whole, int quads, const Part& part, const Meanwhile& meanwhile) {
    constexpr int kShare = kQuads / kCluster;
    const int block = static_cast<int>(blockIdx.x % kCluster), thread = static_cast<int>(threadIdx.x);
#pragma unroll 1
    for (int first = 0; first < kQuads; first += kThreads) {  // a constant: for 8 rows it is one turn
        const int e = first + thread;
        if (e < quads) send_quad(shares + (block * kShare + e % kShare) * 4, part(e), gathered, e / kShare);
    }
    const int mine = own_share<kQuads>(quads);
    ptx::mbarrier_wait(gathered, gathered_parity);
#pragma unroll 1
    for (int first = 0; first < kQuads; first += kThreads) {
        const int item = first + thread, e = item / kCluster, peer = item % kCluster;
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
        if (e < mine && peer == 0) {
            sum = tree_sum<kCluster>(
                [&](int from) { return *reinterpret_cast<const float4*>(shares + (from * kShare + e) * 4); });
        }
        const auto to_peers = [&](float v) { return __shfl_sync(0xffffffffu, v, thread % 32 - peer); };
        sum = make_float4(to_peers(sum.x), to_peers(sum.y), to_peers(sum.z), to_peers(sum.w));
        if (e < mine) send_quad(whole + (block * kShare + e) * 4, sum, spread, peer);
    }
    meanwhile();
    ptx::mbarrier_wait(spread, spread_parity);
}

// ---- the exchange of a tile of 8 rows
// Ahead of it, while x and A are on their way: the barriers learn what they will count, and the other blocks are known
// to run. `kWidth` and `rows` are those of exchange_parts.
template <int kWidth>
CUPY_LORA_DEVICE void open_exchange(Exchange& ex, int rows) {
    if constexpr (kCluster > 1) {
        u64* const barrier = ex.barriers + (ex.uses & 1);
        if (threadIdx.x == 0) {
            if (kOneHopRows<kWidth> != 8 && rows > kOneHopRows<kWidth>) {
                expect_shares<2 * kWidth>(barrier, ex.barriers + 2, rows * (kWidth / 4));
            } else {
                ptx::mbarrier_expect(barrier, static_cast<u32>(rows * kWidth * 4 * kCluster));
            }
        }
        if (!ex.joined) {
            ptx::cluster_wait();
            ex.joined = true;
        }
    }
}

// In one hop: each quad of this block's part by the threads that send it to all, each to some.
template <int kWidth>
CUPY_LORA_DEVICE void send_parts(const Exchange& ex, u32 half, int rows) {
    constexpr int kQuads = 2 * kWidth, kFit = kThreads / kQuads > 0 ? kThreads / kQuads : 1;
    constexpr int kSenders = kFit < kCluster ? kFit : kCluster, kEach = kCluster / kSenders;
    const int block = static_cast<int>(blockIdx.x % kCluster);
    float* const mine = ex.received + half * kHalf + block * kOneHopRows<kWidth> * kWidth;
#pragma unroll
    for (int first = 0; first < kQuads * kSenders; first += kThreads) {
        const int item = first + static_cast<int>(threadIdx.x);
        const int quad = item % kQuads, sender = item / kQuads;
        const int token = quad / (kWidth / 4), rank = quad % (kWidth / 4) * 4;
        if (sender < kSenders && token < rows) {
            const float4 sum = part_sum<kWidth>(ex, token, rank);
#pragma unroll
            for (int i = 0; i < kEach; ++i) {
                send_quad(mine + token * kWidth + rank, sum, ex.barriers + half, sender * kEach + i);
            }
        }
    }
}

// After this block's parts are in shared memory and the block has synchronised: sends their sum to the
// cluster and waits for the others'. `kWidth` is the caller's chunk (at most kChunk). `meanwhile` is called once this
// block's are on their way.
template <int kWidth, class Meanwhile>
CUPY_LORA_DEVICE void exchange_parts(Exchange& ex, int rows, const Meanwhile& meanwhile) {
    if constexpr (kCluster > 1) {
        const u32 half = ex.uses & 1, parity = ex.uses >> 1 & 1;
        ++ex.uses;
        u64* const barrier = ex.barriers + half;
        if constexpr (kOneHopRows<kWidth> != 8) {
            static_assert(!kReadParts<kWidth>, "what takes two hops is read from `whole`");
            if (rows > kOneHopRows<kWidth>) {
                const auto part = [&](int quad) {
                    return part_sum<kWidth>(ex, quad / (kWidth / 4), quad % (kWidth / 4) * 4);
                };
                exchange_shares<2 * kWidth>(barrier, parity, ex.barriers + 2, ex.hops & 1, ex.received + half * kHalf,
                                            ex.whole, rows * (kWidth / 4), part, meanwhile);
                ++ex.hops;
                return;
            }
        }
        send_parts<kWidth>(ex, half, rows);
        meanwhile();
        ptx::mbarrier_wait(barrier, parity);
        if constexpr (!kReadParts<kWidth>) {
            sum_quads<kWidth>(ex, rows, ex.whole,
                              [&](int token, int rank) { return received<kWidth>(ex, half, token, rank); });
        }
    } else {
        meanwhile();
        sum_quads<kWidth>(ex, rows, ex.whole, [&](int token, int rank) { return part_sum<kWidth>(ex, token, rank); });
    }
}

template <int kWidth>
CUPY_LORA_DEVICE void exchange_parts(Exchange& ex, int rows) {
    exchange_parts<kWidth>(ex, rows, [] {});
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
