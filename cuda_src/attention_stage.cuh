// What brings the operands of prefill into shared memory: tiles of keys and values from the pages by asynchronous
// copies, several tiles ahead, and queries; rotated by their positions where asked.
//
// A staged row is DIM elements and 16 bytes of nothing: an odd number of 16-byte pieces a row, so that the
// eight rows of an ldmatrix lie in different banks, without a permutation in the addresses.
#pragma once
#include "attention_cache.cuh"

constexpr int THREADS = 32 * WARPS;
constexpr int ROW_BYTES = DIM * 2 + 16;       // of a staged row
constexpr int SIDE_BYTES = TILE * ROW_BYTES;  // of a tile's keys, or values
constexpr int STAGE_BYTES = 2 * SIDE_BYTES;
constexpr int LANES = PIECES / 2;                                       // threads that rotate one row, 8 pairs each
constexpr int ROUND = THREADS / LANES < TILE ? THREADS / LANES : TILE;  // rows that a block rotates at a time
constexpr int NEAR = 8;                                                 // positions of the near table
constexpr int FAR = ceil_div(ROUND, NEAR);                              // entries of the far table of one tile

static_assert(TILE <= THREADS, "one thread finds the page of a row");

// ---- rotary embedding ---------------------------------------------------------------------------
// A position is a multiple of NEAR and a rest. cos and sin of the angles of the rests are in the near table
// [NEAR + 1][PAIRS], those of the multiples in a far table [..][PAIRS]; their complex product is the angle's. The near
// table's last entry is the angle of ROUND positions. In an entry, the first two of each 8 pairs come first, then the
// second two and so on: threads side by side read pieces side by side.
// Entry i: the angles at position first + i * step.
CUPY_LORA_DEVICE void fill_angles(float2* table, int entries, i32 first, i32 step, const Turns& frequencies) {
    for (int e = static_cast<int>(threadIdx.x); e < entries * PAIRS; e += THREADS) {
        const int at = e % PAIRS;
        const int pair = at / 2 % LANES * 8 + at / 2 / LANES * 2 + at % 2;
        table[e] = angle_at(frequencies.turns[pair], first + e / PAIRS * step);
    }
}

CUPY_LORA_DEVICE void fill_near(float2* near, const Turns& frequencies) {
    fill_angles(near, NEAR, 0, 1, frequencies);
    fill_angles(near + NEAR * PAIRS, 1, ROUND, 0, frequencies);
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

// Rotates the pairs (d, d + DIM / 2) for d from 8 * unit on of a staged row in place.
CUPY_LORA_DEVICE void rotate_piece(u8* row, int unit, const Angles& angles) {
    uint4* const low = reinterpret_cast<uint4*>(row) + unit;
    Piece a = {low[0]};
    Piece b = {low[LANES]};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float4 angle = angles.two[i];
        float a0, a1, b0, b1;
        unpack2(a.words[i], a0, a1, ELEMENT{});
        unpack2(b.words[i], b0, b1, ELEMENT{});
        a.words[i] = pack2(a0 * angle.x - b0 * angle.y, a1 * angle.z - b1 * angle.w, ELEMENT{});
        b.words[i] = pack2(b0 * angle.x + a0 * angle.y, b1 * angle.z + a1 * angle.w, ELEMENT{});
    }
    low[0] = a.quad;
    low[LANES] = b.quad;
}

// Rows of queries. position(row) is that of a row; far holds the entries from position NEAR * first_far on.
template <class Position>
CUPY_LORA_DEVICE void rotate_rows(u8* rows, int count, const float2* near, const float2* far, i32 first_far,
                                  Position position) {
    for (int e = static_cast<int>(threadIdx.x); e < count * LANES; e += THREADS) {
        const i32 at = position(e / LANES);
        const int unit = e % LANES;
        const Angles rest = angles_of(near, at % NEAR, unit);
        rotate_piece(rows + e / LANES * ROW_BYTES, unit, added(rest, angles_of(far, at / NEAR - first_far, unit)));
    }
}

// The keys of a tile; far: of its first ROUND positions. A thread's further rows are ROUND apart, each one's angles
// four multiplications per pair from the last one's.
CUPY_LORA_DEVICE void rotate_tile(u8* rows, const float2* near, const float2* far) {
    const int unit = static_cast<int>(threadIdx.x) % LANES;
    const int first = static_cast<int>(threadIdx.x) / LANES;
    if (first >= ROUND) return;
    Angles angles = added(angles_of(near, first % NEAR, unit), angles_of(far, first / NEAR, unit));
#pragma unroll 1
    for (int row = first; row < TILE; row += ROUND) {
        rotate_piece(rows + row * ROW_BYTES, unit, angles);
        angles = added(angles, angles_of(near, NEAR, unit));  // read again: prefill has no registers to keep it
    }
}

// ---- staging ------------------------------------------------------------------------------------
struct Staging {
    u8* stages;      // [STAGES][keys, values][TILE] rows
    u64* addresses;  // [STAGES][TILE], where the rows of the tiles to come lie
    float2* near;    // [NEAR + 1][PAIRS]
    float2* far;     // [FAR][PAIRS], of the tile
};

CUPY_LORA_DEVICE Staging carve_staging(u8*& shared) {
    Staging staging;
    staging.stages = carve<u8>(shared, STAGES * STAGE_BYTES);
    staging.addresses = carve<u64>(shared, STAGES * TILE);
    staging.near = carve<float2>(shared, ROPE ? (NEAR + 1) * PAIRS : 0);
    staging.far = carve<float2>(shared, ROPE ? FAR * PAIRS : 0);
    return staging;
}

CUPY_LORA_DEVICE void copy_tile(const Staging& staging, int slot) {
    u8* const stage = staging.stages + slot * STAGE_BYTES;
    const u64* const addresses = staging.addresses + slot * TILE;
    const int tid = static_cast<int>(threadIdx.x);
#pragma unroll
    for (int i = 0; i < ceil_div(TILE * PIECES, THREADS); ++i) {
        // One base and constants where a round is a number of whole rows.
        constexpr bool WHOLE = THREADS % PIECES == 0;
        const int row = WHOLE ? tid / PIECES + i * (THREADS / PIECES) : (tid + i * THREADS) / PIECES;
        const int piece = WHOLE ? tid % PIECES : (tid + i * THREADS) % PIECES;
        if (TILE * PIECES % THREADS != 0 && row >= TILE) break;
        const u64 address = addresses[row];
        const u8* const key = reinterpret_cast<const u8*>(address) + piece * 16;
        u8* const to = stage + row * ROW_BYTES + piece * 16;
        ptx::copy_async_16(to, key, address != 0);
        ptx::copy_async_16(to + SIDE_BYTES, key + PAGE_SIDE, address != 0);
    }
}

// Rows of queries, 16-byte pieces, from row(r), which is null where there is none (zeros then); not committed.
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
}
