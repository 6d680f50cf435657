// Batch metadata: the small index kernels between two steps of a server.
//
//   block_tables_to_ragged      ragged[offset[b] + i] = table[b][i], i < length[b] = input[b] + cache[b],
//                               offset = exclusive cumulative sum of length
//   decode_step                 the same, and what prepare_position_slot_ids writes, and both cumulative sums;
//                               with SCHEDULE its first blocks build the token-to-adapter schedule
//   block_tables_to_padded      table[b][i] = ragged[cu[b] + i],               i < cu[b + 1] - cu[b]
//   copy_next_input_ids         all_ids[b][c] = next_ids[cu[b] + i],           c = cache[b] + input[b] + i >= prompt[b]
//   prepare_position_slot_ids   position[cu[b] + i] = cache[b] + i, slot_index[cu[b] + i] = cu_slots[b] + cache[b] + i
//   slots_filtering             filtered[cu[b] + i] = slots[start[b] + i]
//
// Each array has an integer type of its own (a macro per role, i32 or i64).
//
// The ragged kernels: `chunks` blocks a row; every block adds up the lengths ahead of its row by itself
// (BLOCK at a time), while its first CHUNK entries of the table are on their way: one launch, no scan
// between blocks. Entries past the row's length are loaded too, as the length is not known yet.
// The others: LANES threads a row, BLOCK / LANES rows a block, `chunks` blocks a group of rows; a
// row longer than the grid was sized for is walked over.
//
// Shared memory: 64 u32 (ragged kernels: sums of the warps), none otherwise; what lora_batch.cuh says in
// the blocks of a schedule.
//
// Values in device memory are not trusted: nothing outside of the arrays, whose sizes are passed, is
// read or written.
#include "common.cuh"
#if SCHEDULE
#include "lora_batch.cuh"
#endif

constexpr int PER_THREAD = 8;              // entries of the table a thread has in flight
constexpr int CHUNK = BLOCK * PER_THREAD;  // entries of a block
constexpr int WARPS = BLOCK / 32;

// ---- ragged ------------------------------------------------------------------------------------
struct Sums {
    u32 all;    // input + cache lengths
    u32 input;  // input lengths
};

CUPY_LORA_DEVICE u32 at_least_0(i64 v) { return v < 0 ? 0u : static_cast<u32>(v); }

// Sums over the rows ahead of `row`, in every thread.
CUPY_LORA_DEVICE Sums sums_ahead(const INPUT_LENGTH* __restrict__ input, const CACHE_LENGTH* __restrict__ cache,
                                 int row, u32* shared) {
    Sums sums{0u, 0u};
    for (int b = static_cast<int>(threadIdx.x); b < row; b += BLOCK) {
        const u32 n = at_least_0(input[b]);
        sums.all += n + at_least_0(cache[b]);
        sums.input += n;
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        sums.all += __shfl_xor_sync(0xffffffffu, sums.all, offset);
        sums.input += __shfl_xor_sync(0xffffffffu, sums.input, offset);
    }
    if (threadIdx.x % 32 == 0) {
        shared[threadIdx.x / 32] = sums.all;
        shared[32 + threadIdx.x / 32] = sums.input;
    }
    __syncthreads();
    Sums total{0u, 0u};
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
        total.all += shared[w];
        total.input += shared[32 + w];
    }
    return total;
}

// Row `row` of the table to its place; returns the sums ahead of the row.
CUPY_LORA_DEVICE Sums ragged_row(const TABLE* __restrict__ table, i64 stride, i32 width,
                                 const INPUT_LENGTH* __restrict__ input, const CACHE_LENGTH* __restrict__ cache,
                                 int row, int chunk, int chunks, RAGGED* __restrict__ ragged, u32 total, u32* shared) {
    const TABLE* const from = table + row * stride;
    const int first = chunk * CHUNK + static_cast<int>(threadIdx.x);
    TABLE held[PER_THREAD];
#pragma unroll
    for (int k = 0; k < PER_THREAD; ++k) {
        const int i = first + k * BLOCK;
        if (i < width) held[k] = from[i];
    }
    const u32 length = at_least_0(input[row]) + at_least_0(cache[row]);
    const Sums ahead = sums_ahead(input, cache, row, shared);
    const int n = length < static_cast<u32>(width) ? static_cast<int>(length) : width;
#pragma unroll
    for (int k = 0; k < PER_THREAD; ++k) {
        const int i = first + k * BLOCK;
        if (i < n && ahead.all + i < total) ragged[ahead.all + i] = static_cast<RAGGED>(held[k]);
    }
    // Only where max_current_length was too small for this row.
    for (i64 base = first + static_cast<i64>(chunks) * CHUNK; base < n; base += static_cast<i64>(chunks) * CHUNK) {
        for (int k = 0; k < PER_THREAD; ++k) {
            const i64 i = base + k * BLOCK;
            if (i < n && ahead.all + i < total) ragged[ahead.all + i] = static_cast<RAGGED>(from[i]);
        }
    }
    return ahead;
}

extern "C" __global__ void __launch_bounds__(BLOCK)
    block_tables_to_ragged(const TABLE* __restrict__ table, i64 stride, i32 width,
                           const INPUT_LENGTH* __restrict__ input, const CACHE_LENGTH* __restrict__ cache,
                           RAGGED* __restrict__ ragged, u32 total, i32 chunks) {
    CUPY_LORA_SHARED(shared);
    const int row = static_cast<int>(blockIdx.x) / chunks;
    const int chunk = static_cast<int>(blockIdx.x) % chunks;
    ragged_row(table, stride, width, input, cache, row, chunk, chunks, ragged, total, reinterpret_cast<u32*>(shared));
}

// cu_seqlen and ragged_indptr (rows + 1 entries each) may be null.
extern "C" __global__ void __launch_bounds__(BLOCK)
    decode_step(const TABLE* __restrict__ table, i64 stride, i32 width, const INPUT_LENGTH* __restrict__ input,
                const CACHE_LENGTH* __restrict__ cache, RAGGED* __restrict__ ragged, u32 total, i32 chunks,
                const CU_SLOTS* __restrict__ cu_slots, POSITION* __restrict__ position_ids,
                SLOT_INDEX* __restrict__ slot_indices, u32 tokens, i32* __restrict__ cu_seqlen,
                i32* __restrict__ ragged_indptr
#if SCHEDULE
                ,
                i32 schedule_blocks, const Index* __restrict__ slot_of, const Pointer* __restrict__ indptr,
                i32 segments, i32 rows_of_batch, i32 slots, Lists lists, i32* __restrict__ tile_count
#endif
    ) {
    CUPY_LORA_SHARED(shared);
    int block = static_cast<int>(blockIdx.x);
#if SCHEDULE
    static_assert(kThreads == BLOCK, "one block size for both");
    if (block < schedule_blocks) {
        build_tiles_block(shared, block, slot_of, indptr, segments, rows_of_batch, slots, lists, tile_count);
        return;
    }
    block -= schedule_blocks;
#endif
    const int row = block / chunks;
    const int chunk = block % chunks;
    const i64 cached = cache[row];
    const i64 slot = cu_slots[row];
    const u32 n = at_least_0(input[row]);
    const Sums ahead = ragged_row(table, stride, width, input, cache, row, chunk, chunks, ragged, total,
                                  reinterpret_cast<u32*>(shared));
    if (chunk != 0) return;
    for (u32 i = threadIdx.x; i < n && ahead.input + i < tokens; i += BLOCK) {
        position_ids[ahead.input + i] = static_cast<POSITION>(cached + i);
        slot_indices[ahead.input + i] = static_cast<SLOT_INDEX>(slot + cached + i);
    }
    if (threadIdx.x == 0) {
        if (cu_seqlen != nullptr) {
            if (row == 0) cu_seqlen[0] = 0;
            cu_seqlen[row + 1] = static_cast<i32>(ahead.input + n);
        }
        if (ragged_indptr != nullptr) {
            if (row == 0) ragged_indptr[0] = 0;
            ragged_indptr[row + 1] = static_cast<i32>(ahead.all + n + at_least_0(cached));
        }
    }
}

// ---- rows of known offset ----------------------------------------------------------------------
struct Place {
    int row;
    i64 first;  // this thread's first item of the row
    i64 step;
};

CUPY_LORA_DEVICE Place place(int chunks) {
    const int group = static_cast<int>(blockIdx.x) / chunks;
    const int chunk = static_cast<int>(blockIdx.x) % chunks;
    const int thread = static_cast<int>(threadIdx.x);
    return {group * (BLOCK / LANES) + thread / LANES, static_cast<i64>(chunk) * LANES + thread % LANES,
            static_cast<i64>(chunks) * LANES};
}

extern "C" __global__ void __launch_bounds__(BLOCK)
    block_tables_to_padded(const CUMULATIVE* __restrict__ cu, TABLE* __restrict__ table, i64 stride, i32 width,
                           const RAGGED* __restrict__ ragged, i64 ragged_size, i32 rows, i32 chunks) {
    const Place at = place(chunks);
    if (at.row >= rows) return;
    const i64 start = cu[at.row];
    i64 n = static_cast<i64>(cu[at.row + 1]) - start;
    if (n > width) n = width;
    if (n > ragged_size - start) n = ragged_size - start;
    if (start < 0) return;
    TABLE* const to = table + at.row * stride;
#pragma unroll 4
    for (i64 i = at.first; i < n; i += at.step) to[i] = static_cast<TABLE>(ragged[start + i]);
}

extern "C" __global__ void __launch_bounds__(BLOCK)
    copy_next_input_ids(TOKEN* __restrict__ all_ids, i64 stride, i32 width, const CACHE_LENGTH* __restrict__ cache,
                        const INPUT_LENGTH* __restrict__ input, const PROMPT_LENGTH* __restrict__ prompt,
                        const NEXT_TOKEN* __restrict__ next_ids, i64 next_size, const CUMULATIVE* __restrict__ cu,
                        i32 rows, i32 chunks) {
    const Place at = place(chunks);
    if (at.row >= rows) return;
    const i64 length = static_cast<i64>(cache[at.row]) + static_cast<i64>(input[at.row]);
    const i64 prompt_length = prompt[at.row];
    const i64 start = cu[at.row];
    i64 n = static_cast<i64>(cu[at.row + 1]) - start;
    if (n > width - length) n = width - length;
    if (n > next_size - start) n = next_size - start;
    if (start < 0) return;
    for (i64 i = at.first; i < n; i += at.step) {
        const i64 column = length + i;
        if (column >= prompt_length && column >= 0) {
            all_ids[at.row * stride + column] = static_cast<TOKEN>(next_ids[start + i]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK)
    prepare_position_slot_ids(const CACHE_LENGTH* __restrict__ cache, const CUMULATIVE* __restrict__ cu,
                              const CU_SLOTS* __restrict__ cu_slots, POSITION* __restrict__ position_ids,
                              SLOT_INDEX* __restrict__ slot_indices, i64 tokens, i32 rows, i32 chunks) {
    const Place at = place(chunks);
    if (at.row >= rows) return;
    const i64 cached = cache[at.row];
    const i64 slot = cu_slots[at.row];
    const i64 start = cu[at.row];
    i64 n = static_cast<i64>(cu[at.row + 1]) - start;
    if (n > tokens - start) n = tokens - start;
    if (start < 0) return;
#pragma unroll 4
    for (i64 i = at.first; i < n; i += at.step) {
        position_ids[start + i] = static_cast<POSITION>(cached + i);
        slot_indices[start + i] = static_cast<SLOT_INDEX>(slot + cached + i);
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK)
    slots_filtering(const SLOT* __restrict__ slots, i64 slots_size, FILTERED* __restrict__ filtered, i64 filtered_size,
                    const CUMULATIVE* __restrict__ cu, const START* __restrict__ starts, i32 rows, i32 chunks) {
    const Place at = place(chunks);
    if (at.row >= rows) return;
    const i64 from = starts[at.row];
    const i64 to = cu[at.row];
    i64 n = static_cast<i64>(cu[at.row + 1]) - to;
    if (n > slots_size - from) n = slots_size - from;
    if (n > filtered_size - to) n = filtered_size - to;
    if (from < 0 || to < 0) return;
#pragma unroll 4
    for (i64 i = at.first; i < n; i += at.step) filtered[to + i] = static_cast<FILTERED>(slots[from + i]);
}
