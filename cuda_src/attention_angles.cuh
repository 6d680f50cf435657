// The rotary embedding of rows that lie in shared memory as 16-byte pieces: tables of angles, 8 pairs at a time.
#pragma once
#include "attention_cache.cuh"

constexpr int LANES = PIECES / 2;  // threads that rotate one row, 8 pairs each
constexpr int NEAR = 8;            // positions of the near table of the queries

// A table's entry has (cos, sin) of the angles of all pairs: the first two of each 8 pairs come first, then the second
// two and so on, so that threads side by side read pieces side by side.
// Entry i: the angles at position first + i * step. By COUNT threads, the first of which has a multiple as number.
template <int COUNT>
CUPY_LORA_DEVICE void fill_angles(float2* table, int entries, i32 first, i32 step, const Turns& frequencies) {
#pragma unroll 4
    for (int e = static_cast<int>(threadIdx.x) % COUNT; e < entries * PAIRS; e += COUNT) {
        const int at = e % PAIRS;
        const int pair = at / 2 % LANES * 8 + at / 2 / LANES * 2 + at % 2;
        table[e] = angle_at(frequencies.turns[pair], first + e / PAIRS * step);
    }
}

// Of 8 pairs, two a float4: (cos, sin, cos, sin).
struct Angles {
    float4 two[4];
};

CUPY_LORA_DEVICE Angles angles_of(const float2* table, int entry, int unit) {
    Angles angles;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        angles.two[i] = reinterpret_cast<const float4*>(table + entry * PAIRS)[i * LANES + unit];
    }
    return angles;
}

CUPY_LORA_DEVICE Angles added(const Angles& a, const Angles& b) {
    Angles sum;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float4 x = a.two[i];
        const float4 y = b.two[i];
        sum.two[i] =
            make_float4(x.x * y.x - x.y * y.y, x.y * y.x + x.x * y.y, x.z * y.z - x.w * y.w, x.w * y.z + x.z * y.w);
    }
    return sum;
}

union Piece {
    uint4 quad;
    u32 words[4];
};

// Rotates 8 pairs in place, of which one piece has the first elements and the other the second ones.
CUPY_LORA_DEVICE void rotate_pieces(uint4* low, uint4* high, const Angles& angles) {
    Piece a = {*low};
    Piece b = {*high};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float4 angle = angles.two[i];
        float a0, a1, b0, b1;
        unpack2(a.words[i], a0, a1, ELEMENT{});
        unpack2(b.words[i], b0, b1, ELEMENT{});
        a.words[i] = pack2(a0 * angle.x - b0 * angle.y, a1 * angle.z - b1 * angle.w, ELEMENT{});
        b.words[i] = pack2(b0 * angle.x + a0 * angle.y, b1 * angle.z + a1 * angle.w, ELEMENT{});
    }
    *low = a.quad;
    *high = b.quad;
}
