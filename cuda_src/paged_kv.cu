// Keys and values of a batch into the pages of their sequences.
//
//   page(i, p) = kv_ptrs[kv_indptr[i] + p], a block [layers, 2, HEADS, PAGE, DIM], keys at 0, values at 1
//   length(i)  = (kv_indptr[i + 1] - kv_indptr[i] - 1) * PAGE + last_page_offset[i], 0 without pages
//   append_kv: row i of k and v (batch, HEADS, DIM) -> position length(i) - 1 of sequence i
//   init_kv:   rows seqlen_indptr[i] .. seqlen_indptr[i + 1] - 1 -> the last positions of sequence i
//
// With ROPE the keys are rotated by their positions on the way (in float32, rounded to ELEMENT once); a thread then
// holds both vectors of a pair, half a row apart. Otherwise elements are moved as bytes. ROW_BYTES = DIM * size of an
// element, a multiple of 16, with ROPE of 32.
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
#include "rope.cuh"
#include "vectors.cuh"

constexpr int ROW_VECS = ROW_BYTES / 16;     // vectors of one head
constexpr int VECS = HEADS * ROW_VECS;       // vectors of a token's keys
constexpr int LANES = WARPS_PER_TOKEN * 32;  // threads of a token
constexpr int TOKENS = BLOCK / LANES;        // of a block
constexpr int ROUND = LANES * BATCH;         // vectors moved at a time
constexpr int ROUNDS = ceil_div(2 * VECS, ROUND);
constexpr i64 HALF_BYTES = static_cast<i64>(HEADS) * PAGE * ROW_BYTES;  // a page's keys of one layer

static_assert(ROW_BYTES % 16 == 0, "16-byte vectors");
static_assert(!ROPE || (ROW_BYTES % 32 == 0 && BATCH % 2 == 0), "whole pairs of vectors");
static_assert(BLOCK % LANES == 0, "whole tokens a block");

// The entries of a sequence in the tables.
struct Tables {
    i32 first;  // its pages in kv_ptrs
    i32 end;
    i32 last;  // tokens in the last page
};

CUPY_LORA_DEVICE Tables tables_of(const i32* kv_indptr, const i32* last_page_offset, int sequence) {
    return {kv_indptr[sequence], kv_indptr[sequence + 1], last_page_offset[sequence]};
}

// Vector b of a thread's batch: a number among the token's keys, then values.
CUPY_LORA_DEVICE int vector_of(int round, int b, int lane) {
    if constexpr (!ROPE) return round * ROUND + b * LANES + lane;
    constexpr int HALF = ROW_VECS > 1 ? ROW_VECS / 2 : 1;  // 1: a row of one vector is not rotated
    const int pair = round * (ROUND / 2) + b / 2 * LANES + lane;
    return pair / HALF * ROW_VECS + pair % HALF + b % 2 * HALF;
}

// Where a token goes: the start of its row of head 0 in the keys of the layer, or null for nowhere.
struct Place {
    u8* row;
    u32 position;
};

// Positions that the pages of a sequence hold; 0 where the tables are wrong.
CUPY_LORA_DEVICE i64 length_of(const Tables& of, i32 num_ptrs) {
    const bool pages = (of.first >= 0) & (of.end > of.first) & (of.end <= num_ptrs);
    const bool fine = pages & (of.last >= 1) & (of.last <= PAGE);
    return fine ? static_cast<i64>(of.end - of.first - 1) * PAGE + of.last : 0;
}

CUPY_LORA_DEVICE Place place_at(const i64* kv_ptrs, i32 first, u32 position, i32 layer) {
    const u64 page = static_cast<u64>(kv_ptrs[first + static_cast<i32>(position / PAGE)]);
    if (page == 0 || page % 16 != 0) return {nullptr, 0};
    return {reinterpret_cast<u8*>(page) + layer * 2 * HALF_BYTES + (position % PAGE) * ROW_BYTES, position};
}

#if ROPE
using Turns = Frequencies<ROW_BYTES / static_cast<int>(sizeof(ELEMENT)) / 2>;

// Vector `vector` of a row (of its first half) and the one half a row on.
CUPY_LORA_DEVICE void rotate(Vector& low, Vector& high, int vector, u32 position, const Turns& frequencies) {
    constexpr int ELEMENTS = 16 / static_cast<int>(sizeof(ELEMENT));
    Vec<ELEMENT, ELEMENTS>& a = *reinterpret_cast<Vec<ELEMENT, ELEMENTS>*>(&low);
    Vec<ELEMENT, ELEMENTS>& b = *reinterpret_cast<Vec<ELEMENT, ELEMENTS>*>(&high);
#pragma unroll
    for (int i = 0; i < ELEMENTS; ++i) {
        const float2 angle = angle_at(frequencies.turns[vector * ELEMENTS + i], position);
        const float x = to_float(a.v[i]);
        const float y = to_float(b.v[i]);
        a.v[i] = from_float<ELEMENT>(x * angle.x - y * angle.y);
        b.v[i] = from_float<ELEMENT>(y * angle.x + x * angle.y);
    }
}
#define ROPE_PARAMETER , const Turns frequencies
#define ROPE_ARGUMENT , frequencies
#else
#define ROPE_PARAMETER
#define ROPE_ARGUMENT
#endif

// One token's keys and values: loaded first, so that the loads do not wait for the tables.
template <class Find>
CUPY_LORA_DEVICE void move_token(const u8* k, const u8* v, int lane, Find find ROPE_PARAMETER) {
    Place to = {nullptr, 0};
#pragma unroll 1
    for (int round = 0; round < ROUNDS; ++round) {
        Vector held[BATCH];
#pragma unroll
        for (int b = 0; b < BATCH; ++b) {
            const int e = vector_of(round, b, lane);
            if (2 * VECS % ROUND == 0 || e < 2 * VECS) {
                held[b] = load_16<ACCESS>(e < VECS ? k + e * 16 : v + (e - VECS) * 16);
            }
        }
        if (round == 0) to = find();
        if (to.row == nullptr) return;
#if ROPE
#pragma unroll
        for (int b = 0; b < BATCH; b += 2) {
            const int e = vector_of(round, b, lane);
            if (e < VECS) rotate(held[b], held[b + 1], e % ROW_VECS, to.position, frequencies);
        }
#endif
#pragma unroll
        for (int b = 0; b < BATCH; ++b) {
            const int e = vector_of(round, b, lane);
            if (2 * VECS % ROUND == 0 || e < 2 * VECS) {
                const int head = e / ROW_VECS;  // 0 .. HEADS - 1 keys, HEADS .. values: pages have the same order
                u8* const row = to.row + static_cast<i64>(head) * (PAGE * ROW_BYTES) + (e % ROW_VECS) * 16;
                *reinterpret_cast<uint4*>(row) = held[b].quad;
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK)
    append_kv(const i64* kv_ptrs, const i32* kv_indptr, const i32* last_page_offset, const u8* k, const u8* v,
              i64 k_stride, i64 v_stride, i32 num_ptrs, i32 batch, i32 layer ROPE_PARAMETER) {
    ptx::begin_launch();
    const int token = static_cast<int>(blockIdx.x) * TOKENS + static_cast<int>(threadIdx.x) / LANES;
    if (token >= batch) return;
    const int lane = static_cast<int>(threadIdx.x) % LANES;
    move_token(k + token * k_stride, v + token * v_stride, lane, [&]() -> Place {
        const Tables tables = tables_of(kv_indptr, last_page_offset, token);
        const i64 length = length_of(tables, num_ptrs);
        if (length == 0) return {nullptr, 0};
        return place_at(kv_ptrs, tables.first, static_cast<u32>(length - 1), layer);
    } ROPE_ARGUMENT);
}

// Where a token's sequence has its pages in kv_ptrs (-1: the token is not to be written), and its position.
struct Spot {
    i32 first;
    u32 position;
};

// The same in all lanes of the warp. The sequence is the first whose rows end behind the token. Each step cuts the
// ends that are left into 32 parts; once there is a lane for each sequence that it can be, all that the tables say
// of them is read at once: one trip to memory for 32 sequences instead of two. A table out of order ends too.
CUPY_LORA_DEVICE Spot spot_of(const i32* seqlen_indptr, const i32* kv_indptr, const i32* last_page_offset, i32 num_ptrs,
                              int batch, int tokens, int token) {
    const i32* const ends = seqlen_indptr + 1;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    int begin = 0;  // ends[begin - 1] <= token < ends[begin + left]
    int left = batch;
    while (left + (begin + left < batch) > 32) {
        const int stride = (left + 31) / 32;
        const int last = begin + (lane + 1) * stride - 1;  // the last entry of this lane's part
        const bool below = last < begin + left && ends[last] <= token;
        const int skipped = __popc(__ballot_sync(0xffffffffu, below)) * stride;
        begin += skipped;
        left = left - skipped < stride - 1 ? left - skipped : stride - 1;
    }
    const int mine = begin + lane < batch ? begin + lane : batch - 1;
    const i32 start = seqlen_indptr[mine], end = ends[mine];
    const Tables tables = tables_of(kv_indptr, last_page_offset, mine);
    const bool below = lane <= left && begin + lane < batch && end <= token;
    const int owner = __popc(__ballot_sync(0xffffffffu, below));
    const i64 length = length_of(tables, num_ptrs);
    const bool rows = (start >= 0) & (token >= start) & (token < end) & (end <= tokens) & (owner < 32);
    const i32 first = rows && end - start <= length ? tables.first : -1;
    const u32 position = static_cast<u32>(length) - static_cast<u32>(end - token);
    return {__shfl_sync(0xffffffffu, first, owner), __shfl_sync(0xffffffffu, position, owner)};
}

extern "C" __global__ void __launch_bounds__(BLOCK)
    init_kv(const i64* kv_ptrs, const i32* kv_indptr, const i32* last_page_offset, const u8* k, const u8* v,
            const i32* seqlen_indptr, i64 k_stride, i64 v_stride, i32 num_ptrs, i32 batch, i32 tokens,
            i32 layer ROPE_PARAMETER) {
    ptx::begin_launch();
    const int token = static_cast<int>(blockIdx.x) * TOKENS + static_cast<int>(threadIdx.x) / LANES;
    if (token >= tokens) return;
    const int lane = static_cast<int>(threadIdx.x) % LANES;
    move_token(k + token * k_stride, v + token * v_stride, lane, [&]() -> Place {
        const Spot spot = spot_of(seqlen_indptr, kv_indptr, last_page_offset, num_ptrs, batch, tokens, token);
        return spot.first < 0 ? Place{nullptr, 0} : place_at(kv_ptrs, spot.first, spot.position, layer);
    } ROPE_ARGUMENT);
}
