// What brings the operands of attention into shared memory, for decode and prefill: tiles of keys and values from
// the pages by asynchronous copies, several tiles ahead, and queries; rotated by their positions where asked.
//
// Configuration by macros: ELEMENT (bf16 or f16), DIM (a multiple of 16), HEADS (of keys), GROUP (query heads of
// a key head), PAGE (tokens of a page), WARPS, TILE (keys of a tile), STAGES, ROPE, SOFT_CAP, WINDOW, VECTORS
// (queries and output can be moved 16 bytes at a time).
//
// A staged row is DIM elements and 16 bytes of nothing: an odd number of 16-byte pieces a row, so that the
// eight rows of an ldmatrix lie in different banks, without a permutation in the addresses.
#pragma once
#include "rope.cuh"

constexpr int THREADS = 32 * WARPS;
constexpr int PIECES = DIM / 8;               // 16-byte pieces of a row
constexpr int ROW_BYTES = DIM * 2 + 16;       // of a staged row
constexpr int SIDE_BYTES = TILE * ROW_BYTES;  // of a tile's keys, or values
constexpr int STAGE_BYTES = 2 * SIDE_BYTES;
constexpr i64 PAGE_SIDE = static_cast<i64>(HEADS) * PAGE * DIM * 2;  // from a page's keys to its values, one layer
constexpr int PAIRS = DIM / 2;                                       // that RoPE rotates
constexpr int NEAR = 8;                                              // positions of the near table
constexpr int FAR = ceil_div(TILE, NEAR);                            // entries of the far table of one tile
constexpr float LOG2E = 1.44269504088896f;
constexpr float LN2 = 0.693147180559945f;

static_assert(DIM % 16 == 0 && TILE % 16 == 0, "fragments of 16");
static_assert(TILE <= THREADS, "one thread finds the page of a row");
static_assert(TILE * PIECES % THREADS == 0, "whole rounds of copies");

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

CUPY_LORA_DEVICE Keys keys_of(const Cache& cache, int sequence, i32 length, i32 layer, int head) {
    const i64 offset = (static_cast<i64>(layer) * 2 * HEADS + head) * (static_cast<i64>(PAGE) * DIM * 2);
    return {cache.kv_ptrs + cache.kv_indptr[sequence], offset, length};
}

// Where the key at a position lies; 0 past the end and in a page that cannot be one (its keys count as zeros).
CUPY_LORA_DEVICE u64 key_address(const Keys& keys, i32 position) {
    if (position >= keys.length) return 0;
    const u32 at = static_cast<u32>(position);
    const u64 page = static_cast<u64>(keys.pages[at / PAGE]);
    if (page == 0 || page % 16 != 0) return 0;
    return page + static_cast<u64>(keys.offset) + (at % PAGE) * (DIM * 2u);
}

// ---- rotary embedding ---------------------------------------------------------------------------
// A position is a multiple of NEAR and a rest. cos and sin of the angles of the rests are in the near table
// [NEAR][PAIRS], those of the multiples in a far table [..][PAIRS]; their complex product is the angle's.
using Turns = Frequencies<PAIRS>;

// Entry i, pair d: the angle at position first + i * step.
CUPY_LORA_DEVICE void fill_angles(float2* table, int entries, i32 first, i32 step, const Turns& frequencies) {
    for (int e = static_cast<int>(threadIdx.x); e < entries * PAIRS; e += THREADS) {
        table[e] = angle_at(frequencies.turns[e % PAIRS], first + e / PAIRS * step);
    }
}

union Piece {
    uint4 quad;
    u32 words[4];
};

// Rotates staged rows in place: pairs (d, d + DIM / 2). position(row) is that of a row; far holds the entries
// from position NEAR * first_far on.
template <class Position>
CUPY_LORA_DEVICE void rotate_rows(u8* rows, int count, const float2* near, const float2* far, i32 first_far,
                                  Position position) {
    constexpr int UNITS = PIECES / 2;  // pieces of half a row
    for (int e = static_cast<int>(threadIdx.x); e < count * UNITS; e += THREADS) {
        const int row = e / UNITS;
        const int unit = e % UNITS;
        const i32 at = position(row);
        const float4* const rest = reinterpret_cast<const float4*>(near + at % NEAR * PAIRS + unit * 8);
        const float4* const base = reinterpret_cast<const float4*>(far + (at / NEAR - first_far) * PAIRS + unit * 8);
        uint4* const low = reinterpret_cast<uint4*>(rows + row * ROW_BYTES) + unit;
        Piece a = {low[0]};
        Piece b = {low[UNITS]};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float4 r = rest[i];
            const float4 f = base[i];
            const float cos0 = r.x * f.x - r.y * f.y, sin0 = r.y * f.x + r.x * f.y;
            const float cos1 = r.z * f.z - r.w * f.w, sin1 = r.w * f.z + r.z * f.w;
            float a0, a1, b0, b1;
            unpack2(a.words[i], a0, a1, ELEMENT{});
            unpack2(b.words[i], b0, b1, ELEMENT{});
            a.words[i] = pack2(a0 * cos0 - b0 * sin0, a1 * cos1 - b1 * sin1, ELEMENT{});
            b.words[i] = pack2(b0 * cos0 + a0 * sin0, b1 * cos1 + a1 * sin1, ELEMENT{});
        }
        low[0] = a.quad;
        low[UNITS] = b.quad;
    }
}

// ---- staging ------------------------------------------------------------------------------------
struct Staging {
    u8* stages;      // [STAGES][keys, values][TILE] rows
    u64* addresses;  // [STAGES][TILE], where the rows of the tiles to come lie
    float2* near;    // [NEAR][PAIRS]
    float2* far;     // [FAR][PAIRS], of the tile
};

CUPY_LORA_DEVICE void copy_tile(const Staging& staging, int slot) {
    u8* const stage = staging.stages + slot * STAGE_BYTES;
    const u64* const addresses = staging.addresses + slot * TILE;
    const int tid = static_cast<int>(threadIdx.x);
#pragma unroll
    for (int i = 0; i < TILE * PIECES / THREADS; ++i) {
        // One base and constants where a round is a number of whole rows.
        constexpr bool WHOLE = THREADS % PIECES == 0;
        const int row = WHOLE ? tid / PIECES + i * (THREADS / PIECES) : (tid + i * THREADS) / PIECES;
        const int piece = WHOLE ? tid % PIECES : (tid + i * THREADS) % PIECES;
        const u64 address = addresses[row];
        const u8* const key = reinterpret_cast<const u8*>(address) + piece * 16;
        u8* const to = stage + row * ROW_BYTES + piece * 16;
        ptx::copy_async_16(to, key, address != 0);
        ptx::copy_async_16(to + SIDE_BYTES, key + PAGE_SIDE, address != 0);
    }
}

// Calls compute(tile, keys, values) for the tiles begin .. end - 1 (tile t: positions t * TILE on), STAGES - 1 tiles
// ahead of it under way. The near table is filled, and nobody reads the stages any more, when it is called; what the
// caller copied to shared memory before (committed) is there at the first compute.
template <class Compute>
CUPY_LORA_DEVICE void for_each_tile(const Keys& keys, int begin, int end, const Staging& staging,
                                    const Turns& frequencies, Compute compute) {
    const int tid = static_cast<int>(threadIdx.x);
    if (tid < TILE) {
#pragma unroll
        for (int i = 0; i < STAGES; ++i) {
            staging.addresses[i * TILE + tid] = begin + i < end ? key_address(keys, (begin + i) * TILE + tid) : 0;
        }
    }
    if constexpr (ROPE) fill_angles(staging.far, FAR, begin * TILE, NEAR, frequencies);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) {
        if (begin + i < end) copy_tile(staging, i);
        ptx::copy_async_commit();
    }
    int slot = 0;
#pragma unroll 1
    for (int tile = begin; tile < end; ++tile) {
        ptx::copy_async_wait<STAGES - 2>();
        __syncthreads();  // the tile has landed, everyone has left the stage that is filled next
        const int next = slot == 0 ? STAGES - 1 : slot - 1;
        if (tile + STAGES - 1 < end) copy_tile(staging, next);
        ptx::copy_async_commit();
        // The page table is read an iteration ahead of the copies that need it, behind the arithmetic.
        u64 address = 0;
        if (tid < TILE && tile + STAGES < end) address = key_address(keys, (tile + STAGES) * TILE + tid);
        u8* const stage = staging.stages + slot * STAGE_BYTES;
        if constexpr (ROPE) {
            const i32 first = tile * TILE;
            rotate_rows(stage, TILE, staging.near, staging.far, first / NEAR, [&](int row) { return first + row; });
            __syncthreads();
            if (tile + 1 < end) fill_angles(staging.far, FAR, first + TILE, NEAR, frequencies);
        }
        compute(tile, stage, stage + SIDE_BYTES);
        if (tid < TILE) staging.addresses[slot * TILE + tid] = address;
        slot = slot == STAGES - 1 ? 0 : slot + 1;
    }
}

// Rows of queries, 16-byte pieces, from row(r), which is null where there is none (zeros then).
template <class Row>
CUPY_LORA_DEVICE void stage_queries(u8* to, int count, Row row) {
    for (int e = static_cast<int>(threadIdx.x); e < count * PIECES; e += THREADS) {
        const int r = e / PIECES;
        const int piece = e % PIECES;
        const ELEMENT* const from = row(r);
        u8* const at = to + r * ROW_BYTES + piece * 16;
        if constexpr (VECTORS) {
            ptx::copy_async_16(at, from + piece * 8, from != nullptr);
        } else {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                reinterpret_cast<u16*>(at)[i] = from == nullptr ? static_cast<u16>(0) : from[piece * 8 + i].bits;
            }
        }
    }
    ptx::copy_async_commit();
}
