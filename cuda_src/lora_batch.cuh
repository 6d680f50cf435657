// The token-to-adapter schedule of one step: tiles of rows that share a slot. Its kernel is in lora_batch.cu;
// decode_step (metadata.cu) builds it in the blocks of its own launch.
//
//   in    a slot per token (SEGMENTS=0), or segments of tokens with a slot each (SEGMENTS=1)
//   out   for each height M of HEIGHTS: tile_count, and tiles of 8 + M ints
//         [slot, rows, 6 unused, row numbers (those past `rows` are not written)]
//
// Tiles are ordered by slot, rows within a slot by number: the same input gives the same lists. Tokens
// whose slot is not in [0, slots) are in no tile.
//
// Grid: one block of THREADS for each 256 tokens, no block waits for another: each counts the tokens of every
// slot in the whole batch (32 KB of indices at 8192 tokens, from L2) and then places its own 256.
//   1. count[slot], before[slot] (of tokens ahead of this block's), shared atomics by one: the hardware adds
//      those of a warp that meet in one slot at once. A block alone has one index a thread instead, and notes how
//      many of a slot each of its 8 warps has, in a byte each
//   2. base[h][slot]: tiles of lower slots, a block-wide scan for all heights at once
//   3. a token's place in its slot: before + the tokens of this block ahead of it
//
// Shared memory (ints): mine [256] | scan [heights][32] | count [slots], before [slots] or by warp: 8 bytes [slots]
// | base [heights][slots]
#pragma once

#include "common.cuh"

__device__ constexpr int kHeights[] = {HEIGHTS};
constexpr int kHeightCount = sizeof(kHeights) / sizeof(int);
constexpr int kThreads = THREADS;
constexpr int kPlaced = 256;  // tokens of a block
constexpr int kInFlight = 8;  // indices that a thread reads at once

#if INDEX_64
using Index = i64;
#else
using Index = i32;
#endif
#if POINTER_64
using Pointer = i64;
#else
using Pointer = i32;
#endif

// Where the lists go: the addresses and the capacities (in tiles) of each height.
struct Lists {
    i32* tiles[kHeightCount];
    i32 capacity[kHeightCount];
};

// Segment of a token: the last one that starts at or before it.
CUPY_LORA_DEVICE int segment_of(const Pointer* starts, int segments, i64 token) {
    int low = 0, high = segments;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (starts[middle] <= token) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

// Height H of a token in place `place` of the `total` tokens of its slot.
template <int H>
CUPY_LORA_DEVICE void put(const Lists& lists, const int* base, int slot, int place, int total, int token) {
    constexpr int kRows = kHeights[H];
    const int tile = base[slot] + place / kRows, at = place % kRows;
    if (tile >= lists.capacity[H]) return;
    i32* const record = lists.tiles[H] + static_cast<i64>(tile) * (8 + kRows);
    record[8 + at] = token;
    if (at == 0) {
        const int rows = total - place < kRows ? total - place : kRows;
        *reinterpret_cast<int2*>(record) = make_int2(slot, rows);
    }
}

template <int H = 0>
CUPY_LORA_DEVICE void put_all(const Lists& lists, const int* base, int slots, int slot, int place, int total,
                              int token) {
    if constexpr (H < kHeightCount) {
        put<H>(lists, base + H * slots, slot, place, total, token);
        put_all<H + 1>(lists, base, slots, slot, place, total, token);
    }
}

template <int H = 0>
CUPY_LORA_DEVICE void tiles_of(int (&tiles)[kHeightCount], int tokens) {
    if constexpr (H < kHeightCount) {
        tiles[H] += ceil_div(tokens, kHeights[H]);
        tiles_of<H + 1>(tiles, tokens);
    }
}

// The sum of the bytes of the warps below `warp`, each at most 32.
CUPY_LORA_DEVICE int sum_bytes(uint2 by_warp, int warp = 8) {
    if (warp < 8) by_warp.y &= warp <= 4 ? 0u : (1u << 8 * (warp - 4)) - 1;
    if (warp < 4) by_warp.x &= (1u << 8 * warp) - 1;
    constexpr u32 kEven = 0x00ff00ffu;
    const u32 pairs = (by_warp.x & kEven) + (by_warp.x >> 8 & kEven) + (by_warp.y & kEven) + (by_warp.y >> 8 & kEven);
    return static_cast<int>((pairs + (pairs >> 16)) & 0xffffu);
}

// One block's share: the tokens from 256 * block on.
CUPY_LORA_DEVICE void build_tiles_block(unsigned char* shared, int block, const Index* __restrict__ slot_of,
                                        const Pointer* __restrict__ indptr, i32 segments, i32 tokens, i32 slots,
                                        const Lists& lists, i32* __restrict__ tile_count) {
    int* const mine = reinterpret_cast<int*>(shared);
    int* const scan = mine + kPlaced;
    int* const count = scan + kHeightCount * 32;
    int* const before = count + slots;
    int* const base = before + slots;
    uint2* const by_warp = reinterpret_cast<uint2*>(count);  // of a block alone
    const bool alone = tokens <= kPlaced;
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
    const int first = block * kPlaced;
    const bool places = thread < kPlaced && first + thread < tokens;  // has a token of its own
    // This thread's own, ahead of all else: it is the longest wait.
    int slot = -1;
    if (places) {
#if SEGMENTS
        const i64 token = first + thread;
        const int s = segments > 0 ? segment_of(indptr, segments, token) : 0;
        const i64 adapter = segments > 0 && indptr[s] <= token && token < indptr[s + 1] ? slot_of[s] : -1;
#else
        const i64 adapter = slot_of[first + thread];
#endif
        if (adapter >= 0 && adapter < slots) slot = static_cast<int>(adapter);
    }
    for (int s = thread; s < 2 * slots; s += kThreads) count[s] = 0;
    __syncthreads();

    // 1. tokens of each slot
    const u32 peers = __match_any_sync(0xffffffffu, slot);
    const int ahead = __popc(peers & ((1u << lane) - 1));  // of the same slot in this warp
    if (alone) {
        if (slot >= 0 && ahead == 0) atomicAdd(count + 2 * slot + warp / 4, __popc(peers) << 8 * (warp % 4));
    } else {
#if SEGMENTS
        for (int s = thread; s < segments; s += kThreads) {
            const i64 start = indptr[s] < 0 ? 0 : static_cast<i64>(indptr[s]);
            const i64 stop = indptr[s + 1] > tokens ? tokens : static_cast<i64>(indptr[s + 1]);
            const i64 adapter = slot_of[s];
            if (adapter >= 0 && adapter < slots && start < stop) {
                atomicAdd(count + adapter, static_cast<int>(stop - start));
                if (start < first) atomicAdd(before + adapter, static_cast<int>((stop < first ? stop : first) - start));
            }
        }
#else
        for (int start = thread; start < tokens; start += kInFlight * kThreads) {
            i64 adapter[kInFlight];
#pragma unroll
            for (int i = 0; i < kInFlight; ++i) {
                const int token = start + i * kThreads;
                adapter[i] = token < tokens ? static_cast<i64>(slot_of[token]) : -1;
            }
#pragma unroll
            for (int i = 0; i < kInFlight; ++i) {
                if (adapter[i] >= 0 && adapter[i] < slots) {
                    atomicAdd(count + adapter[i], 1);
                    if (start + i * kThreads < first) atomicAdd(before + adapter[i], 1);
                }
            }
        }
#endif
        if (thread < kPlaced) mine[thread] = slot;
    }
    __syncthreads();
    const auto tokens_of = [&](int s) { return alone ? sum_bytes(by_warp[s]) : count[s]; };

    // 2. tiles of lower slots: each thread sums a run of slots, the runs are scanned over the block
    const int run = ceil_div(slots, kThreads);
    const int run_first = thread * run, run_end = run_first + run < slots ? run_first + run : slots;
    int own[kHeightCount], upto[kHeightCount];
#pragma unroll
    for (int h = 0; h < kHeightCount; ++h) own[h] = 0;
    for (int s = run_first; s < run_end; ++s) tiles_of(own, tokens_of(s));
#pragma unroll
    for (int h = 0; h < kHeightCount; ++h) {
        upto[h] = own[h];
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const int lower = __shfl_up_sync(0xffffffffu, upto[h], step);
            if (lane >= step) upto[h] += lower;
        }
        if (lane == 31) scan[h * 32 + warp] = upto[h];
    }
    __syncthreads();
    int next[kHeightCount];
#pragma unroll
    for (int h = 0; h < kHeightCount; ++h) {
        next[h] = upto[h] - own[h];
        for (int w = 0; w < warp; ++w) next[h] += scan[h * 32 + w];
        if (block == 0 && thread == kThreads - 1) tile_count[h] = next[h] + own[h];
    }
    for (int s = run_first; s < run_end; ++s) {
#pragma unroll
        for (int h = 0; h < kHeightCount; ++h) base[h * slots + s] = next[h];
        tiles_of(next, tokens_of(s));
    }
    __syncthreads();

    // 3. this block's tokens
    if (slot < 0) return;
    int place = ahead;
    if (alone) {
        place += sum_bytes(by_warp[slot], warp);
    } else {
        place += before[slot];
#pragma unroll 8
        for (int other = 0; other < 32 * warp; other += 4) {
            const int4 four = *reinterpret_cast<const int4*>(mine + other);
            place += (four.x == slot) + (four.y == slot) + (four.z == slot) + (four.w == slot);
        }
    }
    put_all(lists, base, slots, slot, place, tokens_of(slot), first + thread);
}
