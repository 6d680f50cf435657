// Prefill by warpgroups (sm_90a): the warpgroup that brings what the others multiply, with ROPE rotated.
#pragma once
#include "attention_prefill_stream.cuh"

// The rotation of keys and queries, where they have landed. A thread rotates the same 8 pairs of keys TURN_STEP apart;
// four multiplications a pair turn the angles of one into those of the next, from tile to tile too.
class Rotation {
  public:
    CUPY_LORA_DEVICE Rotation(u8* space, const Turns& frequencies)
        : own_(reinterpret_cast<float2*>(space)),
          origin_(own_ + CREW * 8),
          step_(origin_ + CREW * 8),
          near_(step_ + PAIRS),
          far_(near_ + NEAR * PAIRS),
          frequencies_(frequencies) {}

    // Once a launch; a barrier of the warpgroup follows.
    CUPY_LORA_DEVICE void begin() const {
        fill_angles<CREW>(step_, 1, TURN_STEP, 0, frequencies_);
        fill_angles<CREW>(near_, NEAR, 0, 1, frequencies_);
#pragma unroll
        for (int i = 0; i < 8; ++i) renew(origin_, 0, i);
    }

    // For the queries of a unit; a barrier of the warpgroup follows.
    CUPY_LORA_DEVICE void begin_queries(const Rows& rows) const {
        const i32 first = max(rows.position(0), 0) / NEAR;
        const i32 last = max(rows.position(rows.count() - 1), 0) / NEAR;
        fill_angles<CREW>(far_, last - first + 1, first * NEAR, NEAR, frequencies_);
    }

    CUPY_LORA_DEVICE void rotate_queries(u8* queries, const Rows& rows) const {
        const int thread = static_cast<int>(threadIdx.x) % CREW;
        const int unit = thread % LANES;
        const i32 first = max(rows.position(0), 0) / NEAR;
        const i32 count = rows.count();
#pragma unroll 2
        for (int row = thread / LANES; row < count; row += CREW / LANES) {
            const i32 at = max(rows.position(row), 0);
            const Angles angles = added(angles_of(near_, at % NEAR, unit), angles_of(far_, at / NEAR - first, unit));
            rotate_pieces(piece(queries, ROWS, row, unit), piece(queries, ROWS, row, unit + LANES), angles);
        }
    }

    // fresh: the tile does not follow the one that was rotated last.
    CUPY_LORA_DEVICE void rotate_keys(u8* keys, i32 tile, bool fresh) const {
        const int lane = static_cast<int>(threadIdx.x) % 32;
        const int unit = lane % LANES;
        if (tile != 0 && (fresh || tile % RENEWAL == 0)) {
#pragma unroll 1
            for (int i = 0; i < 8; ++i) renew(own_, tile, i);
        }
        const float4* const from = reinterpret_cast<const float4*>(tile == 0 ? origin_ : own_);
        Angles angles;
#pragma unroll
        for (int i = 0; i < 4; ++i) angles.two[i] = from[i * CREW + static_cast<int>(threadIdx.x) % CREW];
        uint4* low = piece(keys, TILE, key_of(lane / LANES), unit);
        uint4* high = piece(keys, TILE, key_of(lane / LANES), unit + LANES);
#pragma unroll(LANE_KEYS / TURNED_AT_ONCE % 2 == 0 ? 2 : 1)
        for (int i = 0; i < LANE_KEYS; i += TURNED_AT_ONCE) {
            rotate_pieces(low, high, angles);
            angles = added(angles, angles_of(step_, 0, unit));  // read again: there are no registers to keep it
            low += TURN_STEP * 8;
            high += TURN_STEP * 8;
        }
        float4* const own = reinterpret_cast<float4*>(own_);
#pragma unroll
        for (int i = 0; i < 4; ++i) own[i * CREW + static_cast<int>(threadIdx.x) % CREW] = angles.two[i];
    }

  private:
    static CUPY_LORA_DEVICE uint4* piece(u8* matrix, int rows, int row, int number) {
        return reinterpret_cast<uint4*>(matrix + place_of(rows, row, number));
    }

    // The angle of a thread's pair i at its first key of a tile.
    CUPY_LORA_DEVICE void renew(float2* to, i32 tile, int i) const {
        const int thread = static_cast<int>(threadIdx.x) % CREW;
        const int lane = thread % 32;
        to[(i / 2 * CREW + thread) * 2 + i % 2] =
            angle_at(frequencies_.turns[lane % LANES * 8 + i], tile * TILE + key_of(lane / LANES));
    }

    float2* own_;     // [4][CREW][2], of a thread's first key of the next tile
    float2* origin_;  // the same, of tile 0
    float2* step_;    // [PAIRS], of TURN_STEP positions
    float2* near_;    // [NEAR][PAIRS], of the first positions
    float2* far_;     // [FAR][PAIRS], of multiples of NEAR, of a unit's queries
    const Turns& frequencies_;
};

// The warpgroup's work. tickets: units handed out beyond the grid's own, and blocks that want no more; zeros between
// launches. most: units there can be, whatever the tables say.
CUPY_LORA_DEVICE void bring(const Rings& rings, Units units, const Cache& cache, const Turns& frequencies,
                            const ELEMENT* q, i64 q_stride, i32 layer, i32 window, i32 most, i32* tickets) {
    const int thread = static_cast<int>(threadIdx.x) % CREW;
    const Rotation rotation(rings.angles, frequencies);
    if (ROPE) rotation.begin();
    // The parity with which a stage is waited for: empty at first.
    Turn<KEY_STAGES> key_stage = {0, 1};
    Turn<STAGES> value_stage = {0, 1};
    Turn<QUERY_STAGES> entry = {0, 1};
    const auto bring_keys = [&](u64 address) {
        copy_side(stage_of(rings.keys, rings.empty_keys, key_stage), address, 0);
    };
    const auto bring_values = [&](u64 address) {
        copy_side(stage_of(rings.values, rings.empty_values, value_stage), address, PAGE_SIDE);
        ptx::copy_async_arrive(rings.full_values + value_stage.slot);
        value_stage.next();
    };
    Unit unit;
    bool more = static_cast<i64>(blockIdx.x) < most && units.find(blockIdx.x, unit);
    Tiles tiles(cache, unit, layer, more);
    while (more) {
        ptx::mbarrier_wait_block(rings.empty_queries + entry.slot, entry.parity);
        u64* const landed = rings.full_queries + entry.slot;
        const Rows rows = {unit, window};
        u8* const queries = rings.queries + entry.slot * QUERY_BYTES;
        i32 ticket = 0;
        if (thread == 0) {
            ticket = atomicAdd(tickets, 1);  // looked at once the first copies are under way
            rings.units[entry.slot] = unit;
            ptx::mbarrier_arrive(landed);
        }
        copy_queries(queries, rows, q, q_stride);
        const i32 begin = unit.begin, end = unit.end;
        u64 address = 0;
        // The unit after this one, and its first page: their chain of reads passes behind this one's copies.
        Tiles following = tiles;
        const auto look_ahead = [&] {
            if (thread == 0) rings.tickets[entry.slot] = ticket;
            ptx::barrier_meet(STREAM_BARRIER, CREW);
            const i64 number = static_cast<i64>(gridDim.x) + static_cast<u32>(rings.tickets[entry.slot]);
            more = number < most && units.find(number, unit);
            following = Tiles(cache, unit, layer, more);
        };
        if constexpr (ROPE) {
            ptx::copy_async_commit();
            if (begin < end) {
                address = tiles.next(begin + 1 < end);
                bring_keys(address);
            }
            ptx::copy_async_commit();
            rotation.begin_queries(rows);
            ptx::copy_async_wait<1>();
            ptx::barrier_meet(STREAM_BARRIER, CREW);  // the queries have landed, the tables are filled
            rotation.rotate_queries(queries, rows);
            ptx::mbarrier_arrive(landed);
            look_ahead();
            // A tile's keys are under way while those of the one before are rotated; their values follow.
#pragma unroll 1
            for (i32 tile = begin; tile < end; ++tile) {
                const int slot = key_stage.slot;
                key_stage.next();
                const u64 behind = address;
                if (tile + 1 < end) {
                    address = tiles.next(tile + 2 < end);
                    bring_keys(address);
                }
                ptx::copy_async_commit();
                ptx::copy_async_wait<1>();
                __syncwarp();  // this warp's keys of the tile have landed
                rotation.rotate_keys(rings.keys + slot * SIDE_BYTES, tile, tile == begin);
                ptx::mbarrier_arrive(rings.full_keys + slot);
                bring_values(behind);
            }
        } else {
            if constexpr (VECTORS) {
                ptx::copy_async_arrive(landed);
            } else {
                ptx::mbarrier_arrive(landed);
            }
#pragma unroll 1
            for (i32 tile = begin; tile < end; ++tile) {
                address = tiles.next(tile + 1 < end);
                bring_keys(address);
                ptx::copy_async_arrive(rings.full_keys + key_stage.slot);
                key_stage.next();
                bring_values(address);
                if (tile == begin) look_ahead();
            }
            if (begin == end) look_ahead();
        }
        tiles = following;
        entry.next();
    }
    ptx::mbarrier_wait_block(rings.empty_queries + entry.slot, entry.parity);
    if (thread == 0) {
        rings.units[entry.slot].count = -1;
        ptx::mbarrier_arrive(rings.full_queries + entry.slot);
    }
    ptx::mbarrier_arrive(rings.full_queries + entry.slot);
    if (thread == 0) {
        ptx::fence_gpu();
        if (atomicAdd(tickets + 1, 1) == static_cast<i32>(gridDim.x) - 1) tickets[0] = tickets[1] = 0;
    }
}
