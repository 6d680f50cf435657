// Prefill by warpgroups (sm_90a): what the warpgroups do that multiply.
//
// Block: CREWS warpgroups with 64 rows each and one that brings what they multiply (attention_prefill_bring.cuh), until
// there are no more units. Scores of the next tile are multiplied ahead of the output of this one, so that the softmax
// of the next runs beside the products; with TURNS the warpgroups issue their products in turns, so that one multiplies
// while the other has its softmax.
// Shared memory, from a multiple of 1024 on: keys [KEY_STAGES][TILE][DIM], values [STAGES][TILE][DIM], queries
// [QUERY_STAGES][ROWS][DIM] (then the output); barriers [2 (KEY_STAGES + STAGES + QUERY_STAGES)]; units and tickets
// [QUERY_STAGES]; angles (ANGLE_BYTES).
#pragma once
#include "attention_prefill_bring.cuh"

constexpr int STEPS = DIM / 16;  // of k, of the scores
constexpr int EIGHTS = TILE / 8;

// Registers of a thread: at head_dim 128 and tiles of 128, 64 of scores, 64 of output and 32 of weights, and the rest.
// What those that bring leave of an even share is what the others take.
constexpr int REGISTERS = CREWS == 3 ? 144 : ROPE ? 192 : 208;
constexpr int REGISTERS_BRINGING = CREWS == 3 ? 80 : ROPE ? 120 : 88;
static_assert(CREWS == 2 || CREWS == 3, "others are not worked out");

// A thread's part of 64 rows: rows g and g + 8 of its warp's 16, as attention_tile.cuh has them.
struct State {
    float acc[DIM / 8][4];
    float base[2], sum[2], lost[2];
};

struct Span {
    i32 first, end;
};

// Scores to weights, in place. factor: what the rows' accumulators are to be multiplied with. visible: the keys that
// the two rows see, looked at where `masked`.
CUPY_LORA_DEVICE void weigh(float (&s)[EIGHTS][4], State& state, float (&factor)[2], float scale, float cap,
                            bool masked, const Span (&visible)[2]) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if constexpr (SOFT_CAP) {
#pragma unroll
        for (int n = 0; n < EIGHTS; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) s[n][i] = tanh_of(s[n][i] * cap);
        }
    }
    if (masked) {
        // Against constants: n * 8 + i % 2 is the key, less what the lane adds to all of its keys.
        const int own = lane % 4 * 2;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const i32 first = visible[h].first - own, end = visible[h].end - own;
#pragma unroll
            for (int n = 0; n < EIGHTS; ++n) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    if ((WINDOW && n * 8 + i < first) || n * 8 + i >= end) s[n][2 * h + i] = minus_infinity();
                }
            }
        }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        float top = minus_infinity();
#pragma unroll
        for (int n = 0; n < EIGHTS; ++n) top = fmaxf(top, fmaxf(s[n][2 * h], s[n][2 * h + 1]));
        top = quad_max(top);
        const float old = state.base[h] * scale;
        const bool rises = fmaf(top, scale, -old) > SLACK;
        if (rises) state.base[h] = top;
        // Nothing visible yet: any finite base gives weights of 0.
        const float base = state.base[h] == minus_infinity() ? 0.f : state.base[h] * scale;
        factor[h] = rises ? ptx::exp2_approx(old - base) : 1.f;
        float sums[2] = {0.f, 0.f};
#pragma unroll
        for (int n = 0; n < EIGHTS; ++n) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float& weight = s[n][2 * h + i];
                weight = ptx::exp2_approx(fmaf(weight, scale, -base));
                sums[i] += weight;
            }
        }
        const float before = state.sum[h] * factor[h];
        const float added = fmaf(-state.lost[h], factor[h], sums[0] + sums[1]);
        state.sum[h] = before + added;
        state.lost[h] = (state.sum[h] - before) - added;
    }
}

CUPY_LORA_DEVICE void pack(u32 (&weights)[TILE / 16][4], const float (&s)[EIGHTS][4]) {
#pragma unroll
    for (int j = 0; j < TILE / 16; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float (&from)[4] = s[2 * j + i / 2];
            weights[j][i] = pack2(from[i % 2 * 2], from[i % 2 * 2 + 1], ELEMENT{});
        }
    }
}

// One warpgroup's work: the rows from 64 * crew on of each unit.
class Crew {
  public:
    CUPY_LORA_DEVICE Crew(const Rings& rings, int crew) : rings_(rings), crew_(crew), keys_{0, 0}, values_{0, 0} {}

    // All of the block's units.
    CUPY_LORA_DEVICE void work(ELEMENT* out, float* lse, i64 out_stride, i32 window, float scale, float cap) {
        if (TURNS && crew_ == CREWS - 1) give_turn();
        for (Turn<QUERY_STAGES> entry = {0, 0};; entry.next()) {
            ptx::mbarrier_wait_block(rings_.full_queries + entry.slot, entry.parity);
            const Unit& unit = rings_.units[entry.slot];
            if (unit.count < 0) break;
            u8* const queries = rings_.queries + entry.slot * QUERY_BYTES;
            const Rows rows = {unit, window};
            State state;
            attend(state, rows, queries, scale, cap);
            store(state, rows, queries, out, lse, out_stride, scale);
            leave(rings_.empty_queries + entry.slot);
        }
        if (TURNS && crew_ == 0) take_turn();  // the one that nobody waits for
    }

  private:
    // This warp has done with a stage.
    CUPY_LORA_DEVICE static void leave(u64* barrier) {
        __syncwarp();
        if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(barrier);
    }

    CUPY_LORA_DEVICE void take_turn() const {
        if constexpr (TURNS) ptx::barrier_meet(TURN_BARRIER + crew_, 2 * CREW);
    }
    CUPY_LORA_DEVICE void give_turn() const {
        if constexpr (TURNS) {
            ptx::barrier_arrive(TURN_BARRIER + (crew_ == CREWS - 1 ? 0 : crew_ + 1), 2 * CREW);
        }
    }

    template <int SIZE>
    CUPY_LORA_DEVICE static void wait_for(u64* barriers, const Turn<SIZE>& turn) {
        ptx::mbarrier_wait_block(barriers + turn.slot, turn.parity);
    }

    CUPY_LORA_DEVICE void multiply_scores(float (&s)[EIGHTS][4], u64 of_queries) const {
        const u64 of_keys = ptx::matrix_along_k(rings_.keys + keys_.slot * SIDE_BYTES);
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            const int panel = step / 4, at = step % 4 * 2;  // in units of 16 bytes
            ptx::wgmma_along_k(s, of_queries + (panel * ROWS * 8 + at), of_keys + (panel * TILE * 8 + at), step > 0,
                               ELEMENT{});
        }
        ptx::wgmma_commit();
    }

    CUPY_LORA_DEVICE void multiply_output(float (&acc)[DIM / 8][4], const u32 (&weights)[TILE / 16][4]) const {
        const u64 of_values = ptx::matrix_across_k(rings_.values + values_.slot * SIDE_BYTES, TILE * 128);
#pragma unroll
        for (int step = 0; step < TILE / 16; ++step) {
            ptx::wgmma_across_k(acc, weights[step], of_values + step * 128, ELEMENT{});
        }
        ptx::wgmma_commit();
    }

    // Tiles that none of this warpgroup's rows sees.
    CUPY_LORA_DEVICE void skip(i32 count) {
        for (; count > 0; --count) {
            take_turn();
            give_turn();
            wait_for(rings_.full_keys, keys_);  // a stage is left in its turn
            leave(rings_.empty_keys + keys_.slot);
            keys_.next();
            wait_for(rings_.full_values, values_);
            leave(rings_.empty_values + values_.slot);
            values_.next();
        }
    }

    CUPY_LORA_DEVICE void attend(State& state, const Rows& rows, const u8* queries, float scale, float cap) {
        const int thread = static_cast<int>(threadIdx.x) % CREW;
        const int count = rows.count();
        const int first = min(crew_ * 64, count - 1), last = min(crew_ * 64 + 64, count) - 1;
        const bool idle = crew_ * 64 >= count;
        const i32 all_see_from = rows.oldest(last);
        const i32 all_see_to = rows.newest(first);
        const i32 unit_begin = rows.unit.begin, unit_end = rows.unit.end;
        const i32 end = idle ? unit_begin : min(max(ceil_div(rows.newest(last), TILE), unit_begin), unit_end);
        const i32 begin = idle ? unit_begin : min(rows.oldest(first) / TILE, end);
        Span visible[2];  // from the tile at hand on
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = crew_ * 64 + thread / 32 * 16 + thread % 32 / 4 + 8 * h;
            visible[h] = {rows.oldest(row) - begin * TILE, rows.newest(row) - begin * TILE};
        }
#pragma unroll
        for (int n = 0; n < DIM / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) state.acc[n][i] = 0.f;
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            state.base[h] = minus_infinity();
            state.sum[h] = state.lost[h] = 0.f;
        }
        skip(begin - unit_begin);
        if (begin < end) {
            const u64 of_queries = ptx::matrix_along_k(queries + crew_ * 64 * 128);
            float s[EIGHTS][4];
            float factor[2];
            u32 weights[TILE / 16][4];
            const auto weigh_tile = [&](i32 tile) {
                const bool masked = (tile + 1) * TILE > all_see_to || tile * TILE < all_see_from;
                weigh(s, state, factor, scale, cap, masked, visible);
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    visible[h].first -= TILE;
                    visible[h].end -= TILE;
                }
            };
            wait_for(rings_.full_keys, keys_);
            ptx::wgmma_fence_shared();
            take_turn();
            ptx::wgmma_hold(s);
            ptx::wgmma_fence();
            multiply_scores(s, of_queries);
            give_turn();
            ptx::wgmma_wait<0>();
            ptx::wgmma_hold(s);
            leave(rings_.empty_keys + keys_.slot);
            keys_.next();
            weigh_tile(begin);
            pack(weights, s);
            ptx::wgmma_hold(state.acc);
#pragma unroll 1
            for (i32 tile = begin + 1; tile < end; ++tile) {
                wait_for(rings_.full_keys, keys_);
                wait_for(rings_.full_values, values_);
                ptx::wgmma_fence_shared();
                take_turn();
                ptx::wgmma_hold(s);
                ptx::wgmma_fence();
                multiply_scores(s, of_queries);
                multiply_output(state.acc, weights);
                give_turn();
                ptx::wgmma_wait<1>();
                ptx::wgmma_hold(s);
                leave(rings_.empty_keys + keys_.slot);
                keys_.next();
                weigh_tile(tile);
                ptx::stay_ahead(state.sum[0] + state.sum[1]);
                ptx::wgmma_wait<0>();
                ptx::wgmma_hold(state.acc);
                ptx::wgmma_hold(weights);
                leave(rings_.empty_values + values_.slot);
                values_.next();
                // The base seldom moves after the first step.
                if (__any_sync(0xffffffffu, factor[0] != 1.f || factor[1] != 1.f)) {
#pragma unroll
                    for (int n = 0; n < DIM / 8; ++n) {
#pragma unroll
                        for (int i = 0; i < 4; ++i) state.acc[n][i] *= factor[i / 2];
                    }
                }
                pack(weights, s);
                ptx::wgmma_hold(state.acc);
            }
            wait_for(rings_.full_values, values_);
            ptx::wgmma_fence_shared();
            ptx::wgmma_fence();
            multiply_output(state.acc, weights);
            ptx::wgmma_wait<0>();
            ptx::wgmma_hold(state.acc);
            leave(rings_.empty_values + values_.slot);
            values_.next();
        }
        skip(unit_end - end);
    }

    // The warp's rows to shared memory, where their queries were, then, by 16 bytes where the output allows it, on.
    CUPY_LORA_DEVICE void store(const State& state, const Rows& rows, u8* queries, ELEMENT* out, float* lse,
                                i64 out_stride, float scale) const {
        const int lane = static_cast<int>(threadIdx.x) % 32;
        const int first = crew_ * 64 + static_cast<int>(threadIdx.x) % CREW / 32 * 16;
        const int count = rows.count();
        ptx::barrier_meet(ROWS_BARRIER + crew_, CREW);  // the warpgroup's products have read the queries
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = first + 8 * h + lane / 4;
            const float sum = quad_sum(state.sum[h]);
            const float inverse = sum > 0.f ? 1.f / sum : 0.f;
#pragma unroll
            for (int n = 0; n < DIM / 8; ++n) {
                reinterpret_cast<u32*>(queries + place_of(ROWS, row, n))[lane % 4] =
                    pack2(state.acc[n][2 * h] * inverse, state.acc[n][2 * h + 1] * inverse, ELEMENT{});
            }
            if (lse != nullptr && lane % 4 == 0 && row < count) {
                lse[rows.token(row) * (HEADS * GROUP) + rows.head(row)] =
                    sum > 0.f ? (state.base[h] * scale + log2f(sum)) * LN2 : minus_infinity();
            }
        }
        __syncwarp();
#pragma unroll 4
        for (int e = lane; e < 16 * PIECES; e += 32) {
            const int row = first + e / PIECES;
            const int piece = e % PIECES;
            if (row >= count) break;
            const u8* const from = queries + place_of(ROWS, row, piece);
            ELEMENT* const to = out + rows.token(row) * out_stride + rows.head(row) * DIM + piece * 8;
            if constexpr (VECTORS) {
                *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
            } else {
#pragma unroll
                for (int i = 0; i < 8; ++i) to[i].bits = reinterpret_cast<const u16*>(from)[i];
            }
        }
    }

    const Rings& rings_;
    const int crew_;
    Turn<KEY_STAGES> keys_;
    Turn<STAGES> values_;
};
