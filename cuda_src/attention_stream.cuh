// Decode's copies: one warp brings the tiles of all of a block's units, as one stream, into a ring of stages, for the
// other warps to multiply. Two mbarriers a stage say that it is full and that it is empty.
//
// A tile is four quarters of QUARTER keys, each of them rows of DIM elements one after the other as in the page.
//
// COPY_BULK: runs of keys that lie in one page and one quarter by the copy engine (sm_90 on; runs of 1 KB and more:
// runs of 256 bytes take twice as long). Else 16 bytes at a time by this warp's lanes, with 32 bytes of nothing between
// quarters: lanes that read the same piece of one row of each quarter meet different banks. The copy engine is slower
// where a destination is no multiple of 128 (4.1 instead of 4.4 TB/s), which costs more than the conflicts.
#pragma once
#include "attention_schedule.cuh"

constexpr int ROWS = GROUP < 16 ? GROUP : 16;
constexpr int ROW_BYTES = DIM * 2;
constexpr int QUERY_BYTES = ROWS * ROW_BYTES;
constexpr int QUARTER = TILE / 4;
constexpr int QUARTER_BYTES = QUARTER * ROW_BYTES + (COPY_BULK ? 0 : 32);
constexpr int SIDE_BYTES = 4 * QUARTER_BYTES;  // of a tile's keys, or values
constexpr int STAGE_BYTES = 2 * SIDE_BYTES;

constexpr CUPY_LORA_DEVICE int greatest_divisor(int a, int b) { return b == 0 ? a : greatest_divisor(b, a % b); }

constexpr int RUN = greatest_divisor(PAGE, QUARTER);  // keys that a bulk copy brings
constexpr int RUNS = TILE / RUN;
constexpr int ARRIVALS = COPY_BULK ? 32 : 64;  // that fill a stage: each lane's, and each lane's copies'

static_assert(!COPY_BULK || RUNS <= 16, "a run of keys and one of values for each lane");

// What the warps that multiply must know of a tile. tile < 0: there is none, nor will be.
struct alignas(16) Step {
    i32 tile, length, begin, end;
    i32 chunk_tiles, head, entry, nothing;  // head: a number % UNITS; entry: where the queries are
};

// And at the end of a chunk.
struct alignas(16) Goal {
    i32 sequence, chunks, slot, first_slot;
};

struct Ring {
    u8* stages;      // [STAGES][keys, values] quarters
    u8* queries;     // [STAGES][ROWS][DIM], unit after unit
    Step* steps;     // [STAGES]
    Goal* goals;     // [STAGES]
    u64* addresses;  // [TILE], without COPY_BULK
    u64* full;       // [STAGES]
    u64* empty;      // [STAGES]
};

// A stage, and the parity of the phase in which it is full.
struct Turn {
    int slot;
    u32 parity;

    CUPY_LORA_DEVICE void next() {
        if (++slot < STAGES) return;
        slot = 0;
        parity ^= 1;
    }
};

// Byte of a tile's key in its side.
CUPY_LORA_DEVICE int place_of(int key) { return key / QUARTER * QUARTER_BYTES + key % QUARTER * ROW_BYTES; }

CUPY_LORA_DEVICE bool can_be_page(u64 page) { return page != 0 && page % 16 == 0; }

// Zeros in the rows of a stage from `rows` on, of the run at `place`; the whole warp.
CUPY_LORA_DEVICE void clear_rows(u8* stage, int place, i32 rows) {
    const uint4 zeros = make_uint4(0, 0, 0, 0);
    for (int e = rows * PIECES + static_cast<int>(threadIdx.x) % 32; e < RUN * PIECES; e += 32) {
        *reinterpret_cast<uint4*>(stage + place + e * 16) = zeros;
        *reinterpret_cast<uint4*>(stage + SIDE_BYTES + place + e * 16) = zeros;
    }
}

// The queries of a unit to shared memory where they cannot be copied 16 bytes at a time.
CUPY_LORA_DEVICE void store_queries(u8* to, const ELEMENT* from, int count) {
    for (int e = static_cast<int>(threadIdx.x) % 32; e < count * DIM; e += 32) {
        reinterpret_cast<u16*>(to)[e] = from[e].bits;
    }
}

// The tiles of a unit's keys and values of one head, in ascending order, each by one whole warp: next(..) for each.
class Tiles {
  public:
    CUPY_LORA_DEVICE Tiles(const Cache& cache, const Unit& unit, i64 offset)
        : pages_(cache.kv_ptrs + unit.first_page), offset_(offset), length_(unit.length) {}

    // Begins to read the page table; before the stage is waited for.
    CUPY_LORA_DEVICE void look(const Ring& ring, i32 tile, bool first) {
        const int lane = static_cast<int>(threadIdx.x) % 32;
        if constexpr (COPY_BULK) {
            if (!first && tile - window_ < WINDOW_TILES) return;
            window_ = tile;
            const i32 position = tile * TILE + lane * RUN;
            page_ = position < length_ ? static_cast<u64>(pages_[position / PAGE]) : 0;
        } else {
            const Keys keys = {pages_, offset_, length_};
            for (int key = lane; key < TILE; key += 32) ring.addresses[key] = key_address(keys, tile * TILE + key);
            __syncwarp();
        }
    }

    // Fills a stage, which is empty; query_rows: of the queries that come along from `query` on, or 0.
    CUPY_LORA_DEVICE void copy(const Ring& ring, int slot, i32 tile, u8* queries, const ELEMENT* query,
                               int query_rows) const {
        const int lane = static_cast<int>(threadIdx.x) % 32;
        u8* const stage = ring.stages + slot * STAGE_BYTES;
        u64* const full = ring.full + slot;
        if (!VECTORS && query_rows > 0) store_queries(queries, query, query_rows);
        if constexpr (COPY_BULK) {
            const int run = lane % RUNS;
            const int place = place_of(run * RUN);
            const i32 position = tile * TILE + run * RUN;
            const u64 page = __shfl_sync(0xffffffffu, page_, (tile - window_) * RUNS + run);
            const i32 rows = can_be_page(page) ? max(min(length_ - position, RUN), 0) : 0;
            u32 open = __ballot_sync(0xffffffffu, lane < RUNS && rows < RUN);
            if (open != 0 && tile * TILE < length_) {
                for (; open != 0; open &= open - 1) {
                    const int other = __ffs(static_cast<int>(open)) - 1;
                    clear_rows(stage, place_of(other * RUN), __shfl_sync(0xffffffffu, rows, other));
                }
                ptx::fence_bulk();
            }
            const bool with_queries = VECTORS && lane == 0 && query_rows > 0;
            const u32 bytes = lane < 2 * RUNS ? static_cast<u32>(rows * ROW_BYTES) : 0;
            ptx::mbarrier_expect(full, bytes + static_cast<u32>(with_queries ? query_rows * ROW_BYTES : 0));
            if (with_queries) ptx::copy_bulk(queries, query, static_cast<u32>(query_rows * ROW_BYTES), full);
            if (bytes == 0) return;
            const i64 side = lane < RUNS ? 0 : 1;
            const u64 from = page + static_cast<u64>(offset_ + side * PAGE_SIDE) +
                             static_cast<u64>(static_cast<u32>(position) % PAGE * ROW_BYTES);
            ptx::copy_bulk(stage + side * SIDE_BYTES + place, reinterpret_cast<const void*>(from), bytes, full);
        } else {
#pragma unroll 4
            for (int i = 0; i < ceil_div(TILE * PIECES, 32); ++i) {
                const int key = (lane + i * 32) / PIECES;
                const int piece = (lane + i * 32) % PIECES;
                if (TILE * PIECES % 32 != 0 && key >= TILE) break;
                const u64 address = ring.addresses[key];
                const u8* const from = reinterpret_cast<const u8*>(address) + piece * 16;
                u8* const to = stage + place_of(key) + piece * 16;
                ptx::copy_async_16(to, from, address != 0);
                ptx::copy_async_16(to + SIDE_BYTES, from + PAGE_SIDE, address != 0);
            }
            for (int e = lane; VECTORS && e < query_rows * PIECES; e += 32) {
                ptx::copy_async_16(queries + e * 16, query + e * 8);
            }
            ptx::copy_async_arrive(full);
            ptx::mbarrier_arrive(full);
            __syncwarp();  // the addresses have been read
        }
    }

  private:
    static constexpr int WINDOW_TILES = COPY_BULK ? 32 / RUNS : 1;  // whose pages the lanes hold
    const i64* pages_;
    i64 offset_;
    i32 length_;
    i32 window_;  // first tile of those
    u64 page_;
};

// One warp: the units of this block, and after the last one a step that says so. tickets: numbers handed out beyond
// the grid's own, and blocks that want no more; zeros between launches.
CUPY_LORA_DEVICE void produce(const Ring& ring, const Schedule& schedule, const Cache& cache, const ELEMENT* q,
                              i64 q_stride, i32 layer, i32* tickets) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    Turn turn = {0, 1};  // the parity with which a stage is waited for: empty at first
    int entry = 0;
    i64 number = blockIdx.x;
    while (number < schedule.numbers()) {
        const Unit unit = schedule.locate(number);
        const Heads heads = heads_of(number);
        const i64 offset = (static_cast<i64>(layer) * 2 * HEADS + heads.key) * (static_cast<i64>(PAGE) * ROW_BYTES);
        const ELEMENT* const query = q + unit.sequence * q_stride + heads.first * DIM;
        u8* const queries = ring.queries + entry * QUERY_BYTES;
        Tiles tiles(cache, unit, offset);
        i32 ticket = 0;
        for (i32 tile = unit.begin; tile < unit.end; ++tile) {
            const bool first = tile == unit.begin;
            tiles.look(ring, tile, first);
            ptx::mbarrier_wait_block(ring.empty + turn.slot, turn.parity);
            if (lane == 0) {
                ring.steps[turn.slot] = {
                    tile, unit.length, unit.begin, unit.end, unit.chunk_tiles, static_cast<i32>(number % UNITS), entry,
                    0};
                ring.goals[turn.slot] = {unit.sequence, unit.chunks, unit.slot, unit.first_slot};
            }
            tiles.copy(ring, turn.slot, tile, queries, query, first ? heads.count : 0);
            if (first && lane == 0) ticket = atomicAdd(tickets, 1);
            turn.next();
        }
        number = static_cast<i64>(gridDim.x) + static_cast<u32>(__shfl_sync(0xffffffffu, ticket, 0));
        entry = entry == STAGES - 1 ? 0 : entry + 1;
    }
    ptx::mbarrier_wait_block(ring.empty + turn.slot, turn.parity);
    if (lane == 0) {
        ring.steps[turn.slot].tile = -1;
        for (int i = 0; i < ARRIVALS; ++i) ptx::mbarrier_arrive(ring.full + turn.slot);
        ptx::fence_gpu();
        if (atomicAdd(tickets + 1, 1) == static_cast<i32>(gridDim.x) - 1) tickets[0] = tickets[1] = 0;
    }
}
