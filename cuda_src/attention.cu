// Attention over paged keys and values: batch_decode (MODE 0) and batch_prefill (MODE 1).
//
//   out[i, h] = sum_j softmax_j(y[i, h, j]) v[j, h / GROUP]     lse[i, h] = log sum_j exp(y[i, h, j])
//   y[i, h, j] = sm_scale q[i, h] . k[j, h / GROUP]             or soft_cap tanh(that / soft_cap)
//
// over the keys j <= p(i) of the row's sequence (all of them where not causal), of which with a window only those
// with j > p(i) - window; p(i) = kv_len - qo_len + i is the query's position. With ROPE, q and k are rotated by their
// positions first. q, out: (tokens, HEADS * GROUP, DIM) with contiguous rows; a page is [layers, 2, HEADS, PAGE, DIM].
//
// Products by mma.sync with float32 sums, softmax in float32; weights are rounded to the 16-bit type for their product
// with the values, rotated queries and keys when they are staged, the output once.
//
// Tables in device memory are not trusted (length_of, key_address; rows of the queries): what is out of range is empty.
// A sequence without keys gives zeros and -inf. The bits of a row depend on its sequence alone.
//
// Threads, shared memory: attention_decode.cuh, attention_prefill.cuh, over attention_tile.cuh, attention_stage.cuh.
#if MODE == 0
#include "attention_decode.cuh"
#else
#include "attention_prefill.cuh"
#endif

// Cuts the next piece off the shared memory.
template <class T>
CUPY_LORA_DEVICE T* carve(u8*& shared, int count) {
    T* const piece = reinterpret_cast<T*>(shared);
    shared += (count * static_cast<int>(sizeof(T)) + 15) / 16 * 16;
    return piece;
}

CUPY_LORA_DEVICE Staging carve_staging(u8*& shared) {
    Staging staging;
    staging.stages = carve<u8>(shared, STAGES * STAGE_BYTES);
    staging.addresses = carve<u64>(shared, STAGES * TILE);
    staging.near = carve<float2>(shared, ROPE ? (NEAR + 1) * PAIRS : 0);
    staging.far = carve<float2>(shared, ROPE ? FAR * PAIRS : 0);
    return staging;
}

#if MODE == 0
// cap: sm_scale / soft_cap; scale: what a score (tanh of it) is multiplied with to be an exponent of two.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    batch_decode(const ELEMENT* q, ELEMENT* out, float* lse, const i64* kv_ptrs, const i32* kv_indptr,
                 const i32* last_page_offset, float* partial_acc, float* partial_rows, i32* arrived,
                 const Turns frequencies, i64 q_stride, i64 out_stride, i32 num_ptrs, i32 batch, i32 layer, i32 window,
                 i32 slots, i32 share, float scale, float cap) {
    CUPY_LORA_SHARED(memory);
    u8* shared = memory;
    u8* const queries = carve<u8>(shared, STAGES * QUERY_BYTES);
    const Staging staging = carve_staging(shared);
    float2* const turned = carve<float2>(shared, ROPE ? PAIRS : 0);  // the angles of the next unit's query
    const Joined joined = {carve<float>(shared, WARPS * ROWS * PART_ROW), carve<Row>(shared, WARPS * ROWS),
                           carve<float>(shared, ROWS * DIM), carve<Row>(shared, 2 * ROWS)};
    i64* const scratch = carve<i64>(shared, WARPS + 1);
    Unit* const ring = carve<Unit>(shared, RING);
    i32* const before = carve<i32>(shared, 1);

    const Work work = {{kv_ptrs, kv_indptr, last_page_offset, num_ptrs}, batch, window, slots, share};
    const Partials partials = {partial_acc, partial_rows, arrived, slots};
    const int tid = static_cast<int>(threadIdx.x);
    const int warp = tid / 32;
    const Schedule schedule(work, scratch);
    const i64 numbers = schedule.units() * UNITS;
    if (blockIdx.x >= numbers) return;

    const auto locate = [&](int ahead, i64 number, int entry) {
        const i64 other = number + static_cast<i64>(ahead) * gridDim.x;
        if (other < numbers) schedule.locate(other / UNITS, ring + (entry + ahead) % RING);
    };
    for (int i = 0; i < RING - 1; ++i) locate(i, blockIdx.x, 0);
    if constexpr (ROPE) fill_near(staging.near, frequencies);
    __syncthreads();
    Cursor at = {static_cast<i64>(blockIdx.x), 0, ring[0].begin};
    Cursor copied = at, addressed = at;
    const auto next_address = [&]() -> u64 {
        if (addressed.number >= numbers) return 0;
        const Unit& unit = ring[addressed.entry];
        const Keys keys = keys_of(work.cache, unit.first_page, unit.length, layer, heads_of(addressed.number).key);
        const u64 address = tid < TILE ? key_address(keys, addressed.tile * TILE + tid) : 0;
        advance(addressed, ring, numbers);
        return address;
    };
    const auto copy_next = [&](int slot) {
        if (copied.number < numbers) {
            const Unit& unit = ring[copied.entry];
            if (copied.tile == unit.begin) {
                const Heads heads = heads_of(copied.number);
                const ELEMENT* const query = q + unit.sequence * q_stride + heads.first * DIM;
                stage_queries(queries + copied.entry % STAGES * QUERY_BYTES, ROWS,
                              [&](int r) { return r < heads.count ? query + r * DIM : nullptr; });
            }
            copy_tile(staging, slot);
            advance(copied, ring, numbers);
        }
        ptx::copy_async_commit();
    };
    const auto fill_far = [&](const Cursor& next) {
        if (next.number >= numbers) return;
        const Unit& unit = ring[next.entry];
        fill_angles(staging.far, FAR, next.tile * TILE, NEAR, frequencies);
        if (next.tile == unit.begin) fill_angles(turned, 1, unit.length - 1, 0, frequencies);
    };
    for (int i = 0; i < STAGES; ++i) {
        const u64 address = next_address();
        if (tid < TILE) staging.addresses[i * TILE + tid] = address;
    }
    if constexpr (ROPE) fill_far(at);
    __syncthreads();
    for (int i = 0; i < STAGES - 1; ++i) copy_next(i);

    Block<1> block;
    clear(block);
    i32 joints = 0;  // chunks of the unit that are done
    int slot = 0;
#pragma unroll 1
    while (at.number < numbers) {
        ptx::copy_async_wait<STAGES - 2>();
        __syncthreads();  // the tile has landed; everyone has left the stage and the unit before it
        copy_next(slot == 0 ? STAGES - 1 : slot - 1);
        // The page table is read an iteration ahead of the copies that need it, behind the arithmetic.
        const u64 address = next_address();
        const Unit unit = ring[at.entry];
        if (at.tile == unit.begin) locate(RING - 1, at.number, at.entry);
        const Heads heads = heads_of(at.number);
        u8* const query = queries + at.entry % STAGES * QUERY_BYTES;
        u8* const keys = staging.stages + slot * STAGE_BYTES;
        const u8* const values = keys + SIDE_BYTES;
        Cursor next = at;
        advance(next, ring, numbers);
        if constexpr (ROPE) {
            rotate_tile(keys, staging.near, staging.far);
            // Entry 0 of the near table turns nothing: `turned` has the whole angle.
            if (at.tile == unit.begin) rotate_rows(query, ROWS, staging.near, turned, 0, [](int) { return 0; });
            __syncthreads();
            fill_far(next);
        }
        const i32 oldest = WINDOW && unit.length > window ? unit.length - window : 0;
        const i32 first = at.tile * TILE + warp * 16;
        if (first < unit.length && first + 16 > oldest) {
            const bool masked = first + 16 > unit.length || first < oldest;
            attend<1, HALVES, 16, ROWS>(block, query, keys + warp * 16 * ROW_BYTES, values + warp * 16 * ROW_BYTES,
                                        scale, cap, masked,
                                        [&](int, int) { return Span{oldest - first, unit.length - first}; });
        }
        if (tid < TILE) staging.addresses[slot * TILE + tid] = address;
        slot = slot == STAGES - 1 ? 0 : slot + 1;
        const bool last = at.tile + 1 == unit.end;
        const bool joins = last || at.tile + 1 == unit.begin + (joints + 1) * unit.chunk_tiles;
        const i64 number = at.number;
        at = next;
        if (!joins) continue;

        join_warps(block, joined, scale, [&](int row, int column, Row chunk, float4 acc) {
            if (unit.chunks == 0) {
                keep(joined, joints, row, column, chunk, acc);
            } else if (row < heads.count) {
                store_partial(partials, static_cast<i64>(unit.slot) * (HEADS * GROUP) + heads.first + row, column,
                              chunk, acc);
            }
        });
        clear(block);
        ++joints;
        if (!last) continue;

        bool finishes = true;
        if (unit.chunks != 0) {
            i32* const counter = arrived + static_cast<i64>(unit.first_slot) * UNITS + number % UNITS;
            ptx::fence_gpu();
            __syncthreads();
            if (tid == 0) {
                *before = atomicAdd(counter, 1);
                ptx::fence_gpu();
            }
            __syncthreads();
            finishes = *before == unit.chunks - 1;
            if (finishes && tid == 0) *counter = 0;
        }
#pragma unroll 1
        for (int pass = 0; finishes && pass < PASSES; ++pass) {
            each_quad(pass, [&](int row, int column) {
                if (row >= heads.count) return;
                Row state = {minus_infinity(), 0.f};
                float4 acc = make_float4(0.f, 0.f, 0.f, 0.f);
                if (unit.chunks != 0) {
                    const i64 chunk = static_cast<i64>(unit.first_slot) * (HEADS * GROUP) + heads.first + row;
                    fold_partials(partials, chunk, unit.chunks, column, state, acc);
                } else {
                    state = joined.rows[joints % 2 * ROWS + row];
                    acc = *reinterpret_cast<const float4*>(joined.acc + row * DIM + column);
                }
                const i64 index = static_cast<i64>(unit.sequence) * (HEADS * GROUP) + heads.first + row;
                store_quad(out + unit.sequence * out_stride + (heads.first + row) * DIM,
                           lse == nullptr ? nullptr : lse + index, column, state, acc);
            });
        }
        joints = 0;
    }
    ptx::copy_async_wait<0>();
}
#else
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    batch_prefill(const ELEMENT* q, ELEMENT* out, float* lse, const i32* qo_indptr, const i64* kv_ptrs,
                  const i32* kv_indptr, const i32* last_page_offset, const Turns frequencies, i64 q_stride,
                  i64 out_stride, i32 num_ptrs, i32 batch, i32 tokens, i32 layer, i32 window, float scale, float cap) {
    CUPY_LORA_SHARED(memory);
    u8* shared = memory;
    u8* const queries = carve<u8>(shared, ROWS * ROW_BYTES);
    const Staging staging = carve_staging(shared);
    i64* const scratch = carve<i64>(shared, WARPS + 1);
    Unit* const unit_at = carve<Unit>(shared, 1);
    Span* const spans = carve<Span>(shared, ROWS);  // the keys that each row sees

    locate(qo_indptr, batch, tokens, blockIdx.x / HEADS, unit_at, scratch);
    const Unit unit = *unit_at;
    if (unit.count < 0) return;
    const int head = static_cast<int>(blockIdx.x % HEADS);
    const Cache cache = {kv_ptrs, kv_indptr, last_page_offset, num_ptrs};
    const i32 length = length_of(cache, unit.sequence);
    const i32 rows = min(static_cast<i64>(ROWS), static_cast<i64>(unit.count) * GROUP - unit.first_row);
    const i32 shift = length - unit.count;  // position of the sequence's first query
    const auto position = [&](int row) { return shift + (unit.first_row + row) / GROUP; };
    // Token and head of a row, as a number of rows of DIM; the token alone where heads do not matter.
    const auto token = [&](int row) { return static_cast<i64>(unit.start) + (unit.first_row + row) / GROUP; };
    const auto head_of = [&](int row) { return head * GROUP + (unit.first_row + row) % GROUP; };
    stage_queries(queries, ROWS,
                  [&](int row) { return row < rows ? q + token(row) * q_stride + head_of(row) * DIM : nullptr; });
    ptx::copy_async_commit();

    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    u8* const own = queries + warp * WARP_ROWS * ROW_BYTES;
    // Keys that the tile's rows, and those of this warp, can see: begin .. end - 1.
    const auto oldest = [&](int row) { return WINDOW ? max(position(row) - window + 1, 0) : 0; };
    const auto newest = [&](int row) {
        return CAUSAL ? min(position(row) + 1, length) : position(row) < 0 ? 0 : length;
    };
    for (int row = static_cast<int>(threadIdx.x); row < ROWS; row += THREADS) spans[row] = {oldest(row), newest(row)};
    const i32 begin = oldest(0) / TILE;
    const i32 end = max((newest(rows - 1) + TILE - 1) / TILE, begin);
    if (ROPE && begin < end) {
        fill_near(staging.near, frequencies);
        float2* const far = reinterpret_cast<float2*>(staging.stages);
        const i32 first = max(position(0), 0) / NEAR;
        const i32 last = max(position(rows - 1), 0) / NEAR;
        fill_angles(far, last - first + 1, first * NEAR, NEAR, frequencies);
        ptx::copy_async_wait<0>();
        __syncthreads();
        rotate_rows(queries, rows, staging.near, far, first, [&](int row) { return max(position(row), 0); });
        __syncthreads();
    }
    const int warp_first = min(warp * WARP_ROWS, rows - 1);
    const int warp_last = min(warp * WARP_ROWS + WARP_ROWS, rows) - 1;
    const bool idle = warp * WARP_ROWS >= rows;
    const i32 warp_oldest = oldest(warp_first);
    const i32 warp_newest = idle ? 0 : newest(warp_last);
    const i32 all_see_from = oldest(max(warp_last, 0));
    const i32 all_see_to = newest(warp_first);

    Block<BLOCKS> block;
    clear(block);
    const Keys keys = keys_of(cache, length > 0 ? cache.kv_indptr[unit.sequence] : 0, length, layer, head);
    for_each_tile(keys, begin, end, staging, frequencies, [&](int tile, const u8* k, const u8* v) {
#pragma unroll 1
        for (int part = 0; part < TILE; part += STEP) {
            const i32 at = tile * TILE + part;
            if (at >= warp_newest || at + STEP <= warp_oldest) continue;
            const bool masked = at + STEP > all_see_to || at < all_see_from;
            attend<BLOCKS, 2, STEP, 16>(block, own, k + part * ROW_BYTES, v + part * ROW_BYTES, scale, cap, masked,
                                        [&](int m, int h) {
                                            const Span span = spans[warp * WARP_ROWS + m * 16 + 8 * h + lane / 4];
                                            return Span{span.first - at, span.end - at};
                                        });
        }
    });
    ptx::copy_async_wait<0>();
    __syncthreads();  // without tiles the queries may still be on their way to the rows that the output takes
    struct Place {
        ELEMENT* out;
        i64 lse;
    };
    store_rows(block, own, scale, lse, [&](int r) {
        const int row = warp * WARP_ROWS + r;
        if (row >= rows) return Place{nullptr, -1};
        return Place{out + token(row) * out_stride + head_of(row) * DIM, token(row) * (HEADS * GROUP) + head_of(row)};
    });
}
#endif
