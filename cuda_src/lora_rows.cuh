// The rows of a ring's tile, in a table of shared memory: each thread asks for several.
#pragma once

#include "lora_config.cuh"

// As Tile of lora_config.cuh has them: a row that is not written stands in the table as its complement, and is one that
// is safe to read.
struct RingTile {
    int rows;
    const i32* table;

    CUPY_LORA_DEVICE u64 row(int i) const { return static_cast<u32>(table[i] < 0 ? ~table[i] : table[i]); }
    CUPY_LORA_DEVICE bool writes(int i) const { return table[i] >= 0; }

    // `count` rows from `first` on, for the direct form.
    CUPY_LORA_DEVICE Tile eight(int first, int count) const {
        const int i = threadIdx.x % 8, own = first + i;
        const u32 written = __ballot_sync(0xffffffffu, i < count && writes(own)) & 0xffu;
        return Tile{count, static_cast<int>(row(own)), written, 0};
    }
};

constexpr int kTableBytes = 256;
CUPY_LORA_DEVICE i32* table_of(unsigned char* shared) { return reinterpret_cast<i32*>(shared + 128); }

// Fills the table from the list's entries, `listed` being that of this thread (thread % kTileRows) and `safe` the
// first one. Rows from `tokens` on are not the caller's: a graph may be replayed with another batch.
CUPY_LORA_DEVICE void fill_table(i32* table, int listed, int safe, int rows, i32 tokens) {
    const int i = static_cast<int>(threadIdx.x);
    if (i < kTileRows) {
        const int chosen = i < rows ? listed : safe;
        const bool there = chosen < tokens;
        table[i] = there && i < rows ? chosen : ~(there ? chosen : 0);
    }
}
