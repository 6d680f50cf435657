// Decode's work: which unit a number stands for, worked out by every block from the tables.
//
// A sequence of n keys (the window's, where there is one) is cut into chunks of CHUNK_MIN << i keys, the smallest i
// with chunk^2 >= n * CHUNK_SPREAD: the cut depends on nothing else. A chunk's partial result is folded into the
// sequence's in ascending order, always by the same arithmetic; whether one block walks over all chunks or each is a
// unit of its own, whose last to finish folds, is decided by the load of the whole batch and changes no bit.
//
// A unit is a chunk (or a sequence) of a key head and up to 16 of its query heads. Block b begins with number b and
// then takes the next that nobody has.
#pragma once
#include "attention_cache.cuh"

constexpr int BLOCK_WARPS = WARPS + 2;  // those that multiply, one that copies, one that counts
constexpr int THREADS = 32 * BLOCK_WARPS;
constexpr int HEAD_BLOCKS = ceil_div(GROUP, 16);
constexpr int UNITS = HEADS * HEAD_BLOCKS;  // of a chunk

static_assert(CHUNK_MIN % TILE == 0, "whole tiles a chunk");

struct Unit {
    i32 sequence, length, first_page;
    i32 begin, end, chunk_tiles;   // begin and end in tiles
    i32 chunks, slot, first_slot;  // chunks: 0 where one block takes all of them
};

struct Work {
    Cache cache;
    i32 batch, window, slots;
    i32 share;  // a sequence is split where its keys times this exceed the keys of all units
};

// The heads of a number: of the keys, and the first of the queries and how many.
struct Heads {
    int key, first, count;
};

CUPY_LORA_DEVICE Heads heads_of(i64 number) {
    const int key = static_cast<int>(number % UNITS) / HEAD_BLOCKS;
    const int block = static_cast<int>(number % UNITS) % HEAD_BLOCKS;
    return {key, key * GROUP + block * 16, min(GROUP - block * 16, 16)};
}

CUPY_LORA_DEVICE i32 first_tile(i32 length, i32 window) {
    return WINDOW && length > window ? (length - window) / TILE : 0;
}

CUPY_LORA_DEVICE i32 chunk_of(i32 keys) {
    i32 chunk = CHUNK_MIN;
    while (static_cast<i64>(chunk) * chunk < static_cast<i64>(keys) * CHUNK_SPREAD) chunk *= 2;
    return chunk;
}

// What comes before a thread's run of sequences.
struct Before {
    i32 units, slots;
};

// The threads of a block look after a run of sequences each; one warp finds units by what they leave in shared memory.
class Schedule {
  public:
    // All threads. scratch: a value a warp.
    CUPY_LORA_DEVICE Schedule(const Work& work, Before* runs, i64* scratch) : work_(work), runs_(runs) {
        each_ = (work.batch + THREADS - 1) / THREADS;
        const i32 begin = min(static_cast<i32>(threadIdx.x) * each_, work.batch);
        const i32 end = min(begin + each_, work.batch);
        i64 keys = 0;
        for (i32 s = begin; s < end; ++s) keys += keys_of(length_of(work.cache, s));
        scan<BLOCK_WARPS>(keys, scratch, all_keys_);
        // Slots in the high half and units in the low one, as if there were slots for all.
        i64 both = 0, all;
        for (i32 s = begin; s < end; ++s) {
            const i32 chunks = wanted(keys_of(length_of(work.cache, s)));
            both += static_cast<i64>(chunks) << 32 | max(chunks, 1);
        }
        i64 first = scan<BLOCK_WARPS>(both, scratch, all);
        const i32 slots = static_cast<i32>(first >> 32);
        if (all >> 32 > work.slots) {
            i64 units = 0;
            i32 slot = slots;
            for (i32 s = begin; s < end; ++s) {
                const i32 chunks = wanted(keys_of(length_of(work.cache, s)));
                units += max(fitting(chunks, slot), 1);
                slot += chunks;
            }
            first = scan<BLOCK_WARPS>(units, scratch, all);
        }
        runs[threadIdx.x] = {static_cast<i32>(first), slots};
        numbers_ = static_cast<i64>(static_cast<u32>(all)) * UNITS;
        __syncthreads();
    }

    CUPY_LORA_DEVICE i64 numbers() const { return numbers_; }

    // The unit of a number below numbers(); one whole warp.
    CUPY_LORA_DEVICE Unit locate(i64 number) const {
        const int lane = static_cast<int>(threadIdx.x) % 32;
        const i32 at = static_cast<i32>(number / UNITS);
        int run = -1;
#pragma unroll
        for (int i = 0; i < BLOCK_WARPS; ++i) {
            run += __popc(__ballot_sync(0xffffffffu, runs_[i * 32 + lane].units <= at));
        }
        i32 units = runs_[run].units;
        i32 slots = runs_[run].slots;
        for (i32 s = run * each_ + lane;; s += 32) {
            const i32 length = s < min((run + 1) * each_, work_.batch) ? length_of(work_.cache, s) : -1;
            const i32 keys = length < 0 ? 0 : keys_of(length);
            const i32 asked = length < 0 ? 0 : wanted(keys);
            i32 slot = slots, unit = units;
            if (each_ > 1) slot += before(asked, slots);
            const i32 chunks = fitting(asked, slot);
            const i32 count = length < 0 ? 0 : max(chunks, 1);
            if (each_ > 1) unit += before(count, units);
            const u32 found = __ballot_sync(0xffffffffu, at >= unit && at < unit + count);
            if (found == 0) continue;
            const i32 tiles = chunk_of(keys) / TILE;
            const i32 begin = first_tile(length, work_.window) + (at - unit) * tiles;
            const i32 end = max((length + TILE - 1) / TILE, begin + 1);
            const int from = __ffs(static_cast<int>(found)) - 1;
            const auto take = [&](i32 v) { return __shfl_sync(0xffffffffu, v, from); };
            const i32 stop = take(chunks != 0 ? min(begin + tiles, end) : end);
            const i32 page = take(length > 0 ? work_.cache.kv_indptr[s] : 0);
            return {take(s),      take(length),           page,      take(begin), stop, take(tiles),
                    take(chunks), take(slot + at - unit), take(slot)};
        }
    }

  private:
    CUPY_LORA_DEVICE i32 keys_of(i32 length) const { return length - first_tile(length, work_.window) * TILE; }

    // Slots that a sequence asks for, and those that it gets.
    CUPY_LORA_DEVICE i32 wanted(i32 keys) const {
        const i32 chunk = chunk_of(keys);
        return keys > chunk && static_cast<i64>(keys) * work_.share > all_keys_ * UNITS ? (keys + chunk - 1) / chunk
                                                                                        : 0;
    }
    CUPY_LORA_DEVICE i32 fitting(i32 chunks, i32 slot) const { return slot + chunks <= work_.slots ? chunks : 0; }

    // The sum over the lanes before this one; `total` grows by that of all.
    static CUPY_LORA_DEVICE i32 before(i32 value, i32& total) {
        const int lane = static_cast<int>(threadIdx.x) % 32;
        i32 sum = value;
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
            const i32 other = __shfl_up_sync(0xffffffffu, sum, distance);
            if (lane >= distance) sum += other;
        }
        total += __shfl_sync(0xffffffffu, sum, 31);
        return sum - value;
    }

    const Work& work_;
    const Before* runs_;
    i32 each_;
    i64 all_keys_, numbers_;
};
