// The token-to-adapter schedule of one step, built on the GPU in one launch; lora_batch.cuh says how.
//
// Grid: one block of THREADS for each 256 tokens.
#include "lora_batch.cuh"

extern "C" __global__ void __launch_bounds__(kThreads)
    build_tiles(const Index* __restrict__ slot_of, const Pointer* __restrict__ indptr, i32 segments, i32 tokens,
                i32 slots, Lists lists, i32* __restrict__ tile_count) {
    ptx::begin_launch();
    CUPY_LORA_SHARED(shared);
    build_tiles_block(shared, static_cast<int>(blockIdx.x), slot_of, indptr, segments, tokens, slots, lists,
                      tile_count);
}
