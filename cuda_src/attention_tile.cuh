// The products of prefill: 16-row blocks of queries with tiles of keys and values by mma.sync, the softmax kept online.
//
//   s = q k^T, y = scale * s (or soft_cap * tanh(s sm_scale / soft_cap)), o = sum_j exp2(y_j - base) v_j
//
// Operands lie in shared memory as attention_stage.cuh leaves them.
#pragma once
#include "attention_stage.cuh"

// ---- 16-row blocks of queries over keys ---------------------------------------------------------
// What a warp holds of M blocks: accumulators as mma fragments, and for rows g and g + 8 of each block the
// base of the exponents (a score, before scaling) and this lane's part of the sum of the weights. `lost` is what
// rounding added to that sum (Kahan): without it, equal weights of a million keys all err the same way, by 1e-4
// together.
template <int M>
struct Block {
    float acc[M][DIM / 8][4];
    float base[M][2];
    float sum[M][2];
    float lost[M][2];
};

struct Span {
    i32 first, end;
};

template <int M>
CUPY_LORA_DEVICE void clear(Block<M>& block) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int n = 0; n < DIM / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) block.acc[m][n][i] = 0.f;
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            block.base[m][h] = minus_infinity();
            block.sum[m][h] = 0.f;
            block.lost[m][h] = 0.f;
        }
    }
}

// One step of the online softmax over KEYS keys; the whole warp takes part. `scale` turns a score into an exponent of
// two; soft_cap: a score s is tanh(s * cap) first.
// visible(m, h): the keys that row g + 8 h of block m sees, (first, end); asked where `masked`.
template <int M, int KEYS, class Visible>
CUPY_LORA_DEVICE void attend(Block<M>& block, const u8* queries, const u8* keys, const u8* values, float scale,
                             float cap, bool masked, Visible visible) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const u8* const q = queries + lane % 16 * ROW_BYTES + lane / 16 * 16;
    const u8* const k = keys + (lane / 16 * 8 + lane % 8) * ROW_BYTES + lane / 8 % 2 * 16;
    const u8* const v = values + lane % 16 * ROW_BYTES + lane / 16 * 16;
    float s[M][KEYS / 8][4];
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) s[m][n][i] = 0.f;
        }
    }
#pragma unroll
    for (int step = 0; step < DIM / 16; ++step) {
        u32 a[M][4];
#pragma unroll
        for (int m = 0; m < M; ++m) ptx::load_matrices(a[m], q + m * 16 * ROW_BYTES + step * 32);
#pragma unroll
        for (int n = 0; n < KEYS / 16; ++n) {
            u32 b[4];
            ptx::load_matrices(b, k + n * 16 * ROW_BYTES + step * 32);
#pragma unroll
            for (int m = 0; m < M; ++m) {
                ptx::mma_m16n8k16(s[m][2 * n], a[m][0], a[m][1], a[m][2], a[m][3], b[0], b[1], ELEMENT{});
                ptx::mma_m16n8k16(s[m][2 * n + 1], a[m][0], a[m][1], a[m][2], a[m][3], b[2], b[3], ELEMENT{});
            }
        }
    }
    if constexpr (SOFT_CAP) {
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) s[m][n][i] = tanh_of(s[m][n][i] * cap);
            }
        }
    }
    if (masked) {
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const Span span = visible(m, h);
#pragma unroll
                for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const int key = n * 8 + lane % 4 * 2 + i;
                        if (key < span.first || key >= span.end) s[m][n][2 * h + i] = minus_infinity();
                    }
                }
            }
        }
    }
    u32 weights[M][KEYS / 8][2];
#pragma unroll
    for (int m = 0; m < M; ++m) {
        float factor[2] = {1.f, 1.f};
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float top = minus_infinity();
#pragma unroll
            for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 2; ++i) top = fmaxf(top, s[m][n][2 * h + i]);
            }
            top = quad_max(top);
            const float old = block.base[m][h] * scale;
            const bool rises = fmaf(top, scale, -old) > SLACK;
            if (rises) block.base[m][h] = top;
            // Nothing visible yet: any finite base gives weights of 0.
            const float base = block.base[m][h] == minus_infinity() ? 0.f : block.base[m][h] * scale;
            factor[h] = rises ? ptx::exp2_approx(old - base) : 1.f;
            float sum = 0.f;
#pragma unroll
            for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float& weight = s[m][n][2 * h + i];
                    weight = ptx::exp2_approx(fmaf(weight, scale, -base));
                    sum += weight;
                }
                weights[m][n][h] = pack2(s[m][n][2 * h], s[m][n][2 * h + 1], ELEMENT{});
            }
            const float before = block.sum[m][h] * factor[h];
            const float added = fmaf(-block.lost[m][h], factor[h], sum);
            block.sum[m][h] = before + added;
            block.lost[m][h] = (block.sum[m][h] - before) - added;
        }
        // The base seldom moves after the first step.
        if (__any_sync(0xffffffffu, factor[0] != 1.f || factor[1] != 1.f)) {
#pragma unroll
            for (int n = 0; n < DIM / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) block.acc[m][n][i] *= factor[i / 2];
            }
        }
    }
#pragma unroll
    for (int j = 0; j < KEYS / 16; ++j) {
        u32 a[M][4];
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int i = 0; i < 4; ++i) a[m][i] = weights[m][2 * j + i / 2][i % 2];
        }
#pragma unroll
        for (int n = 0; n < DIM / 16; ++n) {
            u32 b[4];
            ptx::load_matrices_transposed(b, v + j * 16 * ROW_BYTES + n * 32);
#pragma unroll
            for (int m = 0; m < M; ++m) {
                ptx::mma_m16n8k16(block.acc[m][2 * n], a[m][0], a[m][1], a[m][2], a[m][3], b[0], b[1], ELEMENT{});
                ptx::mma_m16n8k16(block.acc[m][2 * n + 1], a[m][0], a[m][1], a[m][2], a[m][3], b[2], b[3], ELEMENT{});
            }
        }
    }
}
