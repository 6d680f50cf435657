// Prefill by warpgroups (sm_90a): what the warpgroup does that brings the operands of the others into shared memory.
//
// A unit is a tile of ROWS rows of one sequence and key head, as in attention_prefill.cuh. A ticket hands units to
// blocks; the tiles of all of a block's units are one stream through two rings, of keys and of values, so that the
// start of a unit (its ticket, tables, first pages) passes while the one before is multiplied. Queries have a ring of
// their own, of two units; a unit's output takes the place of its queries.
//
// With ROPE, keys and queries are rotated where they have landed, a tile ahead of the products: keys have a stage more.
//
// Matrices lie as ptx_wgmma.cuh describes them: panels of 64 columns, rows of 128 bytes, 16-byte pieces permuted. They
// come by cp.async, whose writes are not in order with what matrix products read until a fence says so: the threads
// that multiply make it once a barrier has told them that the copies are done. (The thread that copies would have to
// wait for its copies first.) The way back needs none: a product that is done is in order with what threads write then.
#pragma once
#include "attention_angles.cuh"
#include "ptx_wgmma.cuh"

constexpr int THREADS = 32 * WARPS;
constexpr int CREW = 128;             // threads of a warpgroup
constexpr int CREWS = WARPS / 4 - 1;  // warpgroups that multiply, 64 rows each; the last one brings
constexpr int ROWS = 64 * CREWS;      // of a unit
constexpr int QUERY_STAGES = 2;
constexpr int KEY_STAGES = STAGES + ROPE;
constexpr int SIDE_BYTES = TILE * DIM * 2;  // of a tile's keys, or values
constexpr int QUERY_BYTES = ROWS * DIM * 2;
constexpr int LANE_KEYS = TILE / 4;        // keys of a tile that a warp brings; a lane finds one's page
constexpr int ROWS_AT_ONCE = 32 / PIECES;  // that a warp copies by one instruction
// Barriers: of the threads that bring; of each crew's turn; of each crew's rows.
constexpr int STREAM_BARRIER = 1;
constexpr int TURN_BARRIER = 2;
constexpr int ROWS_BARRIER = TURN_BARRIER + CREWS;

// With ROPE: the angles' tables.
constexpr int FAR = (ROWS / GROUP + 1) / NEAR + 2;       // entries of the far table of the queries
constexpr int TURNED_AT_ONCE = 32 / LANES;               // keys of a tile that a warp rotates by one instruction
constexpr int TURN_STEP = TURNED_AT_ONCE / 4 * 16;       // positions from one of them to the next of the same lane
constexpr int RENEWAL = ceil_div(96 * TURN_STEP, TILE);  // tiles, after which the angles are worked out anew
constexpr int ANGLE_BYTES = ROPE ? (2 * CREW * 8 + (1 + NEAR + FAR) * PAIRS) * 8 : 0;

static_assert(DIM % 64 == 0 && DIM <= 128 && LANE_KEYS <= 32 && LANE_KEYS % TURNED_AT_ONCE == 0, "whole panels");

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
    CUPY_LORA_DEVICE i32 position(int row) const { return unit.length - unit.count + (unit.first_row + row) / GROUP; }
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
    u8* keys;     // [KEY_STAGES] matrices [TILE][DIM]
    u8* values;   // [STAGES], the same
    u8* queries;  // [QUERY_STAGES] matrices [ROWS][DIM]
    // What has landed, and what may be overwritten:
    u64 *full_keys, *empty_keys;        // [KEY_STAGES]
    u64 *full_values, *empty_values;    // [STAGES]
    u64 *full_queries, *empty_queries;  // [QUERY_STAGES]
    Unit* units;                        // [QUERY_STAGES]
    i32* tickets;                       // [QUERY_STAGES]
    u8* angles;                         // [ANGLE_BYTES]
};

CUPY_LORA_DEVICE Rings carve_rings(u8* shared) {
    Rings rings;
    shared = ptx::align_shared(shared);
    rings.keys = carve<u8>(shared, KEY_STAGES * SIDE_BYTES);
    rings.values = carve<u8>(shared, STAGES * SIDE_BYTES);
    rings.queries = carve<u8>(shared, QUERY_STAGES * QUERY_BYTES);
    rings.full_keys = carve<u64>(shared, 2 * (KEY_STAGES + STAGES + QUERY_STAGES));
    rings.empty_keys = rings.full_keys + KEY_STAGES;
    rings.full_values = rings.empty_keys + KEY_STAGES;
    rings.empty_values = rings.full_values + STAGES;
    rings.full_queries = rings.empty_values + STAGES;
    rings.empty_queries = rings.full_queries + QUERY_STAGES;
    rings.units = carve<Unit>(shared, QUERY_STAGES);
    rings.tickets = carve<i32>(shared, QUERY_STAGES);
    rings.angles = carve<u8>(shared, ANGLE_BYTES);
    return rings;
}

// By one thread; a block's barrier follows.
CUPY_LORA_DEVICE void begin_rings(const Rings& rings) {
    for (int i = 0; i < KEY_STAGES; ++i) {
        ptx::mbarrier_init(rings.full_keys + i, CREW);
        ptx::mbarrier_init(rings.empty_keys + i, 4 * CREWS);
    }
    for (int i = 0; i < STAGES; ++i) {
        ptx::mbarrier_init(rings.full_values + i, CREW);
        ptx::mbarrier_init(rings.empty_values + i, 4 * CREWS);
    }
    for (int i = 0; i < QUERY_STAGES; ++i) {
        ptx::mbarrier_init(rings.full_queries + i, CREW + 1);  // one more for the unit
        ptx::mbarrier_init(rings.empty_queries + i, 4 * CREWS);
    }
    ptx::mbarrier_init_fence();
}

// The units in the order of their numbers: heads innermost, the tiles of a sequence, and the sequences, from the last
// on, so that those that see the most keys come first. A warp keeps one; the numbers it asks for ascend.
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

// A warp brings, and rotates, 4 of each 16 keys of a tile: the number of its i-th key in the tile.
CUPY_LORA_DEVICE int key_of(int i) { return i / 4 * 16 + static_cast<int>(threadIdx.x) % CREW / 32 * 4 + i % 4; }

// A warp's keys (or values) of a tile, whose addresses the lanes hold (0: zeros).
CUPY_LORA_DEVICE void copy_side(u8* side, u64 address, i64 offset) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int piece = lane % PIECES;
    // Four rows at a time, and not all at once: there are few registers here.
#pragma unroll 2
    for (int first = 0; first < LANE_KEYS; first += 4) {
#pragma unroll
        for (int i = 0; i < 4; i += ROWS_AT_ONCE) {
            const int own = i + lane / PIECES;
            const u64 from = __shfl_sync(0xffffffffu, address, first + own);
            ptx::copy_async_16(side + place_of(TILE, key_of(own), piece),
                               reinterpret_cast<const u8*>(from) + offset + piece * 16, from != 0);
        }
        side += 16 * 128;
    }
}

// What a warp brings of a unit's keys and values, tile after tile.
class Tiles {
  public:
    // any: whether there is a unit.
    CUPY_LORA_DEVICE Tiles(const Cache& cache, const Unit& unit, i32 layer, bool any) : page_(0) {
        const bool some = any && unit.begin < unit.end;
        keys_ = keys_of(cache, some ? cache.kv_indptr[unit.sequence] : 0, some ? unit.length : 0, layer, unit.head);
        position_ = unit.begin * TILE + key_of(min(static_cast<int>(threadIdx.x) % 32, LANE_KEYS - 1));
        if (some) page_ = page_at(keys_, position_);
    }

    // The address of the lane's key of the next tile. more: whether another follows, whose page is looked up ahead.
    CUPY_LORA_DEVICE u64 next(bool more) {
        const u64 address = address_in(keys_, page_, position_);
        position_ += TILE;
        if (more) page_ = page_at(keys_, position_);
        return address;
    }

  private:
    Keys keys_;
    i32 position_;
    u64 page_;
};

// Where a ring's next stage is, once it may be written.
template <int SIZE>
CUPY_LORA_DEVICE u8* stage_of(u8* sides, u64* empty, const Turn<SIZE>& turn) {
    ptx::mbarrier_wait_block(empty + turn.slot, turn.parity);
    return sides + turn.slot * SIDE_BYTES;
}

// Copies of the rows of a unit's queries; what is no row is zeros.
CUPY_LORA_DEVICE void copy_queries(u8* queries, const Rows& rows, const ELEMENT* q, i64 q_stride) {
    const int thread = static_cast<int>(threadIdx.x) % CREW;
    const int piece = thread % PIECES;
    const i32 count = rows.count();
#pragma unroll 2
    for (int row = thread / PIECES; row < ROWS; row += CREW / PIECES) {
        u8* const to = queries + place_of(ROWS, row, piece);
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
}
