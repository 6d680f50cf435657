// What brings the operands of prefill into shared memory: tiles of keys and values from the pages by asynchronous
// copies, several tiles ahead, and queries; rotated by their positions where asked.
//
// A staged row is DIM elements and 16 bytes of nothing: an odd number of 16-byte pieces a row, so that the
// eight rows of an ldmatrix lie in different banks, without a permutation in the addresses.
#pragma once
#include "attention_angles.cuh"

constexpr int THREADS = 32 * WARPS;
constexpr int ROW_BYTES = DIM * 2 + 16;       // of a staged row
constexpr int SIDE_BYTES = TILE * ROW_BYTES;  // of a tile's keys, or values
constexpr int STAGE_BYTES = 2 * SIDE_BYTES;

constexpr CUPY_LORA_DEVICE int power_within(int n) { return n < 2 ? 1 : 2 * power_within(n / 2); }

constexpr int ROUND = power_within(THREADS / LANES < TILE ? THREADS / LANES : TILE);  // rows rotated at a time
constexpr int TURNERS = ROUND * LANES;                                                // threads that rotate keys
constexpr int RENEWAL = 64;  // tiles, after which the angles of keys are worked out anew
constexpr int ANGLE_BYTES = ROPE ? (TURNERS * 8 + PAIRS) * 8 : 0;

static_assert(TILE <= THREADS && TILE % ROUND == 0, "one thread finds the page of a row, rounds are whole");
static_assert(STAGES >= (ROPE ? 3 : 2), "a tile is multiplied, one rotated and one under way");

// ---- rotary embedding ---------------------------------------------------------------------------
// Rows of queries. A position is a multiple of NEAR and a rest; the complex product of their entries is its angle.
// position(row) is that of a row; near: the entries of 0 .. NEAR - 1, far: of multiples of NEAR from first_far on.
template <class Position>
CUPY_LORA_DEVICE void rotate_rows(u8* rows, int count, const float2* near, const float2* far, i32 first_far,
                                  Position position) {
#pragma unroll 2
    for (int e = static_cast<int>(threadIdx.x); e < count * LANES; e += THREADS) {
        const i32 at = position(e / LANES);
        const int unit = e % LANES;
        const Angles rest = angles_of(near, at % NEAR, unit);
        uint4* const low = reinterpret_cast<uint4*>(rows + e / LANES * ROW_BYTES) + unit;
        rotate_pieces(low, low + LANES, added(rest, angles_of(far, at / NEAR - first_far, unit)));
    }
}

// The keys of the tiles, tile after tile. A thread rotates the same 8 pairs of the same rows of every tile, ROUND rows
// apart: four multiplications a pair turn the angles of one row into those of the next, from tile to tile too.
class Turner {
  public:
    // space: ANGLE_BYTES, filled by begin() (all threads; then a barrier).
    CUPY_LORA_DEVICE Turner(u8* space, const Turns& frequencies)
        : own_(reinterpret_cast<float2*>(space)), step_(own_ + TURNERS * 8), frequencies_(frequencies) {}

    // tile: the first one that will be rotated.
    CUPY_LORA_DEVICE void begin(i32 tile) const {
        fill_angles<THREADS>(step_, 1, ROUND, 0, frequencies_);
#pragma unroll
        for (int i = 0; i < 8; ++i) renew(tile, i);
    }

    // fresh: the tile is the first one.
    CUPY_LORA_DEVICE void rotate(u8* rows, i32 tile, bool fresh) const {
        const int thread = static_cast<int>(threadIdx.x);
        if (TURNERS < THREADS && thread >= TURNERS) return;
        const int unit = thread % LANES;
        const int begin = thread / LANES;
        if (!fresh && tile % RENEWAL == 0) {
#pragma unroll 1
            for (int i = 0; i < 8; ++i) renew(tile, i);
        }
        float4* const own = reinterpret_cast<float4*>(own_) + thread;
        Angles angles;
#pragma unroll
        for (int i = 0; i < 4; ++i) angles.two[i] = own[i * TURNERS];
#pragma unroll 1
        for (int row = begin; row < TILE; row += ROUND) {
            uint4* const low = reinterpret_cast<uint4*>(rows + row * ROW_BYTES) + unit;
            rotate_pieces(low, low + LANES, angles);
            angles = added(angles, angles_of(step_, 0, unit));  // read again: there are no registers to keep it
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) own[i * TURNERS] = angles.two[i];
    }

  private:
    // The angle of a thread's pair i in its first row of a tile.
    CUPY_LORA_DEVICE void renew(i32 tile, int i) const {
        const int thread = static_cast<int>(threadIdx.x);
        if (TURNERS < THREADS && thread >= TURNERS) return;
        own_[(i / 2 * TURNERS + thread) * 2 + i % 2] =
            angle_at(frequencies_.turns[thread % LANES * 8 + i], tile * TILE + thread / LANES);
    }

    float2* own_;   // [4][TURNERS][2], of a thread's first row of the next tile
    float2* step_;  // [PAIRS], of ROUND positions
    const Turns& frequencies_;
};

// ---- staging ------------------------------------------------------------------------------------
struct Staging {
    u8* stages;      // [STAGES][keys, values][TILE] rows
    u8* angles;      // [ANGLE_BYTES], right behind them
    u64* addresses;  // [STAGES][TILE], where the rows of the tiles to come lie
};

CUPY_LORA_DEVICE Staging carve_staging(u8*& shared) {
    Staging staging;
    staging.stages = carve<u8>(shared, STAGES * STAGE_BYTES);
    staging.angles = carve<u8>(shared, ANGLE_BYTES);
    staging.addresses = carve<u64>(shared, STAGES * TILE);
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
