// Decode: one query a sequence over all of its keys, split among blocks (attention_schedule.cuh).
//
// Block: WARPS warps multiply (attention_lanes.cuh), one more brings what they multiply (attention_stream.cuh). At the
// end of a chunk the warps' results are joined in the order of the warps, and added to those of the chunks before, in
// shared memory or, where chunks are units of their own, through the workspace. A last warp counts those chunks: the
// fence and the counter take 5 us where memory is busy, in which the others go on with the next unit. They ask whether
// the chunk was its sequence's last to arrive, and then fold, at that unit's end.
// Shared memory: of the ring, stages, queries, steps, goals, addresses (without COPY_BULK), barriers [2 STAGES + 2];
// with ROPE, angles [17] and each warp's turned queries (attention_turn.cuh); of the warps, parts
// [WARPS][ROWS][PART_ROW] and rows [WARPS][ROWS][2], of the sequence so far, acc [ROWS][DIM] and rows [2][ROWS][2], all
// float32; runs [THREADS][2] int32; scan [BLOCK_WARPS] int64; an arrival [5] int32.
#pragma once
#include "attention_turn.cuh"

constexpr int PASS = 16 * UNIT_WORDS;  // columns joined at a time: those of a unit of all lanes
constexpr int PART_ROW = PASS + 4;
constexpr int QUADS = ROWS * (PASS / 4);  // float4s of a pass
constexpr int FETCH = 12;                 // chunks that are read at a time

// Partial results of split sequences, slot after slot (one a chunk), each of all query heads.
struct Partials {
    float* acc;    // [slots][HEADS * GROUP][DIM], not divided by the sum
    float* rows;   // [slots][HEADS * GROUP][4]: maximum as an exponent of two, sum, nothing
    i32* arrived;  // [slots][UNITS], of a sequence's first slot: chunks that are there; zeros between launches
};

// The barrier of the warps that multiply. What a thread wrote before it, all of them see after it.
CUPY_LORA_DEVICE void crew_meet() {
    __syncwarp();
    ptx::barrier_meet(1, 32 * WARPS);
}

// ---- partial results: four columns of a row at a time ------------------------------------------
// Thread's share of the columns, the same wherever results are joined: f(row, column).
template <class F>
CUPY_LORA_DEVICE void each_quad(int pass, F f) {
#pragma unroll 1
    for (int e = static_cast<int>(threadIdx.x); e < QUADS; e += 32 * WARPS) {
        f(e / (PASS / 4), pass * PASS + e % (PASS / 4) * 4);
    }
}

// Base of a row (an exponent of two) and sum.
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

// One pass's columns of the warp's output to shared memory.
CUPY_LORA_DEVICE void store_parts(const Block& block, float* parts, int pass) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
    for (int h = 0; h < HALVES; ++h) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = 8 * h + lane % 4 * 2 + i;
            if (row >= ROWS) continue;
            float* const part = parts + (warp * ROWS + row) * PART_ROW + lane / 4 * (2 * UNIT_WORDS);
#pragma unroll
            for (int j = 0; j < UNIT_WORDS; ++j) {
                const float (&acc)[4] = block.acc[h][pass * UNIT_WORDS + j];
                *reinterpret_cast<float2*>(part + 2 * j) = make_float2(acc[i], acc[i + 2]);
            }
        }
    }
}

// The warps' shares of a chunk, joined in the order of the warps: take(row, column, result of the row, quad of
// columns). All warps that multiply; what take leaves for other threads they see on return.
template <class Take>
CUPY_LORA_DEVICE void join_warps(const Block& block, const Joined& joined, float scale, Take take) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
    for (int h = 0; h < HALVES; ++h) {
        const float sum = quad_sum(block.sum[h]);
        const int row = lane / 4 + 8 * h;
        if (lane % 4 == 0 && row < ROWS) joined.warps[warp * ROWS + row] = {block.base[h] * scale, sum};
    }
#pragma unroll
    for (int pass = 0; pass < VALUE_UNITS; ++pass) {
        store_parts(block, joined.parts, pass);
        crew_meet();
        each_quad(pass, [&](int row, int column) {
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
                const float* const quad = joined.parts + (w * ROWS + row) * PART_ROW + (column - pass * PASS);
                acc = multiply_add(*reinterpret_cast<const float4*>(quad), factor, acc);
            }
            take(row, column, Row{top, sum}, acc);
        });
        crew_meet();  // the parts are written again
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

// ---- chunks that have arrived -------------------------------------------------------------------
// What is counted: a chunk of a unit. chunks: of the unit's sequence, or 0 where no more will arrive.
struct Arrival {
    i32 sequence, head, first_slot, chunks;
    i32 complete;  // whether it was the last of them
};

// One arrival at a time: post (one thread, after what it is about was stored and the crew has met), then settled. The
// last post has no chunks.
class Arrivals {
  public:
    // Two barriers, each of which one thread arrives at.
    CUPY_LORA_DEVICE Arrivals(Arrival* arrival, u64* barriers) : arrival_(arrival), barriers_(barriers) {}

    CUPY_LORA_DEVICE void post(i32 head, const Goal& goal) const {
        arrival_->sequence = goal.sequence;
        arrival_->head = head;
        arrival_->first_slot = goal.first_slot;
        post_chunks(goal.chunks);
    }
    CUPY_LORA_DEVICE void post_chunks(i32 chunks) const {
        arrival_->chunks = chunks;
        ptx::mbarrier_arrive(barriers_);
    }

    // Whether the chunk was the last one; each thread of the crew, once a post with chunks. They meet before the next.
    CUPY_LORA_DEVICE bool settled() {
        ptx::mbarrier_wait_block(barriers_ + 1, parity_);
        parity_ ^= 1;
        return arrival_->complete != 0;
    }

    CUPY_LORA_DEVICE const Arrival& arrival() const { return *arrival_; }

    // One thread: counts until there is nothing more. What the chunks' blocks stored before they posted is visible to
    // those who learn that the last one is there.
    CUPY_LORA_DEVICE void count(i32* arrived) const {
        for (u32 parity = 0;; parity ^= 1) {
            ptx::mbarrier_wait_block(barriers_, parity);
            const i32 chunks = arrival_->chunks;
            if (chunks == 0) return;
            i32* const counter = arrived + arrival_->first_slot * UNITS + arrival_->head;
            ptx::fence_gpu();
            const bool complete = atomicAdd(counter, 1) == chunks - 1;
            ptx::fence_gpu();
            if (complete) *counter = 0;
            arrival_->complete = complete;
            ptx::mbarrier_arrive(barriers_ + 1);
        }
    }

  private:
    Arrival* arrival_;
    u64* barriers_;
    u32 parity_ = 0;
};
