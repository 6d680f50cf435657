// Prefill: many queries a sequence, which are its last positions, over all of its keys.
//
// The rows of a sequence and key head are its queries times the GROUP query heads, query by query, cut into tiles of
// ROWS = 16 * BLOCKS * WARPS; they share the staged keys and values. Tiles of keys that no row of the tile sees are
// not read, those that no row of a warp sees are not multiplied.
//
// Block: one tile of rows of one key head, 16 * BLOCKS rows a warp; the last tiles of each sequence, which see the most
// keys, come first.
// With ROPE, the tile after the one that is multiplied is rotated meanwhile: half of the warps rotate first and the
// others multiply first, so that neither waits for the other kind of work.
// Shared memory: queries [ROWS] (then the output), stages, angles, addresses (attention_stage.cuh); scan
// [WARPS + 1] int64; the unit; the rows' spans.
#pragma once
#include "attention_tile.cuh"

constexpr int ROWS = 16 * BLOCKS * WARPS;
constexpr int WARP_ROWS = 16 * BLOCKS;
// Keys of a step of the softmax: 64 do not fit in registers, nor do 32 beside all that these options need.
constexpr bool CROWDED = ROPE && SOFT_CAP && BLOCKS * DIM > 192;
constexpr int STEP = TILE < 32 || CROWDED ? 16 : 32;

static_assert((NEAR + ceil_div(ROWS, GROUP) / NEAR + 2) * PAIRS * 8 <= STAGE_BYTES + ANGLE_BYTES || !ROPE,
              "the tables of the queries fit in the last stage and what is behind it");

struct Unit {
    i32 sequence, first_row, start, count;  // start: of the sequence's queries among all; count: how many
};

// Tile `number` of all sequences, the sequences' tiles in descending order; count is negative past the last.
CUPY_LORA_DEVICE void locate(const i32* qo_indptr, i32 batch, i32 tokens, i64 number, Unit* unit, i64* scratch) {
    const i32 each = (batch + THREADS - 1) / THREADS;
    const i32 begin = min(static_cast<i32>(threadIdx.x) * each, batch);
    const i32 end = min(begin + each, batch);
    // Queries of a sequence; none where the table cannot be right.
    const auto queries = [&](i32 s) {
        const i32 start = qo_indptr[s];
        const i32 stop = qo_indptr[s + 1];
        return start < 0 || stop < start || stop > tokens ? 0 : stop - start;
    };
    const auto tiles = [&](i32 s) { return (static_cast<i64>(queries(s)) * GROUP + ROWS - 1) / ROWS; };
    i64 own = 0, all;
    for (i32 s = begin; s < end; ++s) own += tiles(s);
    i64 at = scan<WARPS>(own, scratch, all);
    number = all - 1 - number;
    if (threadIdx.x == 0 && number < 0) unit->count = -1;
    for (i32 s = begin; s < end; ++s) {
        const i64 count = tiles(s);
        if (number >= at && number < at + count) {
            *unit = {s, static_cast<i32>((number - at) * ROWS), qo_indptr[s], queries(s)};
        }
        at += count;
    }
    __syncthreads();
}

// Copies of the tiles begin .. begin + STAGES - 2 (tile t: positions t * TILE on), a group each.
CUPY_LORA_DEVICE void start_tiles(const Keys& keys, int begin, int end, const Staging& staging) {
    const int tid = static_cast<int>(threadIdx.x);
    if (tid < TILE) {
#pragma unroll
        for (int i = 0; i < STAGES; ++i) {
            staging.addresses[i * TILE + tid] = begin + i < end ? key_address(keys, (begin + i) * TILE + tid) : 0;
        }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) {
        if (begin + i < end) copy_tile(staging, i);
        ptx::copy_async_commit();
    }
}

// Calls compute(tile, keys, values) for the tiles begin .. end - 1, after start_tiles. What the caller copied to
// shared memory before that (committed) is there at the first compute.
template <class Compute>
CUPY_LORA_DEVICE void for_each_tile(const Keys& keys, int begin, int end, const Staging& staging, const Turner& turner,
                                    Compute compute) {
    constexpr int AHEAD = ROPE ? 1 : 0;  // of the multiplied tile is the one that must have landed
    const int tid = static_cast<int>(threadIdx.x);
    const bool early = tid < THREADS / 2;
    if (ROPE && begin < end) {
        ptx::copy_async_wait<STAGES - 2>();
        __syncthreads();
        turner.rotate(staging.stages, begin, true);
    }
    int slot = 0;
#pragma unroll 1
    for (int tile = begin; tile < end; ++tile) {
        ptx::copy_async_wait<STAGES - 2 - AHEAD>();
        __syncthreads();  // the tile has landed (and is rotated), everyone has left the stage that is filled next
        const int before = slot == 0 ? STAGES - 1 : slot - 1;
        const auto after = [&] { return slot == STAGES - 1 ? 0 : slot + 1; };  // no register to keep it
        if (tile + STAGES - 1 < end) copy_tile(staging, before);
        ptx::copy_async_commit();
        // The page table is read an iteration ahead of the copies that need it, behind the arithmetic: nothing may
        // look at what is read before that, or the first warp waits for it and all others for that warp.
        const i32 position = (tile + STAGES) * TILE + tid;
        u64 page = 0;
        if (tid < TILE && tile + STAGES < end) page = page_at(keys, position);
        const bool rotates = ROPE && tile + 1 < end;
        if (rotates && early) turner.rotate(staging.stages + after() * STAGE_BYTES, tile + 1, false);
        u8* const stage = staging.stages + slot * STAGE_BYTES;
        compute(tile, stage, stage + SIDE_BYTES);
        if (rotates && !early) turner.rotate(staging.stages + after() * STAGE_BYTES, tile + 1, false);
        if (tid < TILE) staging.addresses[slot * TILE + tid] = address_in(keys, page, position);
        slot = after();
    }
}

// The warp's rows to shared memory, then, by 16 bytes where the output allows it, to the output.
template <class Row>
CUPY_LORA_DEVICE void store_rows(Block<BLOCKS>& block, u8* rows, float scale, float* lse, Row row) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int m = 0; m < BLOCKS; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int r = m * 16 + 8 * h + lane / 4;
            const float sum = quad_sum(block.sum[m][h]);
            const float inverse = sum > 0.f ? 1.f / sum : 0.f;
            u32* const words = reinterpret_cast<u32*>(rows + r * ROW_BYTES) + lane % 4;
#pragma unroll
            for (int n = 0; n < DIM / 8; ++n) {
                words[n * 4] = pack2(block.acc[m][n][2 * h] * inverse, block.acc[m][n][2 * h + 1] * inverse, ELEMENT{});
            }
            const i64 index = row(r).lse;
            if (lse != nullptr && lane % 4 == 0 && index >= 0) {
                lse[index] = sum > 0.f ? (block.base[m][h] * scale + log2f(sum)) * LN2 : minus_infinity();
            }
        }
    }
    __syncwarp();
    for (int e = lane; e < WARP_ROWS * PIECES; e += 32) {
        const int piece = e % PIECES;
        ELEMENT* const to = row(e / PIECES).out;
        if (to == nullptr) continue;
        const u8* const from = rows + e / PIECES * ROW_BYTES + piece * 16;
        if constexpr (VECTORS) {
            reinterpret_cast<uint4*>(to)[piece] = *reinterpret_cast<const uint4*>(from);
        } else {
#pragma unroll
            for (int i = 0; i < 8; ++i) to[piece * 8 + i].bits = reinterpret_cast<const u16*>(from)[i];
        }
    }
}
