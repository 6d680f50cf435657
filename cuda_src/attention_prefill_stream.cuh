// Prefill by warpgroups (sm_90a): what the warpgroup does that brings the operands of the others into shared memory.
//
// A unit is a tile of ROWS rows of one sequence and key head, as in attention_prefill.cuh. A ticket hands units to
// blocks; the tiles of all of a block's units are one stream through two rings, of keys and of values, so that the
// start of a unit (its ticket, tables, first pages) passes while the one before is multiplied. Queries have a ring of
// their own, of two units; a unit's output takes the place of its queries.
//
// Matrices lie as ptx_wgmma.cuh describes them: panels of 64 columns, rows of 128 bytes, 16-byte pieces permuted. They
// come by cp.async, whose writes are not in order with what matrix products read until a fence says so: the threads
// that multiply make it once a barrier has told them that the copies are done. (The thread that copies would have to
// wait for its copies first.) The way back needs none: a product that is done is in order with what threads write then.
#pragma once
#include "attention_cache.cuh"
#include "ptx_wgmma.cuh"

constexpr int THREADS = 32 * WARPS;
constexpr int CREW = 128;                                // threads of a warpgroup
constexpr int CREWS = WARPS / 4 - 1;                     // warpgroups that multiply, 64 rows each; the last one brings
constexpr int ROWS = 64 * CREWS;                         // of a unit
constexpr int QUERY_STAGES = 2;
constexpr int SIDE_BYTES = TILE * DIM * 2;               // of a tile's keys, or values
constexpr int QUERY_BYTES = ROWS * DIM * 2;
constexpr int LANE_KEYS = TILE / 4;                      // keys of a tile that a warp brings; a lane finds one's page
constexpr int ROWS_AT_ONCE = 32 / PIECES;                // that a warp copies by one instruction
constexpr int STREAM_BARRIER = 1;                        // of the threads that bring; TURN_BARRIER + crew, ROWS_BARRIER + crew
constexpr int TURN_BARRIER = 2;
constexpr int ROWS_BARRIER = TURN_BARRIER + CREWS;

static_assert(DIM % 64 == 0 && PIECES <= 32 && LANE_KEYS <= 32 && LANE_KEYS % 8 == 0, "whole panels");

// Where a 16-byte piece lies in a matrix of `rows` rows.
CUPY_LORA_DEVICE int place_of(int rows, int row, int piece) {
    return (piece / 8 * rows + row) * 128 + (piece % 8 ^ row % 8) * 16;
}

struct Unit {
    i32 sequence, head, first_row;  // first_row: of the sequence's rows
    i32 start, count;               // of the sequence's queries among all; count < 0: no more units
    i32 length;                     // keys
    i32 begin, end;                 // tiles of keys that its rows see
};

// The rows of a unit: their queries, and the keys that they see.
struct Rows {
    const Unit& unit;
    i32 window;

    CUPY_LORA_DEVICE i32 count() const {
        return min(static_cast<i64>(ROWS), static_cast<i64>(unit.count) * GROUP - unit.first_row);
    }
    CUPY_LORA_DEVICE i64 token(int row) const { return static_cast<i64>(unit.start) + (unit.first_row + row) / GROUP; }
    CUPY_LORA_DEVICE int head(int row) const { return unit.head * GROUP + (unit.first_row + row) % GROUP; }
    CUPY_LORA_DEVICE i32 position(int row) const {
        return unit.length - unit.count + (unit.first_row + row) / GROUP;
    }
    // The keys a row sees: oldest .. newest - 1.
    CUPY_LORA_DEVICE i32 oldest(int row) const { return WINDOW ? max(position(row) - window + 1, 0) : 0; }
    CUPY_LORA_DEVICE i32 newest(int row) const {
        return CAUSAL ? min(position(row) + 1, unit.length) : position(row) < 0 ? 0 : unit.length;
    }
};

// Which stage of a ring comes next, and the parity of its barrier's phase.
template <int SIZE>
struct Turn {
    int slot;
    u32 parity;
    CUPY_LORA_DEVICE void next() {
        if (++slot == SIZE) {
            slot = 0;
            parity ^= 1;
        }
    }
};

struct Rings {
    u8* keys;     // [STAGES] matrices [TILE][DIM]
    u8* values;   // the same
    u8* queries;  // [QUERY_STAGES] matrices [ROWS][DIM]
    // What has landed, and what may be overwritten:
    u64 *full_keys, *full_values, *empty_keys, *empty_values;  // [STAGES]
    u64 *full_queries, *empty_queries;                         // [QUERY_STAGES]
    Unit* units;                                               // [QUERY_STAGES]
    i32* tickets;                                              // [QUERY_STAGES]
};

CUPY_LORA_DEVICE Rings carve_rings(u8* shared) {
    Rings rings;
    shared = ptx::align_shared(shared);
    rings.keys = carve<u8>(shared, STAGES * SIDE_BYTES);
    rings.values = carve<u8>(shared, STAGES * SIDE_BYTES);
    rings.queries = carve<u8>(shared, QUERY_STAGES * QUERY_BYTES);
    rings.full_keys = carve<u64>(shared, 4 * STAGES + 2 * QUERY_STAGES);
    rings.full_values = rings.full_keys + STAGES;
    rings.empty_keys = rings.full_values + STAGES;
    rings.empty_values = rings.empty_keys + STAGES;
    rings.full_queries = rings.empty_values + STAGES;
    rings.empty_queries = rings.full_queries + QUERY_STAGES;
    rings.units = carve<Unit>(shared, QUERY_STAGES);
    rings.tickets = carve<i32>(shared, QUERY_STAGES);
    return rings;
}

// By one thread; a block's barrier follows.
CUPY_LORA_DEVICE void begin_rings(const Rings& rings) {
    for (int i = 0; i < STAGES; ++i) {
        ptx::mbarrier_init(rings.full_keys + i, CREW);
        ptx::mbarrier_init(rings.full_values + i, CREW);
        ptx::mbarrier_init(rings.empty_keys + i, 4 * CREWS);
        ptx::mbarrier_init(rings.empty_values + i, 4 * CREWS);
    }
    for (int i = 0; i < QUERY_STAGES; ++i) {
        ptx::mbarrier_init(rings.full_queries + i, CREW + 1);  // one more for the unit
        ptx::mbarrier_init(rings.empty_queries + i, 4 * CREWS);
    }
    ptx::mbarrier_init_fence();
}

// The units in the order of their numbers: heads innermost, the tiles of a sequence, and the sequences, from the last on,
// so that those that see the most keys come first. A warp keeps one; the numbers it asks for ascend.
class Units {
  public:
    CUPY_LORA_DEVICE Units(const i32* qo_indptr, const Cache& cache, i32 batch, i32 tokens, i32 window)
        : qo_indptr_(qo_indptr), cache_(cache), tokens_(tokens), window_(window), after_(batch), passed_(0) {}

    // False past the last one.
    CUPY_LORA_DEVICE bool find(i64 number, Unit& unit) {
        const int lane = static_cast<int>(threadIdx.x) % 32;
        for (; after_ > 0; after_ -= 32) {
            const i32 sequence = after_ - 1 - lane;
            const i64 own = sequence < 0 ? 0 : (static_cast<i64>(queries_of(sequence)) * GROUP + ROWS - 1) / ROWS;
            i64 sum = own;
#pragma unroll
            for (int distance = 1; distance < 32; distance *= 2) {
                const i64 other = __shfl_up_sync(0xffffffffu, sum, distance);
                if (lane >= distance) sum += other;
            }
            const i64 at = number / HEADS - passed_;
            const u32 behind = __ballot_sync(0xffffffffu, sum > at);
            if (behind != 0) {
                const int owner = __ffs(static_cast<i32>(behind)) - 1;
                const i64 tile = __shfl_sync(0xffffffffu, sum, owner) - 1 - at;  // of the sequence, from its first
                unit.sequence = after_ - 1 - owner;
                unit.head = static_cast<i32>(number % HEADS);
                unit.first_row = static_cast<i32>(tile * ROWS);
                unit.start = qo_indptr_[unit.sequence];
                unit.count = queries_of(unit.sequence);
                unit.length = length_of(cache_, unit.sequence);
                const Rows rows = {unit, window_};
                unit.begin = rows.oldest(0) / TILE;
                unit.end = max(ceil_div(rows.newest(rows.count() - 1), TILE), unit.begin);
                return true;
            }
            passed_ += __shfl_sync(0xffffffffu, sum, 31);
        }
        return false;
    }

  private:
    // Queries of a sequence; none where the table cannot be right.
    CUPY_LORA_DEVICE i32 queries_of(i32 sequence) const {
        const i32 start = qo_indptr_[sequence];
        const i32 stop = qo_indptr_[sequence + 1];
        return start < 0 || stop < start || stop > tokens_ ? 0 : stop - start;
    }

    const i32* qo_indptr_;
    const Cache& cache_;
    i32 tokens_, window_;
    i32 after_;   // sequences that are not behind the numbers asked for
    i64 passed_;  // tiles of those that are
};

// A warp's rows of a tile, whose addresses the lanes hold (0: zeros).
CUPY_LORA_DEVICE void copy_keys(u8* side, u64 address, i64 offset) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int piece = lane % PIECES;
    side += place_of(TILE, static_cast<int>(threadIdx.x) % CREW / 32 * LANE_KEYS, 0);
    // Eight rows at a time, and not all at once: there are few registers here.
#pragma unroll 1
    for (int first = 0; first < LANE_KEYS; first += 8) {
#pragma unroll
        for (int i = 0; i < 8; i += ROWS_AT_ONCE) {
            const int row = i + lane / PIECES;
            const u64 from = __shfl_sync(0xffffffffu, address, first + row);
            ptx::copy_async_16(side + place_of(TILE, row, piece),
                               reinterpret_cast<const u8*>(from) + offset + piece * 16, from != 0);
        }
        side += 8 * 128;
    }
}

// The warpgroup that brings. tickets: units handed out beyond the grid's own, and blocks that want no more; zeros
// between launches. most: units there can be, whatever the tables say.
CUPY_LORA_DEVICE void bring(const Rings& rings, Units units, const Cache& cache, const ELEMENT* q, i64 q_stride, i32 layer,
                            i32 window, i32 most, i32* tickets) {
    const int thread = static_cast<int>(threadIdx.x) % CREW;
    Turn<STAGES> stage = {0, 1};  // the parity with which a stage is waited for: empty at first
    Turn<QUERY_STAGES> entry = {0, 1};
    i64 number = blockIdx.x;
    for (;;) {
        Unit unit;
        const bool more = number < most && units.find(number, unit);
        ptx::mbarrier_wait_block(rings.empty_queries + entry.slot, entry.parity);
        u64* const landed = rings.full_queries + entry.slot;
        if (!more) {
            if (thread == 0) {
                rings.units[entry.slot].count = -1;
                ptx::mbarrier_arrive(landed);
            }
            ptx::mbarrier_arrive(landed);
            break;
        }
        const Rows rows = {unit, window};
        i32 ticket = 0;
        if (thread == 0) {
            ticket = atomicAdd(tickets, 1);  // looked at once the unit's copies are under way
            rings.units[entry.slot] = unit;
            ptx::mbarrier_arrive(landed);
        }
        const i32 count = rows.count();
        const int piece = thread % PIECES;
#pragma unroll 2
        for (int row = thread / PIECES; row < ROWS; row += CREW / PIECES) {
            u8* const to = rings.queries + entry.slot * QUERY_BYTES + place_of(ROWS, row, piece);
            const ELEMENT* const from = q + rows.token(row) * q_stride + rows.head(row) * DIM + piece * 8;
            if constexpr (VECTORS) {
                ptx::copy_async_16(to, from, row < count);
            } else {
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    reinterpret_cast<u16*>(to)[i] = row < count ? from[i].bits : static_cast<u16>(0);
                }
            }
        }
        if constexpr (VECTORS) {
            ptx::copy_async_arrive(landed);
        } else {
            ptx::mbarrier_arrive(landed);
        }
        const Keys keys =
            keys_of(cache, unit.length > 0 ? cache.kv_indptr[unit.sequence] : 0, unit.length, layer, unit.head);
        // The key whose page this lane finds, a tile ahead of the copies that need it.
        i32 position = unit.begin * TILE + thread / 32 * LANE_KEYS + min(thread % 32, LANE_KEYS - 1);
        u64 page = unit.begin < unit.end ? page_at(keys, position) : 0;
#pragma unroll 1
        for (i32 tile = unit.begin; tile < unit.end; ++tile) {
            const u64 address = address_in(keys, page, position);
            position += TILE;
            if (tile + 1 < unit.end) page = page_at(keys, position);
            ptx::mbarrier_wait_block(rings.empty_keys + stage.slot, stage.parity);
            copy_keys(rings.keys + stage.slot * SIDE_BYTES, address, 0);
            ptx::copy_async_arrive(rings.full_keys + stage.slot);
            ptx::mbarrier_wait_block(rings.empty_values + stage.slot, stage.parity);
            copy_keys(rings.values + stage.slot * SIDE_BYTES, address, PAGE_SIDE);
            ptx::copy_async_arrive(rings.full_values + stage.slot);
            stage.next();
        }
        if (thread == 0) rings.tickets[entry.slot] = ticket;
        ptx::barrier_meet(STREAM_BARRIER, CREW);
        number = static_cast<i64>(gridDim.x) + static_cast<u32>(rings.tickets[entry.slot]);
        entry.next();
    }
    if (thread == 0) {
        ptx::fence_gpu();
        if (atomicAdd(tickets + 1, 1) == static_cast<i32>(gridDim.x) - 1) tickets[0] = tickets[1] = 0;
    }
}
