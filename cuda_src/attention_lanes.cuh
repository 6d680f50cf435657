// Decode's products: the queries of a unit with the tiles that attention_stream.cuh brings, by mma.sync.
//
//   s = q k^T, y = scale * s (or soft_cap * tanh(s sm_scale / soft_cap)), o^T = sum_j v_j^T exp2(y_j - base)
//
// A warp takes four keys of each quarter of a tile, 16 together. Scores have the queries as rows (a whole operand of
// 16, of which GROUP are there), the output has them as columns: so weights are the other operand as they come, and
// rows that are no query cost nothing. Operands are read 4, 8 or 16 bytes a lane (a "unit" of elements) instead of by
// ldmatrix, whose rows would all lie in the same banks. With g = lane / 4 and t = lane % 4:
//
//   keys: column g of product n is key g % 2 + 2 n of quarter g / 2; its elements are the units t + 4 i
//   values: as k, 2t, 2t + 1, 2t + 8, 2t + 9 are the four keys of quarter t; the elements of row g are units g + 8 i
//
// FLIP: two keys of a quarter, side by side in g, lie in the same banks. So lanes of odd g read units i and i ^ 1 the
// other way round, and their scores are in rows 8 to 15, where the queries' elements are the other way round too.
#pragma once
#include "attention_stream.cuh"

constexpr int HALVES = ROWS > 8 ? 2 : 1;  // of 8 queries
constexpr int UNIT_WORDS = DIM % 64 == 0 ? 4 : DIM % 32 == 0 ? 2 : 1;
constexpr int LANE_WORDS = DIM / 8;  // of a row of keys
constexpr int LANE_UNITS = LANE_WORDS / UNIT_WORDS;
constexpr int VALUE_UNITS = LANE_UNITS / 2;  // of a row of values
constexpr int STEPS = DIM / 16;              // products of 16 elements a row
constexpr bool FLIP = HALVES == 1 && DIM % (ROPE ? 128 : 64) == 0;
constexpr int SPREAD = 3 * QUARTER + 4;  // from a warp's first key past its last

// What a warp holds of a chunk: the output as mma fragments [half][16 elements], and for query g of each half the base
// of the exponents (a score, before scaling) and this lane's part of the sum of the weights. `lost` is what rounding
// added to that sum (Kahan): without it, equal weights of a million keys all err the same way, by 1e-4 together.
struct Block {
    float acc[HALVES][STEPS][4];
    float base[HALVES];
    float sum[HALVES];
    float lost[HALVES];
};

CUPY_LORA_DEVICE void clear(Block& block) {
#pragma unroll
    for (int h = 0; h < HALVES; ++h) {
#pragma unroll
        for (int m = 0; m < STEPS; ++m) {
#pragma unroll
            for (int i = 0; i < 4; ++i) block.acc[h][m][i] = 0.f;
        }
        block.base[h] = minus_infinity();
        block.sum[h] = 0.f;
        block.lost[h] = 0.f;
    }
}

struct alignas(4 * UNIT_WORDS) Words {
    u32 word[UNIT_WORDS];
};

CUPY_LORA_DEVICE Words words_at(const u8* p) { return *reinterpret_cast<const Words*>(p); }

CUPY_LORA_DEVICE u32 low_halves(u32 a, u32 b) { return (a & 0xffffu) | b << 16; }
CUPY_LORA_DEVICE u32 high_halves(u32 a, u32 b) { return a >> 16 | (b & 0xffff0000u); }

// Of a lane that reads the units i of a row the other way round, two and two: from `row` (of unit t), i's.
CUPY_LORA_DEVICE const u8* unit_of(const u8* row, int i, bool flipped) {
    constexpr int STRIDE = 16 * UNIT_WORDS;
    const int shift = flipped ? STRIDE : 0;
    return row + i * STRIDE + (i % 2 == 0 ? shift : -shift);
}

// The queries of a unit as operands of the scores' products, in registers.
class Queries {
  public:
    CUPY_LORA_DEVICE void load(const u8* rows, int count) {
        const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = lane / 4 + (HALVES == 2 ? 8 * h : 0);
            const u8* const from = rows + min(row, ROWS - 1) * ROW_BYTES + lane % 4 * (4 * UNIT_WORDS);
#pragma unroll
            for (int i = 0; i < LANE_UNITS; ++i) {
                const Words unit = words_at(unit_of(from, i, FLIP && h == 1));
#pragma unroll
                for (int j = 0; j < UNIT_WORDS; ++j) {
                    const int word = i * UNIT_WORDS + j;
                    a_[word / 2][word % 2 * 2 + h] = row < count ? unit.word[j] : 0u;
                }
            }
        }
    }

    CUPY_LORA_DEVICE uint4 operand(int step) const {
        return make_uint4(a_[step][0], a_[step][1], a_[step][2], a_[step][3]);
    }

    CUPY_LORA_DEVICE void turn_keys(u32 (&)[LANE_WORDS], int, int) const {}

  private:
    u32 a_[STEPS][4];
};

// One step of the online softmax over the warp's 16 keys of a tile. keys, values: the tile's. visible keys are those
// from `oldest` to `length` - 1, the warp's first is `first`, where some of them are not.
template <class A>
CUPY_LORA_DEVICE void attend(Block& block, const A& queries, const u8* keys, const u8* values, float scale, float cap,
                             bool masked, i32 first, i32 oldest, i32 length) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int g = lane / 4;
    const int t = lane % 4;
    float s[HALVES][2][2];  // of query g + 8 h: keys 2 n + i of quarter t
#pragma unroll
    for (int n = 0; n < 2; ++n) {
        const int key = 4 * warp + 2 * n + g % 2;
        const u8* const row = keys + g / 2 * QUARTER_BYTES + key * ROW_BYTES + t * (4 * UNIT_WORDS);
        u32 b[LANE_WORDS];
        float c[4] = {0.f, 0.f, 0.f, 0.f};
        const auto multiply = [&](int step, const u32(&words)[LANE_WORDS]) {
            const uint4 a = queries.operand(step);
            ptx::mma_m16n8k16(c, a.x, a.y, a.z, a.w, words[2 * step], words[2 * step + 1], ELEMENT{});
        };
        // Two units at a time, whose elements RoPE pairs: fewer registers than a row at a time.
#pragma unroll
        for (int i = 0; i < LANE_UNITS / 2; ++i) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int at = i + half * (LANE_UNITS / 2);
                const Words unit = words_at(unit_of(row, at, FLIP && g % 2 == 1));
#pragma unroll
                for (int j = 0; j < UNIT_WORDS; ++j) b[at * UNIT_WORDS + j] = unit.word[j];
            }
            queries.turn_keys(b, i, n);
#pragma unroll
            for (int step = 0; step < UNIT_WORDS / 2; ++step) {
                multiply(i * (UNIT_WORDS / 2) + step, b);
                multiply((i + LANE_UNITS / 2) * (UNIT_WORDS / 2) + step, b);
            }
        }
#pragma unroll
        for (int step = 0; UNIT_WORDS == 1 && step < STEPS; ++step) multiply(step, b);
        s[0][n][0] = c[0];
        s[0][n][1] = FLIP ? c[3] : c[1];
        if constexpr (HALVES == 2) {
            s[1][n][0] = c[2];
            s[1][n][1] = c[3];
        }
    }
    u32 weights[HALVES][2];
#pragma unroll
    for (int h = 0; h < HALVES; ++h) {
        float top = minus_infinity();
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float& score = s[h][n][i];
                if constexpr (SOFT_CAP) score = tanh_of(score * cap);
                if (masked) {
                    const i32 position = first + t * QUARTER + 2 * n + i;
                    if (position < oldest || position >= length) score = minus_infinity();
                }
                top = fmaxf(top, score);
            }
        }
        top = quad_max(top);
        const float old = block.base[h] * scale;
        const bool rises = fmaf(top, scale, -old) > SLACK;
        if (rises) block.base[h] = top;
        // Nothing visible yet: any finite base gives weights of 0.
        const float base = block.base[h] == minus_infinity() ? 0.f : block.base[h] * scale;
        float factor = 1.f;
        if (__any_sync(0xffffffffu, rises)) {
            if (rises) factor = ptx::exp2_approx(old - base);
            const float even = __shfl_sync(0xffffffffu, factor, t * 8);
            const float odd = __shfl_sync(0xffffffffu, factor, t * 8 + 4);
#pragma unroll
            for (int m = 0; m < STEPS; ++m) {
                block.acc[h][m][0] *= even;
                block.acc[h][m][1] *= odd;
                block.acc[h][m][2] *= even;
                block.acc[h][m][3] *= odd;
            }
        }
        float sum = 0.f;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                s[h][n][i] = ptx::exp2_approx(fmaf(s[h][n][i], scale, -base));
                sum += s[h][n][i];
            }
            weights[h][n] = pack2(s[h][n][0], s[h][n][1], ELEMENT{});
        }
        const float before = block.sum[h] * factor;
        const float added = fmaf(-block.lost[h], factor, sum);
        block.sum[h] = before + added;
        block.lost[h] = (block.sum[h] - before) - added;
    }
    const u8* const rows = values + t * QUARTER_BYTES + 4 * warp * ROW_BYTES + g * (4 * UNIT_WORDS);
#pragma unroll
    for (int i = 0; i < VALUE_UNITS; ++i) {
        Words unit[4];
#pragma unroll
        for (int key = 0; key < 4; ++key) unit[key] = words_at(rows + key * ROW_BYTES + i * (32 * UNIT_WORDS));
#pragma unroll
        for (int j = 0; j < UNIT_WORDS; ++j) {
            const u32 a0 = low_halves(unit[0].word[j], unit[1].word[j]);
            const u32 a1 = high_halves(unit[0].word[j], unit[1].word[j]);
            const u32 a2 = low_halves(unit[2].word[j], unit[3].word[j]);
            const u32 a3 = high_halves(unit[2].word[j], unit[3].word[j]);
#pragma unroll
            for (int h = 0; h < HALVES; ++h) {
                float (&acc)[4] = block.acc[h][i * UNIT_WORDS + j];
                ptx::mma_m16n8k16(acc, a0, a1, a2, a3, weights[h][0], weights[h][1], ELEMENT{});
            }
        }
    }
}
