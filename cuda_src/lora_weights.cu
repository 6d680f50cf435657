// Swapping an adapter: the records of one slot, all slices, in one launch of one block.
//
//   table[slot][s] = records[s]
//
// The records travel in the launch itself: no staging memory, in the order of the stream, and graphs
// captured before read the new ones. Block: a thread per slice.
#include "common.cuh"

// A LoraWeights record as raw words: what they mean is Record of lora_config.cuh.
struct SlotRecords {
    u64 words[SLICES][4];
};

extern "C" __global__ void set_slot(u64* __restrict__ table, i32 slot, SlotRecords records) {
    ptx::begin_launch();
    const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
    for (int s = 0; s < SLICES; ++s) {
        if (thread == s) {
#pragma unroll
            for (int i = 0; i < 4; ++i) table[(static_cast<i64>(slot) * SLICES + s) * 4 + i] = records.words[s][i];
        }
    }
}
