// Keys and values of a batch into the pages of their sequences.
//
//   page(i, p) = kv_ptrs[kv_indptr[i] + p], a block [layers, 2, HEADS, PAGE, DIM], keys at 0, values at 1
//   length(i)  = (kv_indptr[i + 1] - kv_indptr[i] - 1) * PAGE + last_page_offset[i], 0 without pages
//   append_kv: row i of k and v (batch, HEADS, DIM) -> position length(i) - 1 of sequence i
//   init_kv:   rows seqlen_indptr[i] .. seqlen_indptr[i + 1] - 1 -> the last positions of sequence i
//
// Elements are moved as bytes: ROW_BYTES = DIM * size of an element, a multiple of 16.
//
// Threads: WARPS_PER_TOKEN warps carry one token's keys and values as 16-byte vectors, 2 * HEADS *
// ROW_BYTES / 16 of them, BATCH a thread at a time, all loaded before the token's page is known. In
// init_kv each warp finds the sequence of its token by itself, 32 entries of seqlen_indptr a step.
// No shared memory, no barrier.
//
// Tables in device memory are not trusted: a token whose page is not in the table, is 0 or not
// 16-byte aligned, or whose sequence has a last_page_offset out of 1 .. PAGE or fewer positions than
// tokens, is not written.
//
// Preconditions: k and v rows are (HEADS, DIM) contiguous, row strides and addresses multiples of
// ACCESS bytes; no two sequences share a page.
#include "common.cuh"

constexpr int ROW_VECS = ROW_BYTES / 16;                   // vectors of one head
constexpr int VECS = HEADS * ROW_VECS;                     // vectors of a token's keys
constexpr int LANES = WARPS_PER_TOKEN * 32;                // threads of a token
constexpr int TOKENS = BLOCK / LANES;                      // of a block
constexpr int ROUND = LANES * BATCH;                       // vectors moved at a time
constexpr int ROUNDS = ceil_div(2 * VECS, ROUND);
constexpr i64 HALF_BYTES = static_cast<i64>(HEADS) * PAGE * ROW_BYTES;  // a page's keys of one layer

static_assert(ROW_BYTES % 16 == 0, "16-byte vectors");
static_assert(BLOCK % LANES == 0, "whole tokens a block");

union Vector {
    uint4 quad;
    uint2 pairs[2];
    u32 words[4];
    u16 halves[8];
};

CUPY_LORA_DEVICE Vector load_vector(const u8* p) {
    Vector v;
    if constexpr (ACCESS == 16) {
        v.quad = *reinterpret_cast<const uint4*>(p);
    } else if constexpr (ACCESS == 8) {
#pragma unroll
        for (int i = 0; i < 2; ++i) v.pairs[i] = reinterpret_cast<const uint2*>(p)[i];
    } else if constexpr (ACCESS == 4) {
#pragma unroll
        for (int i = 0; i < 4; ++i) v.words[i] = reinterpret_cast<const u32*>(p)[i];
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) v.halves[i] = reinterpret_cast<const u16*>(p)[i];
    }
    return v;
}

// Where a token goes: the start of its row of head 0 in the keys of the layer, or null for nowhere.
// `back` counts from the end of the sequence, 0 = its last position; `tokens` must fit in its pages.
CUPY_LORA_DEVICE u8* destination(const i64* kv_ptrs, i32 num_ptrs, const i32* kv_indptr,
                                 const i32* last_page_offset, i32 layer, int sequence, i32 back, i32 tokens) {
    const i32 first = kv_indptr[sequence];
    const i32 end = kv_indptr[sequence + 1];
    const i32 last = last_page_offset[sequence];
    if (first < 0 || end <= first || end > num_ptrs || last < 1 || last > PAGE) return nullptr;
    const i64 length = static_cast<i64>(end - first - 1) * PAGE + last;
    if (tokens > length) return nullptr;
    const u32 position = static_cast<u32>(length - 1 - back);
    const u64 page = static_cast<u64>(kv_ptrs[first + static_cast<i32>(position / PAGE)]);
    if (page == 0 || page % 16 != 0) return nullptr;
    return reinterpret_cast<u8*>(page) + layer * 2 * HALF_BYTES + (position % PAGE) * ROW_BYTES;
}

// One token's keys and values: loaded first, so that the loads do not wait for the tables.
template <class Find>
CUPY_LORA_DEVICE void move_token(const u8* k, const u8* v, int lane, Find find) {
    u8* to = nullptr;
#pragma unroll 1
    for (int round = 0; round < ROUNDS; ++round) {
        Vector held[BATCH];
#pragma unroll
        for (int b = 0; b < BATCH; ++b) {
            const int e = round * ROUND + b * LANES + lane;
            if (2 * VECS % ROUND == 0 || e < 2 * VECS) {
                held[b] = load_vector(e < VECS ? k + e * 16 : v + (e - VECS) * 16);
            }
        }
        if (round == 0) to = find();
        if (to == nullptr) return;
#pragma unroll
        for (int b = 0; b < BATCH; ++b) {
            const int e = round * ROUND + b * LANES + lane;
            if (2 * VECS % ROUND == 0 || e < 2 * VECS) {
                const int head = e / ROW_VECS;  // 0 .. HEADS - 1 keys, HEADS .. values: pages have the same order
                u8* const row = to + static_cast<i64>(head) * (PAGE * ROW_BYTES) + (e % ROW_VECS) * 16;
                *reinterpret_cast<uint4*>(row) = held[b].quad;
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK) append_kv(const i64* kv_ptrs, const i32* kv_indptr,
                                                              const i32* last_page_offset, const u8* k,
                                                              const u8* v, i64 k_stride, i64 v_stride, i32 num_ptrs,
                                                              i32 batch, i32 layer) {
    const int token = static_cast<int>(blockIdx.x) * TOKENS + static_cast<int>(threadIdx.x) / LANES;
    if (token >= batch) return;
    const int lane = static_cast<int>(threadIdx.x) % LANES;
    move_token(k + token * k_stride, v + token * v_stride, lane, [&] {
        return destination(kv_ptrs, num_ptrs, kv_indptr, last_page_offset, layer, token, 0, 1);
    });
}

// How many of table[0 .. count) are <= key, for an ascending table; the same in all lanes of the warp.
// Each step cuts what is left into 32 parts; a table out of order ends too, with a number of 0 .. count.
CUPY_LORA_DEVICE int count_at_most(const i32* table, int count, int key) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    int begin = 0;  // table[begin - 1] <= key < table[begin + left]
    int left = count;
    while (left > 0) {
        const int stride = (left + 31) / 32;
        const int last = begin + (lane + 1) * stride - 1;  // the last entry of this lane's part
        const bool below = last < begin + left && table[last] <= key;
        const int parts = __popc(__ballot_sync(0xffffffffu, below));
        const int skipped = parts * stride;
        begin += skipped;
        left = left - skipped < stride - 1 ? left - skipped : stride - 1;
    }
    return begin;
}

extern "C" __global__ void __launch_bounds__(BLOCK) init_kv(const i64* kv_ptrs, const i32* kv_indptr,
                                                            const i32* last_page_offset, const u8* k, const u8* v,
                                                            const i32* seqlen_indptr, i64 k_stride, i64 v_stride,
                                                            i32 num_ptrs, i32 batch, i32 tokens, i32 layer) {
    const int token = static_cast<int>(blockIdx.x) * TOKENS + static_cast<int>(threadIdx.x) / LANES;
    if (token >= tokens) return;
    const int lane = static_cast<int>(threadIdx.x) % LANES;
    move_token(k + token * k_stride, v + token * v_stride, lane, [&]() -> u8* {
        const int sequence = count_at_most(seqlen_indptr + 1, batch, token);
        if (sequence >= batch) return nullptr;
        const i32 start = seqlen_indptr[sequence];
        const i32 end = seqlen_indptr[sequence + 1];
        if (start < 0 || token < start || token >= end || end > tokens) return nullptr;
        return destination(kv_ptrs, num_ptrs, kv_indptr, last_page_offset, layer, sequence, end - 1 - token,
                           end - start);
    });
}
