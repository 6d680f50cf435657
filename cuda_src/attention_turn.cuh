// Decode's rotary embedding, in registers. What a score depends on is the distance of query and key, so a key is not
// turned by its position but by its place among the warp's keys of a tile, which is the same in every tile: 16 angles
// a pair, for the whole launch. The query is turned by its distance from the warp's first key instead, tile by tile:
// GROUP rows for 16 keys. That distance shrinks by TILE from tile to tile; its angle is worked out anew at the start of
// a chunk and turned on by a constant one within it (up to 128 times: an error of 1e-5 at most, of 16-bit numbers).
#pragma once
#include "attention_lanes.cuh"

constexpr int QUARTER_WORDS = DIM / 4;  // of a row, half of its words: each with its partner holds two pairs
constexpr int ANGLE_BYTES = DIM * 4 + (DIM % 32 == 0 ? 64 : 0);  // of a key; two keys' in different banks
constexpr int OPERAND_ROWS = ROWS < 8 ? ROWS : 8;
constexpr int OPERAND_BYTES = STEPS * OPERAND_ROWS * 64;  // of a warp's turned queries
constexpr int OWN_WORDS = ceil_div(QUARTER_WORDS, 32);    // of a row of queries, that a lane turns

// cos and sin of the angles of two pairs.
CUPY_LORA_DEVICE float4 angles_at(const Turns& frequencies, int word, i32 distance) {
    const float2 first = angle_at(frequencies.turns[2 * word], distance);
    const float2 second = angle_at(frequencies.turns[2 * word + 1], distance);
    return make_float4(first.x, first.y, second.x, second.y);
}

CUPY_LORA_DEVICE float4 added(float4 x, float4 y) {
    return make_float4(x.x * y.x - x.y * y.y, x.y * y.x + x.x * y.y, x.z * y.z - x.w * y.w, x.w * y.z + x.z * y.w);
}

// Two pairs: `low` has their first elements, `high` their second ones.
CUPY_LORA_DEVICE void turn(u32& low, u32& high, float4 angle) {
    float a0, a1, b0, b1;
    unpack2(low, a0, a1, ELEMENT{});
    unpack2(high, b0, b1, ELEMENT{});
    low = pack2(a0 * angle.x - b0 * angle.y, a1 * angle.z - b1 * angle.w, ELEMENT{});
    high = pack2(b0 * angle.x + a0 * angle.y, b1 * angle.z + a1 * angle.w, ELEMENT{});
}

// Where the angles of a word are in an entry of the table, for the lanes that read them together.
CUPY_LORA_DEVICE int angle_place(int word) {
    const int unit = word / UNIT_WORDS;
    return (unit / 4 * UNIT_WORDS + word % UNIT_WORDS) * 4 + unit % 4;
}

// Angles of the keys, for all warps that multiply (together): of key e % 4 of those that a warp takes of quarter e / 4.
// The last entry is what a query turns from tile to tile.
CUPY_LORA_DEVICE void fill_angles(u8* table, const Turns& frequencies) {
    for (int at = static_cast<int>(threadIdx.x); at < 17 * QUARTER_WORDS; at += 32 * WARPS) {
        const int e = at / QUARTER_WORDS;
        const int word = at % QUARTER_WORDS;
        reinterpret_cast<float4*>(table + e * ANGLE_BYTES)[angle_place(word)] =
            angles_at(frequencies, word, e < 16 ? e / 4 * QUARTER + e % 4 : -TILE);
    }
}

// The queries of a unit, turned for each tile, as operands in shared memory: [STEPS][OPERAND_ROWS][t] of 16 bytes.
class TurnedQueries {
  public:
    CUPY_LORA_DEVICE TurnedQueries(const Turns& frequencies, const u8* angles, u8* operands)
        : frequencies_(frequencies), angles_(angles), operands_(reinterpret_cast<u32*>(operands)) {}

    // The distance of the query from the warp's first key, exactly; or a tile further.
    CUPY_LORA_DEVICE void begin(i32 distance) {
#pragma unroll
        for (int k = 0; k < OWN_WORDS; ++k) angle_[k] = angles_at(frequencies_, own_word(k), distance);
    }
    CUPY_LORA_DEVICE void advance() {
#pragma unroll
        for (int k = 0; k < OWN_WORDS; ++k) {
            const float4* const step = reinterpret_cast<const float4*>(angles_ + 16 * ANGLE_BYTES);
            angle_[k] = added(angle_[k], step[angle_place(own_word(k))]);
        }
    }

    CUPY_LORA_DEVICE void load(const u8* rows, int count) {
        const int lane = static_cast<int>(threadIdx.x) % 32;
        __syncwarp();  // the operands of the tile before have been read
#pragma unroll
        for (int k = 0; k < OWN_WORDS; ++k) {
            const int word = lane + 32 * k;
            if (QUARTER_WORDS % 32 != 0 && word >= QUARTER_WORDS) break;
#pragma unroll OWN_WORDS == 1 ? 4 : 1
            for (int row = 0; row < ROWS; ++row) {
                const u32* const from = reinterpret_cast<const u32*>(rows + row * ROW_BYTES) + word;
                u32 low = from[0];
                u32 high = from[QUARTER_WORDS];
                turn(low, high, angle_[k]);
                store(row, word, row < count ? low : 0u);
                store(row, word + QUARTER_WORDS, row < count ? high : 0u);
            }
        }
        __syncwarp();
    }

    CUPY_LORA_DEVICE uint4 operand(int step) const {
        const int lane = static_cast<int>(threadIdx.x) % 32;
        return reinterpret_cast<const uint4*>(
            operands_)[step * (OPERAND_ROWS * 4) + min(lane / 4, OPERAND_ROWS - 1) * 4 + lane % 4];
    }

    // The units i and i + LANE_UNITS / 2 of a lane's key of product n.
    CUPY_LORA_DEVICE void turn_keys(u32 (&b)[LANE_WORDS], int i, int n) const {
        const int lane = static_cast<int>(threadIdx.x) % 32;
        const int g = lane / 4;
        const u8* const row = angles_ + (g / 2 * 4 + 2 * n + g % 2) * ANGLE_BYTES + lane % 4 * 16;
        const int shift = FLIP && g % 2 == 1 ? UNIT_WORDS * 64 : 0;
        const u8* const unit = row + i * (UNIT_WORDS * 64) + (i % 2 == 0 ? shift : -shift);
#pragma unroll
        for (int j = 0; j < UNIT_WORDS; ++j) {
            turn(b[i * UNIT_WORDS + j], b[(i + LANE_UNITS / 2) * UNIT_WORDS + j],
                 *reinterpret_cast<const float4*>(unit + j * 64));
        }
    }

  private:
    static CUPY_LORA_DEVICE int own_word(int k) {
        return min(static_cast<int>(threadIdx.x) % 32 + 32 * k, QUARTER_WORDS - 1);
    }

    // A word of a query where the products take it from.
    CUPY_LORA_DEVICE void store(int row, int word, u32 value) {
        const int unit = word / UNIT_WORDS;
        const auto put = [&](int i, int h) {
            const int at = i * UNIT_WORDS + word % UNIT_WORDS;  // of the words of a lane
            operands_[((at / 2 * OPERAND_ROWS + row % 8) * 4 + unit % 4) * 4 + at % 2 * 2 + h] = value;
        };
        if constexpr (HALVES == 2) {
            put(unit / 4, row / 8);
        } else {
            put(unit / 4, 0);
            put(FLIP ? unit / 4 ^ 1 : unit / 4, 1);
        }
    }

    const Turns& frequencies_;
    const u8* angles_;
    u32* operands_;
    float4 angle_[OWN_WORDS];
};
