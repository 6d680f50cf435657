// Decode: one query a sequence over all of its keys, split among blocks.
//
// A sequence of n keys (the window's, where there is one) is cut into chunks of CHUNK_MIN << i keys, the smallest i
// with chunk^2 >= n * CHUNK_SPREAD: the cut depends on nothing else. A chunk's partial result is folded into the
// sequence's in ascending order, always by the same arithmetic; whether one block walks over all chunks or each has
// a block of its own, whose last to finish folds, is decided by the load of the whole batch and changes no bit.
//
// Block: one unit of work after the other, a chunk (or a sequence) of a key head and up to 16 of its query heads. Each
// warp takes its own 16 keys of a tile of 16 * WARPS. The tiles of all of a block's units are one stream: copies run
// STAGES - 1 tiles ahead of the products and addresses STAGES, across the ends of units, so that only the first unit
// waits for tables and memory. A unit has at least one tile, an empty one.
// Shared memory: queries [STAGES][ROWS], stages, addresses, near, far (attention_stage.cuh), the angles of a query
// [PAIRS] float2; Joined: of the warps, parts [WARPS][ROWS][PASS + 8] and rows [WARPS][ROWS][2], of the sequence so
// far, acc [ROWS][DIM] and rows [2][ROWS][2], all float32; scan [WARPS + 1] int64; units [RING]; a counter.
#pragma once
#include "attention_tile.cuh"

constexpr int HEAD_BLOCKS = ceil_div(GROUP, 16);
constexpr int UNITS = HEADS * HEAD_BLOCKS;  // of a chunk
constexpr int ROWS = GROUP < 16 ? GROUP : 16;
constexpr int HALVES = ROWS > 8 ? 2 : 1;
constexpr int QUERY_BYTES = ROWS * ROW_BYTES;
constexpr int PASS = DIM % 32 == 0 ? 32 : 16;  // columns joined at a time
constexpr int PASSES = DIM / PASS;
constexpr int PART_ROW = PASS + 8;
constexpr int QUADS = ROWS * (PASS / 4);  // float4s of a pass
constexpr int FETCH = 8;                  // chunks that are read at a time
constexpr int RING = 3 * STAGES;  // units known ahead: the addresses reach STAGES + 1 units; a multiple of STAGES

static_assert(TILE == 16 * WARPS, "16 keys of a tile for each warp");
static_assert(CHUNK_MIN % TILE == 0, "whole tiles a chunk");

// Partial results of split sequences, slot after slot (one a chunk), each of all query heads.
struct Partials {
    float* acc;    // [slots][HEADS * GROUP][DIM], not divided by the sum
    float* rows;   // [slots][HEADS * GROUP][4]: maximum as an exponent of two, sum, nothing
    i32* arrived;  // [slots][UNITS], of a sequence's first slot: chunks that are there; zeros between launches
    i32 slots;
};

struct Unit {
    i32 sequence, length, first_page;
    i32 begin, end, chunk_tiles;   // begin and end in tiles
    i32 chunks, slot, first_slot;  // chunks: 0 where one block takes all of them
};

struct Work {
    Cache cache;
    i32 batch, window, slots;
    i32 share;  // a sequence is split where its keys times this exceed the keys of all units
};

CUPY_LORA_DEVICE i32 first_tile(i32 length, i32 window) {
    return WINDOW && length > window ? (length - window) / TILE : 0;
}

CUPY_LORA_DEVICE i32 chunk_of(i32 keys) {
    i32 chunk = CHUNK_MIN;
    while (static_cast<i64>(chunk) * chunk < static_cast<i64>(keys) * CHUNK_SPREAD) chunk *= 2;
    return chunk;
}

// Each thread looks after a run of sequences: what comes before it, in keys, slots and units.
class Schedule {
  public:
    CUPY_LORA_DEVICE Schedule(const Work& work, i64* scratch) : work_(work) {
        const i32 each = (work.batch + THREADS - 1) / THREADS;
        begin_ = min(static_cast<i32>(threadIdx.x) * each, work.batch);
        end_ = min(begin_ + each, work.batch);
        i64 keys = 0;
        for (i32 s = begin_; s < end_; ++s) keys += keys_of_sequence(s);
        scan(keys, scratch, all_keys_);
        i64 slots = 0, all_slots;
        for (i32 s = begin_; s < end_; ++s) slots += wanted(keys_of_sequence(s));
        first_slot_ = scan(slots, scratch, all_slots);
        i64 units = 0;
        each_sequence([&](i32, i32, i32 chunks, i64) { units += chunks == 0 ? 1 : chunks; });
        first_unit_ = scan(units, scratch, all_units_);
        end_unit_ = first_unit_ + units;
    }

    CUPY_LORA_DEVICE i64 units() const { return all_units_; }

    // The unit of this number, by the thread that has it; the others write nothing.
    CUPY_LORA_DEVICE void locate(i64 number, Unit* unit) const {
        if (number < first_unit_ || number >= end_unit_) return;
        i64 at = first_unit_;
        each_sequence([&](i32 sequence, i32 keys, i32 chunks, i64 slot) {
            const i32 count = chunks == 0 ? 1 : chunks;
            if (number >= at && number < at + count) {
                const i32 length = length_of(work_.cache, sequence);
                const i32 first = first_tile(length, work_.window);
                const i32 tiles = chunk_of(keys) / TILE;
                const i32 begin = first + static_cast<i32>(number - at) * tiles;
                const i32 end = max((length + TILE - 1) / TILE, begin + 1);
                const i32 page = length > 0 ? work_.cache.kv_indptr[sequence] : 0;
                const i32 own_slot = static_cast<i32>(slot + (number - at));
                const i32 stop = chunks != 0 ? min(begin + tiles, end) : end;
                *unit = {sequence, length, page, begin, stop, tiles, chunks, own_slot, static_cast<i32>(slot)};
            }
            at += count;
        });
    }

  private:
    CUPY_LORA_DEVICE i32 keys_of_sequence(i32 sequence) const {
        const i32 length = length_of(work_.cache, sequence);
        return length - first_tile(length, work_.window) * TILE;
    }

    // Slots that a sequence asks for.
    CUPY_LORA_DEVICE i32 wanted(i32 keys) const {
        const i32 chunk = chunk_of(keys);
        return keys > chunk && static_cast<i64>(keys) * work_.share > all_keys_ * UNITS ? (keys + chunk - 1) / chunk
                                                                                        : 0;
    }

    // f(sequence, keys, chunks with a block each (0: one block for all), first slot) for each of this thread's.
    template <class F>
    CUPY_LORA_DEVICE void each_sequence(F f) const {
        i64 slot = first_slot_;
        for (i32 s = begin_; s < end_; ++s) {
            const i32 keys = keys_of_sequence(s);
            const i32 chunks = wanted(keys);
            f(s, keys, slot + chunks <= work_.slots ? chunks : 0, slot);
            slot += chunks;
        }
    }

    const Work& work_;
    i32 begin_, end_;
    i64 all_keys_, first_slot_, first_unit_, end_unit_, all_units_;
};

// Where someone is in a block's stream of tiles.
struct Cursor {
    i64 number;  // of the unit and head
    int entry;   // of the unit in the ring
    i32 tile;
};

CUPY_LORA_DEVICE void advance(Cursor& at, const Unit* ring, i64 numbers) {
    if (++at.tile < ring[at.entry].end) return;
    at.number += gridDim.x;
    at.entry = at.entry == RING - 1 ? 0 : at.entry + 1;
    if (at.number < numbers) at.tile = ring[at.entry].begin;
}

// The heads of a number: of the keys, and the first of the queries and how many.
struct Heads {
    int key, first, count;
};

CUPY_LORA_DEVICE Heads heads_of(i64 number) {
    const int key = static_cast<int>(number % UNITS) / HEAD_BLOCKS;
    const int block = static_cast<int>(number % UNITS) % HEAD_BLOCKS;
    return {key, key * GROUP + block * 16, min(GROUP - block * 16, 16)};
}

// ---- partial results: four columns of a row at a time ------------------------------------------
// Thread's share of the columns, the same wherever results are joined: f(row, column).
template <class F>
CUPY_LORA_DEVICE void each_quad(int pass, F f) {
    for (int e = static_cast<int>(threadIdx.x); e < QUADS; e += THREADS) {
        f(e / (PASS / 4), pass * PASS + e % (PASS / 4) * 4);
    }
}

// Maximum (an exponent of two) and sum of a row.
struct Row {
    float top, sum;
};

CUPY_LORA_DEVICE float finite(float top) { return top == minus_infinity() ? 0.f : top; }

CUPY_LORA_DEVICE float4 multiply_add(float4 a, float factor, float4 c) {
    return make_float4(fmaf(a.x, factor, c.x), fmaf(a.y, factor, c.y), fmaf(a.z, factor, c.z), fmaf(a.w, factor, c.w));
}

// The one way in which a chunk's result is added to those of the chunks before it.
CUPY_LORA_DEVICE void fold(Row& row, float4& acc, Row chunk, float4 chunk_acc) {
    const float top = fmaxf(row.top, chunk.top);
    const float old = ptx::exp2_approx(row.top - finite(top));
    const float add = ptx::exp2_approx(chunk.top - finite(top));
    row = {top, fmaf(chunk.sum, add, row.sum * old)};
    acc = multiply_add(chunk_acc, add, make_float4(acc.x * old, acc.y * old, acc.z * old, acc.w * old));
}

struct Joined {
    float* parts;  // [WARPS][ROWS][PART_ROW]
    Row* warps;    // [WARPS][ROWS]
    float* acc;    // [ROWS][DIM], of the chunks so far; each thread's quads are its own
    Row* rows;     // [2][ROWS], of an even and of an odd number of chunks
};

// The warps' shares of a chunk, joined in the order of the warps: take(row, column, result of the row, quad of
// columns). All threads; what take leaves for other threads they see on return.
template <class Take>
CUPY_LORA_DEVICE void join_warps(Block<1>& block, const Joined& joined, float scale, Take take) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
    for (int h = 0; h < HALVES; ++h) {
        const float sum = quad_sum(block.sum[0][h]);
        const int row = lane / 4 + 8 * h;
        if (lane % 4 == 0 && row < ROWS) joined.warps[warp * ROWS + row] = {block.top[0][h] * scale, sum};
    }
#pragma unroll
    for (int p = 0; p < PASSES; ++p) {
#pragma unroll
        for (int h = 0; h < HALVES; ++h) {
            const int row = lane / 4 + 8 * h;
            if (row < ROWS) {
                float* const part = joined.parts + (warp * ROWS + row) * PART_ROW + lane % 4 * 2;
#pragma unroll
                for (int n = 0; n < PASS / 8; ++n) {
                    const float* const pair = block.acc[0][p * (PASS / 8) + n] + 2 * h;
                    *reinterpret_cast<float2*>(part + n * 8) = make_float2(pair[0], pair[1]);
                }
            }
        }
        __syncthreads();
        each_quad(p, [&](int row, int column) {
            float top = minus_infinity();
#pragma unroll
            for (int w = 0; w < WARPS; ++w) top = fmaxf(top, joined.warps[w * ROWS + row].top);
            float sum = 0.f;
            float4 acc = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
            for (int w = 0; w < WARPS; ++w) {
                const Row part = joined.warps[w * ROWS + row];
                const float factor = ptx::exp2_approx(part.top - finite(top));
                sum = fmaf(part.sum, factor, sum);
                const float* const quad = joined.parts + (w * ROWS + row) * PART_ROW + (column - p * PASS);
                acc = multiply_add(*reinterpret_cast<const float4*>(quad), factor, acc);
            }
            take(row, column, Row{top, sum}, acc);
        });
        __syncthreads();  // the parts are written again
    }
}

// A chunk's quad into the sequence's result; `number` counts the chunks.
CUPY_LORA_DEVICE void keep(const Joined& joined, i32 number, int row, int column, Row chunk, float4 chunk_acc) {
    float4* const held = reinterpret_cast<float4*>(joined.acc + row * DIM + column);
    Row state = {minus_infinity(), 0.f};
    float4 acc = make_float4(0.f, 0.f, 0.f, 0.f);
    if (number > 0) {
        state = joined.rows[number % 2 * ROWS + row];
        acc = *held;
    }
    fold(state, acc, chunk, chunk_acc);
    *held = acc;
    if (column == 0) joined.rows[(number + 1) % 2 * ROWS + row] = state;
}

// The quad of `row` of a chunk (slot * HEADS * GROUP + head) to the workspace.
CUPY_LORA_DEVICE void store_partial(const Partials& partials, i64 row, int column, Row chunk, float4 acc) {
    *reinterpret_cast<float4*>(partials.acc + row * DIM + column) = acc;
    if (column == 0) *reinterpret_cast<float4*>(partials.rows + row * 4) = make_float4(chunk.top, chunk.sum, 0.f, 0.f);
}

// The same quad of `count` chunks, from `row` of the first on, folded.
CUPY_LORA_DEVICE void fold_partials(const Partials& partials, i64 row, i32 count, int column, Row& state, float4& acc) {
    for (i32 c = 0; c < count; c += FETCH) {
        float4 rows[FETCH], quads[FETCH];  // all under way before the first is folded
#pragma unroll
        for (int f = 0; f < FETCH; ++f) {
            const i64 at = row + static_cast<i64>(min(c + f, count - 1)) * (HEADS * GROUP);
            rows[f] = ptx::load_fresh_16(partials.rows + at * 4);
            quads[f] = ptx::load_fresh_16(partials.acc + at * DIM + column);
        }
#pragma unroll
        for (int f = 0; f < FETCH; ++f) {
            if (c + f < count) fold(state, acc, {rows[f].x, rows[f].y}, quads[f]);
        }
    }
}

// Divides by the sum and writes a quad; lse, of the row, may be null.
CUPY_LORA_DEVICE void store_quad(ELEMENT* out, float* lse, int column, Row row, float4 acc) {
    const float inverse = row.sum > 0.f ? 1.f / row.sum : 0.f;
    const u32 low = pack2(acc.x * inverse, acc.y * inverse, ELEMENT{});
    const u32 high = pack2(acc.z * inverse, acc.w * inverse, ELEMENT{});
    if constexpr (VECTORS) {
        *reinterpret_cast<uint2*>(out + column) = make_uint2(low, high);
    } else {
        out[column].bits = static_cast<u16>(low);
        out[column + 1].bits = static_cast<u16>(low >> 16);
        out[column + 2].bits = static_cast<u16>(high);
        out[column + 3].bits = static_cast<u16>(high >> 16);
    }
    if (column == 0 && lse != nullptr) *lse = row.sum > 0.f ? (row.top + log2f(row.sum)) * LN2 : minus_infinity();
}
