// What decode and prefill have in common: sequences and their pages, the shape of the online softmax, prefix sums.
//
// Configuration by macros: ELEMENT (bf16 or f16), DIM (a multiple of 16), HEADS (of keys), GROUP (query heads of
// a key head), PAGE (tokens of a page), WARPS, TILE (keys of a tile), STAGES, ROPE, SOFT_CAP, WINDOW, VECTORS
// (queries and output can be moved 16 bytes at a time).
#pragma once
#include "rope.cuh"

constexpr int PIECES = DIM / 8;                                      // 16-byte pieces of a row
constexpr int PAIRS = DIM / 2;                                       // that RoPE rotates
constexpr i64 PAGE_SIDE = static_cast<i64>(HEADS) * PAGE * DIM * 2;  // from a page's keys to its values, one layer
constexpr float LOG2E = 1.44269504088896f;
constexpr float LN2 = 0.693147180559945f;
// A row's base of exponents follows its maximum only when that is 2^this above it. Until then weights exceed 1, which
// costs nothing: float32 and bfloat16 keep their precision, and float16 has the range.
constexpr float SLACK = 8.f;

static_assert(DIM % 16 == 0 && TILE % 16 == 0, "fragments of 16");

using Turns = Frequencies<PAIRS>;

CUPY_LORA_DEVICE float minus_infinity() { return __uint_as_float(0xff800000u); }

// ---- sequences and their pages ------------------------------------------------------------------
struct Cache {
    const i64* kv_ptrs;
    const i32* kv_indptr;
    const i32* last_page_offset;
    i32 num_ptrs;
};

// Tokens of a sequence; 0 for one without pages or with tables out of range, of which nothing is read.
CUPY_LORA_DEVICE i32 length_of(const Cache& cache, int sequence) {
    const i32 first = cache.kv_indptr[sequence];
    const i32 end = cache.kv_indptr[sequence + 1];
    const i32 last = cache.last_page_offset[sequence];
    if (first < 0 || end <= first || end > cache.num_ptrs || last < 1 || last > PAGE) return 0;
    return (end - first - 1) * PAGE + last;
}

// The keys of one head of one layer of one sequence.
struct Keys {
    const i64* pages;
    i64 offset;  // bytes from a page's start to the head's keys
    i32 length;
};

CUPY_LORA_DEVICE Keys keys_of(const Cache& cache, i32 first_page, i32 length, i32 layer, int head) {
    const i64 offset = (static_cast<i64>(layer) * 2 * HEADS + head) * (static_cast<i64>(PAGE) * DIM * 2);
    return {cache.kv_ptrs + first_page, offset, length};
}

// Where the page of the key at a position lies; 0 past the end.
CUPY_LORA_DEVICE u64 page_at(const Keys& keys, i32 position) {
    return position < keys.length ? static_cast<u64>(keys.pages[static_cast<u32>(position) / PAGE]) : 0;
}

// Where the key at a position of a page lies; 0 in a page that cannot be one (its keys count as zeros).
CUPY_LORA_DEVICE u64 address_in(const Keys& keys, u64 page, i32 position) {
    if (page == 0 || page % 16 != 0) return 0;
    return page + static_cast<u64>(keys.offset) + (static_cast<u32>(position) % PAGE) * (DIM * 2u);
}

CUPY_LORA_DEVICE u64 key_address(const Keys& keys, i32 position) {
    return address_in(keys, page_at(keys, position), position);
}

// ---- the online softmax -------------------------------------------------------------------------
CUPY_LORA_DEVICE float quad_max(float v) {
    v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 1));
    return fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 2));
}

CUPY_LORA_DEVICE float quad_sum(float v) {
    v += __shfl_xor_sync(0xffffffffu, v, 1);
    return v + __shfl_xor_sync(0xffffffffu, v, 2);
}

CUPY_LORA_DEVICE float tanh_of(float v) { return 1.f - __fdividef(2.f, 1.f + ptx::exp2_approx(v * (2.f * LOG2E))); }

// Cuts the next piece off the shared memory.
template <class T>
CUPY_LORA_DEVICE T* carve(u8*& shared, int count) {
    T* const piece = reinterpret_cast<T*>(shared);
    shared += (count * static_cast<int>(sizeof(T)) + 15) / 16 * 16;
    return piece;
}

// ---- which work is this block's -----------------------------------------------------------------
// Exclusive prefix sum over the threads of the block; total: of all. scratch: a value a warp, free again on return.
template <int WARPS_OF_BLOCK, class N>
CUPY_LORA_DEVICE N scan(N value, N* scratch, N& total) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int warp = static_cast<int>(threadIdx.x) / 32;
    N sum = value;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const N other = __shfl_up_sync(0xffffffffu, sum, distance);
        if (lane >= distance) sum += other;
    }
    if (lane == 31) scratch[warp] = sum;
    __syncthreads();
    N before = 0;
    total = 0;
#pragma unroll
    for (int w = 0; w < WARPS_OF_BLOCK; ++w) {
        if (w < warp) before += scratch[w];
        total += scratch[w];
    }
    __syncthreads();
    return before + sum - value;
}
