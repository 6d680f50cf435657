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
// The ragged kernels: a row for each of the grid's x, its chunks along y; every block adds up the lengths ahead of its
// row by itself (BLOCK at a time), while its first CHUNK entries of the table are on their way: one launch, no scan
// between blocks. Entries past the row's length are loaded too, as the length is not known yet.
// The others: LANES threads a row, BLOCK / LANES rows a block, ITEMS items a thread at a time; the grid's y
// counts the chunks of a row, and a row longer than it was sized for is walked over.
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
constexpr int ROW_CHUNK = LANES * ITEMS;  // items of a row that a block (or its part) has in flight

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
#pragma unroll 2
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
                                 int row, RAGGED* __restrict__ ragged, u32 total, u32* shared) {
    const TABLE* const from = table + row * stride;
    const int first = static_cast<int>(blockIdx.y) * CHUNK + static_cast<int>(threadIdx.x);
    TABLE held[PER_THREAD];
#pragma unroll
    for (int k = 0; k < PER_THREAD; ++k) {
        const int i = first + k * BLOCK;
        if (i < width) held[k] = from[i];
    }
    const u32 length = at_least_0(input[row]) + at_least_0(cache[row]);
    const Sums ahead = sums_ahead(input, cache, row, shared);
    const u32 room = total > ahead.all ? total - ahead.all : 0u;
    const u32 entries = length < static_cast<u32>(width) ? length : static_cast<u32>(width);
    const int n = static_cast<int>(entries < room ? entries : room);
    RAGGED* const to = ragged + ahead.all;
#pragma unroll
    for (int k = 0; k < PER_THREAD; ++k) {
        const int i = first + k * BLOCK;
        if (i < n) to[i] = static_cast<RAGGED>(held[k]);
    }
    // Only where max_current_length was too small for this row.
#pragma unroll 1
    for (i64 base = first; (base += static_cast<i64>(gridDim.y) * CHUNK) < n;) {
#pragma unroll 1
        for (i64 i = base; i < n && i < base + CHUNK; i += BLOCK) to[i] = static_cast<RAGGED>(from[i]);
    }
    return ahead;
}

// A number of blocks in the bounds of these two: without one the assembler spills to reach a step of occupancy.
extern "C" __global__ void __launch_bounds__(BLOCK, 1024 / BLOCK)
    block_tables_to_ragged(const TABLE* __restrict__ table, i64 stride, i32 width,
                           const INPUT_LENGTH* __restrict__ input, const CACHE_LENGTH* __restrict__ cache,
                           RAGGED* __restrict__ ragged, u32 total) {
    ptx::begin_launch();
    CUPY_LORA_SHARED(shared);
    const int row = static_cast<int>(blockIdx.x);
    ragged_row(table, stride, width, input, cache, row, ragged, total, reinterpret_cast<u32*>(shared));
}

// cu_seqlen and ragged_indptr (rows + 1 entries each) may be null.
extern "C" __global__ void __launch_bounds__(BLOCK, 1024 / BLOCK)
    decode_step(const TABLE* __restrict__ table, i64 stride, i32 width, const INPUT_LENGTH* __restrict__ input,
                const CACHE_LENGTH* __restrict__ cache, RAGGED* __restrict__ ragged, u32 total,
                const CU_SLOTS* __restrict__ cu_slots, POSITION* __restrict__ position_ids,
                SLOT_INDEX* __restrict__ slot_indices, u32 tokens, i32* __restrict__ cu_seqlen,
                i32* __restrict__ ragged_indptr
#if SCHEDULE
                ,
                i32 schedule_blocks, const Index* __restrict__ slot_of, const Pointer* __restrict__ indptr,
                i32 segments, i32 rows_of_batch, i32 slots, Lists lists, i32* __restrict__ tile_count
#endif
    ) {
    ptx::begin_launch();
    CUPY_LORA_SHARED(shared);
    int row = static_cast<int>(blockIdx.x);
#if SCHEDULE
    static_assert(kThreads == BLOCK, "one block size for both");
    if (row < schedule_blocks) {
        if (blockIdx.y == 0)
            build_tiles_block(shared, row, slot_of, indptr, segments, rows_of_batch, slots, lists, tile_count);
        return;
    }
    row -= schedule_blocks;
#endif
    const i64 cached = cache[row];
    const i64 slot = cu_slots[row];
    const u32 n = at_least_0(input[row]);
    const Sums ahead =
        ragged_row(table, stride, width, input, cache, row, ragged, total, reinterpret_cast<u32*>(shared));
    if (blockIdx.y != 0) return;
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
CUPY_LORA_DEVICE int row_of_thread() { return static_cast<int>(blockIdx.x * (BLOCK / LANES) + threadIdx.x / LANES); }

CUPY_LORA_DEVICE i64 least(i64 a, i64 b) { return a < b ? a : b; }

// n, or 0 where `start` is negative. Not by a condition: the compiler would load what n is made of behind it.
CUPY_LORA_DEVICE i64 unless_negative(i64 start, i64 n) { return n & ~(start >> 63); }

// Calls use(first item, how many from there on are the row's) for the ITEMS items of this thread in each of
// its chunks of a row of n: every LANES-th from the first. One round, where the hint sized the grid well; it is
// entered for n <= 0 too, without an item: a branch on n ahead of it would hold back the loads that n does not
// need, and every trip to memory behind another one is a third of the time of such a kernel.
template <class Use>
CUPY_LORA_DEVICE void each_chunk(i64 n, const Use& use) {
    const int lane = static_cast<int>(threadIdx.x % LANES);
    i64 at = static_cast<i64>(blockIdx.y) * ROW_CHUNK;
    if (n < 0) n = 0;
#pragma unroll 1
    do {
        use(at + lane, static_cast<int>(least(n - at, ROW_CHUNK)) - lane);
        at += static_cast<i64>(gridDim.y) * ROW_CHUNK;
    } while (at < n);
}

template <class To, class From>
CUPY_LORA_DEVICE void copy_row(To* __restrict__ to, const From* __restrict__ from, i64 n) {
    each_chunk(n, [&](i64 first, int left) {
        From held[ITEMS];
#pragma unroll
        for (int k = 0; k < ITEMS; ++k) {
            if (k * LANES < left) held[k] = from[first + k * LANES];
        }
#pragma unroll
        for (int k = 0; k < ITEMS; ++k) {
            if (k * LANES < left) to[first + k * LANES] = static_cast<To>(held[k]);
        }
    });
}

extern "C" __global__ void __launch_bounds__(BLOCK)
    block_tables_to_padded(const CUMULATIVE* cu, TABLE* table, i64 stride, i32 width, const RAGGED* ragged,
                           i64 ragged_size, i32 rows) {
    ptx::begin_launch();
    const int row = row_of_thread();
    if (row >= rows) return;
    const i64 start = cu[row], end = cu[row + 1];
    const i64 n = unless_negative(start, least(least(end - start, width), ragged_size - start));
    copy_row(table + row * stride, ragged + start, n);
}

extern "C" __global__ void __launch_bounds__(BLOCK)
    copy_next_input_ids(TOKEN* all_ids, i64 stride, i32 width, const CACHE_LENGTH* cache, const INPUT_LENGTH* input,
                        const PROMPT_LENGTH* prompt, const NEXT_TOKEN* next_ids, i64 next_size, const CUMULATIVE* cu,
                        i32 rows) {
    ptx::begin_launch();
    const int row = row_of_thread();
    if (row >= rows) return;
    const i64 start = cu[row], end = cu[row + 1];
    const i64 length = static_cast<i64>(cache[row]) + input[row], prompt_length = prompt[row];
    const i64 guess = row < next_size ? next_ids[row] : 0;  // one token each: on its way before cu says so
    const i64 first = prompt_length > length ? prompt_length - length : length < 0 ? -length : 0;  // past the prompt
    const i64 n = unless_negative(start, least(least(end - start, width - length), next_size - start));
    if (start == row && n == 1 && first == 0) {
        all_ids[row * stride + length] = static_cast<TOKEN>(guess);
        return;
    }
    copy_row(all_ids + row * stride + length + first, next_ids + start + first, n - first);
}

extern "C" __global__ void __launch_bounds__(BLOCK)
    prepare_position_slot_ids(const CACHE_LENGTH* cache, const CUMULATIVE* cu, const CU_SLOTS* cu_slots,
                              POSITION* __restrict__ position_ids, SLOT_INDEX* __restrict__ slot_indices, i64 tokens,
                              i32 rows) {
    ptx::begin_launch();
    const int row = row_of_thread();
    if (row >= rows) return;
    const i64 start = cu[row], end = cu[row + 1];
    const i64 cached = cache[row], slot = cu_slots[row];
    const i64 n = unless_negative(start, least(end, tokens) - start);
    each_chunk(n, [&](i64 first, int left) {
        POSITION* const positions = position_ids + start + first;
        SLOT_INDEX* const slots = slot_indices + start + first;
#pragma unroll
        for (int k = 0; k < ITEMS; ++k) {
            if (k * LANES < left) {
                positions[k * LANES] = static_cast<POSITION>(cached + first + k * LANES);
                slots[k * LANES] = static_cast<SLOT_INDEX>(slot + cached + first + k * LANES);
            }
        }
    });
}

extern "C" __global__ void __launch_bounds__(BLOCK)
    slots_filtering(const SLOT* slots, i64 slots_size, FILTERED* filtered, i64 filtered_size, const CUMULATIVE* cu,
                    const START* starts, i32 rows) {
    ptx::begin_launch();
    const int row = row_of_thread();
    if (row >= rows) return;
    const i64 from = starts[row], to = cu[row], end = cu[row + 1];
    const i64 n = unless_negative(from | to, least(least(end - to, slots_size - from), filtered_size - to));
    copy_row(filtered + to, slots + from, n);
}
