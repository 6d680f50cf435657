// Decode: one query a sequence over all of its keys, split among blocks.
//
// A sequence of n keys (the window's, where there is one) is cut into chunks of CHUNK_MIN << i keys, the smallest i
// with chunk^2 >= n * CHUNK_SPREAD: the cut depends on nothing else. A chunk's partial result is folded into the
// sequence's in ascending order, always by the same arithmetic; whether one block walks over all chunks or each has
// a block of its own, whose last to finish folds, is decided by the load of the whole batch and changes no bit.
//
// Block: one unit of work at a time, a chunk (or a sequence) of a key head and up to 16 of its query heads. Each
// warp takes its own 16 keys of a tile of 16 * WARPS.
// Shared memory: queries [16], stages, addresses, near, far (attention_tile.cuh); parts [WARPS][ROWS][PASS + 8]
// float32; tops and sums [WARPS][16]; scan [WARPS + 1] int64; the unit.
#pragma once
#include "attention_tile.cuh"

constexpr int HEAD_BLOCKS = ceil_div(GROUP, 16);
constexpr int UNITS = HEADS * HEAD_BLOCKS;  // of a chunk
constexpr int ROWS = GROUP < 16 ? GROUP : 16;
constexpr int HALVES = ROWS > 8 ? 2 : 1;
constexpr int PASS = DIM % 64 == 0 ? 64 : DIM % 48 == 0 ? 48 : DIM % 32 == 0 ? 32 : 16;  // columns merged at a time
constexpr int PASSES = DIM / PASS;
constexpr int PART_ROW = PASS + 8;
constexpr int PER_THREAD = ceil_div(ROWS * PASS, THREADS);
constexpr int FETCH = PASSES * PER_THREAD < 8 ? 8 : PASSES * PER_THREAD < 16 ? 4 : 2;  // chunks read at a time

static_assert(TILE == 16 * WARPS, "16 keys of a tile for each warp");
static_assert(CHUNK_MIN % TILE == 0, "whole tiles a chunk");

// Partial results of split sequences, slot after slot (one a chunk), each of all query heads.
struct Partials {
    float* acc;      // [slots][HEADS * GROUP][DIM], not divided by the sum
    float* tops;     // [slots][HEADS * GROUP][2]: maximum as an exponent of two, sum
    i32* arrived;    // [slots][UNITS], of a sequence's first slot: chunks that are there; zeros between launches
    i32 slots;
};

struct Unit {
    i32 sequence, length, begin, end, chunk_tiles;  // begin and end in tiles
    i32 chunks, slot, first_slot;                   // chunks: 0 where one block takes all of them
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
                const i32 end = (length + TILE - 1) / TILE;
                const i32 begin = first + static_cast<i32>(number - at) * tiles;
                const i32 own_slot = static_cast<i32>(slot + (number - at));
                *unit = {sequence, length, begin,   chunks != 0 && begin + tiles < end ? begin + tiles : end, tiles,
                         chunks,   own_slot, static_cast<i32>(slot)};
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
        return keys > chunk && static_cast<i64>(keys) * work_.share > all_keys_ * UNITS ? (keys + chunk - 1) / chunk : 0;
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

// A thread's elements of the result of a chunk or of a sequence: row and column of element i of each pass are
// element(i) / PASS and element(i) % PASS.
struct Result {
    float acc[PASSES][PER_THREAD];
    float top[PER_THREAD];
    float sum[PER_THREAD];
};

CUPY_LORA_DEVICE int element(int i) { return static_cast<int>(threadIdx.x) + i * THREADS; }

CUPY_LORA_DEVICE void clear(Result& result) {
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) {
        result.top[i] = minus_infinity();
        result.sum[i] = 0.f;
#pragma unroll
        for (int p = 0; p < PASSES; ++p) result.acc[p][i] = 0.f;
    }
}

// The one way in which partial results are joined.
CUPY_LORA_DEVICE void fold(Result& result, const Result& chunk) {
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) {
        const float top = fmaxf(result.top[i], chunk.top[i]);
        const float base = top == minus_infinity() ? 0.f : top;
        const float old = ptx::exp2_approx(result.top[i] - base);
        const float add = ptx::exp2_approx(chunk.top[i] - base);
        result.top[i] = top;
        result.sum[i] = fmaf(chunk.sum[i], add, result.sum[i] * old);
#pragma unroll
        for (int p = 0; p < PASSES; ++p) result.acc[p][i] = fmaf(chunk.acc[p][i], add, result.acc[p][i] * old);
    }
}

struct Exchange {
    float* parts;  // [WARPS][ROWS][PART_ROW]
    float* tops;   // [WARPS][16]
    float* sums;   // [WARPS][16]
};

// The warps' shares of a chunk, joined in the order of the warps. All threads; block is done with afterwards.
CUPY_LORA_DEVICE void join_warps(Block<1>& block, const Exchange& exchange, float scale, Result& chunk) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
    for (int h = 0; h < HALVES; ++h) {
        const float sum = quad_sum(block.sum[0][h]);
        if (lane % 4 == 0) {
            exchange.tops[warp * 16 + lane / 4 + 8 * h] = block.top[0][h] * scale;
            exchange.sums[warp * 16 + lane / 4 + 8 * h] = sum;
        }
    }
#pragma unroll
    for (int p = 0; p < PASSES; ++p) {
        if (p > 0) __syncthreads();
#pragma unroll
        for (int h = 0; h < HALVES; ++h) {
            const int row = lane / 4 + 8 * h;
            if (row < ROWS) {
                float* const part = exchange.parts + (warp * ROWS + row) * PART_ROW + lane % 4 * 2;
#pragma unroll
                for (int n = 0; n < PASS / 8; ++n) {
                    const float* const pair = block.acc[0][p * (PASS / 8) + n] + 2 * h;
                    *reinterpret_cast<float2*>(part + n * 8) = make_float2(pair[0], pair[1]);
                }
            }
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < PER_THREAD; ++i) {
            const int row = element(i) / PASS;
            if (row >= ROWS) continue;
            float top = minus_infinity();
#pragma unroll
            for (int w = 0; w < WARPS; ++w) top = fmaxf(top, exchange.tops[w * 16 + row]);
            const float base = top == minus_infinity() ? 0.f : top;
            float acc = 0.f, sum = 0.f;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) {
                const float factor = ptx::exp2_approx(exchange.tops[w * 16 + row] - base);
                acc = fmaf(factor, exchange.parts[(w * ROWS + row) * PART_ROW + element(i) % PASS], acc);
                sum = fmaf(factor, exchange.sums[w * 16 + row], sum);
            }
            chunk.acc[p][i] = acc;
            chunk.top[i] = top;
            chunk.sum[i] = sum;
        }
    }
    __syncthreads();  // the parts, tops and sums are written again for the next chunk
}

// One chunk's result to its slot, or (`there`: see Fetch) from it. head: the block's first query head.
CUPY_LORA_DEVICE void store_partial(const Partials& partials, i32 slot, int head, int rows, const Result& chunk) {
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) {
        const int row = element(i) / PASS;
        const int column = element(i) % PASS;
        if (row >= rows) continue;
        const i64 at = static_cast<i64>(slot) * (HEADS * GROUP) + head + row;
#pragma unroll
        for (int p = 0; p < PASSES; ++p) partials.acc[at * DIM + p * PASS + column] = chunk.acc[p][i];
        if (column == 0) {
            partials.tops[at * 2] = chunk.top[i];
            partials.tops[at * 2 + 1] = chunk.sum[i];
        }
    }
}

CUPY_LORA_DEVICE void fold_slots(const Partials& partials, i32 first, i32 count, int head, int rows, Result& result) {
    for (i32 c = 0; c < count; c += FETCH) {
        Result fetched[FETCH];  // all under way before the first is folded
#pragma unroll
        for (int f = 0; f < FETCH; ++f) {
            clear(fetched[f]);
#pragma unroll
            for (int i = 0; i < PER_THREAD; ++i) {
                const int row = element(i) / PASS;
                if (row >= rows || c + f >= count) continue;
                const i64 at = static_cast<i64>(first + c + f) * (HEADS * GROUP) + head + row;
                fetched[f].top[i] = ptx::load_fresh(partials.tops + at * 2);
                fetched[f].sum[i] = ptx::load_fresh(partials.tops + at * 2 + 1);
#pragma unroll
                for (int p = 0; p < PASSES; ++p) {
                    fetched[f].acc[p][i] = ptx::load_fresh(partials.acc + at * DIM + p * PASS + element(i) % PASS);
                }
            }
        }
#pragma unroll
        for (int f = 0; f < FETCH; ++f) {
            if (c + f < count) fold(result, fetched[f]);
        }
    }
}

// Divides by the sums and writes the rows of `head` on; lse may be null.
CUPY_LORA_DEVICE void store_result(ELEMENT* out, float* lse, int head, int rows, const Result& result) {
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) {
        const int row = element(i) / PASS;
        const int column = element(i) % PASS;
        if (row >= rows) continue;
        const float sum = result.sum[i];
        const float inverse = sum > 0.f ? 1.f / sum : 0.f;
#pragma unroll
        for (int p = 0; p < PASSES; ++p) {
            out[(head + row) * DIM + p * PASS + column] = from_float<ELEMENT>(result.acc[p][i] * inverse);
        }
        if (column == 0 && lse != nullptr) {
            lse[head + row] = sum > 0.f ? (result.top[i] + log2f(sum)) * LN2 : minus_infinity();
        }
    }
}
