// Attention over paged keys and values: batch_decode (MODE 0) and batch_prefill (MODE 1, by warpgroups MODE 2).
//
//   out[i, h] = sum_j softmax_j(y[i, h, j]) v[j, h / GROUP]     lse[i, h] = log sum_j exp(y[i, h, j])
//   y[i, h, j] = sm_scale q[i, h] . k[j, h / GROUP]             or soft_cap tanh(that / soft_cap)
//
// over the keys j <= p(i) of the row's sequence (all of them where not causal), of which with a window only those
// with j > p(i) - window; p(i) = kv_len - qo_len + i is the query's position. With ROPE, q and k are rotated by their
// positions first. q, out: (tokens, HEADS * GROUP, DIM) with contiguous rows; a page is [layers, 2, HEADS, PAGE, DIM].
//
// Products by mma.sync (wgmma in MODE 2) with float32 sums, softmax in float32; weights are rounded to the 16-bit type
// for their product with the values, rotated queries and keys for theirs, the output once.
//
// Tables in device memory are not trusted (length_of, key_address; rows of the queries): what is out of range is empty.
// A sequence without keys gives zeros and -inf. The bits of a row depend on its sequence alone.
//
// Threads, shared memory: attention_decode.cuh, attention_prefill.cuh, attention_prefill_wgmma.cuh.
#if MODE == 0
#include "attention_decode.cuh"
#elif MODE == 1
#include "attention_prefill.cuh"
#else
#include "attention_prefill_wgmma.cuh"
#endif

#if MODE == 0
// cap: sm_scale / soft_cap; scale: what a score (tanh of it) is multiplied with to be an exponent of two.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    batch_decode(const ELEMENT* q, ELEMENT* out, float* lse, const i64* kv_ptrs, const i32* kv_indptr,
                 const i32* last_page_offset, float* partial_acc, float* partial_rows, i32* counters,
                 const Turns frequencies, i64 q_stride, i64 out_stride, i32 num_ptrs, i32 batch, i32 layer, i32 window,
                 i32 slots, i32 share, float scale, float cap) {
    ptx::begin_launch();
    CUPY_LORA_SHARED(memory);
    u8* shared = memory;
    Ring ring;
    ring.stages = carve<u8>(shared, STAGES * STAGE_BYTES);
    ring.queries = carve<u8>(shared, STAGES * QUERY_BYTES);
    ring.steps = carve<Step>(shared, STAGES);
    ring.goals = carve<Goal>(shared, STAGES);
    ring.addresses = carve<u64>(shared, COPY_BULK ? 0 : TILE);
    ring.full = carve<u64>(shared, 2 * STAGES + 2);
    ring.empty = ring.full + STAGES;
    u8* const angles = carve<u8>(shared, ROPE ? 17 * ANGLE_BYTES : 0);
    u8* const operands = carve<u8>(shared, ROPE ? WARPS * OPERAND_BYTES : 0);
    const Joined joined = {carve<float>(shared, WARPS * ROWS * PART_ROW), carve<Row>(shared, WARPS * ROWS),
                           carve<float>(shared, ROWS * DIM), carve<Row>(shared, 2 * ROWS)};
    Before* const runs = carve<Before>(shared, THREADS);
    i64* const scratch = carve<i64>(shared, BLOCK_WARPS);
    Arrivals arrivals(carve<Arrival>(shared, 1), ring.empty + STAGES);

    const int warp = static_cast<int>(threadIdx.x) / 32;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            ptx::mbarrier_init(ring.full + i, ARRIVALS);
            ptx::mbarrier_init(ring.empty + i, 32 * WARPS);
        }
        for (int i = 0; i < 2; ++i) ptx::mbarrier_init(ring.empty + STAGES + i, 1);  // the arrivals'
        ptx::mbarrier_init_fence();
    }
    const Work work = {{kv_ptrs, kv_indptr, last_page_offset, num_ptrs}, batch, window, slots, share};
    const Schedule schedule(work, runs, scratch);
    // The first counters hand out units, the others count the chunks that have arrived.
    const Partials partials = {partial_acc, partial_rows, counters + TICKETS};
    if (warp >= WARPS) {
        if (warp == WARPS) {
            produce(ring, schedule, work.cache, q, q_stride, layer, counters);
        } else if (threadIdx.x % 32 == 0) {
            arrivals.count(partials.arrived);
        }
        return;
    }
#if ROPE
    fill_angles(angles, frequencies);
    crew_meet();
    TurnedQueries queries(frequencies, angles, operands + warp * OPERAND_BYTES);
#else
    Queries queries;
#endif
    const auto store = [&](i32 sequence, const Heads& heads, int row, int column, Row state, float4 acc) {
        const i64 index = static_cast<i64>(sequence) * (HEADS * GROUP) + heads.first + row;
        store_quad(out + sequence * out_stride + (heads.first + row) * DIM, lse == nullptr ? nullptr : lse + index,
                   column, state, acc);
    };
    // The output of a unit's heads, from what is joined here.
    const auto write_joined = [&](i32 sequence, const Heads& heads, i32 joints) {
#pragma unroll 1
        for (int pass = 0; pass < VALUE_UNITS; ++pass) {
            each_quad(pass, [&](int row, int column) {
                if (row >= heads.count) return;
                const float4 acc = *reinterpret_cast<const float4*>(joined.acc + row * DIM + column);
                store(sequence, heads, row, column, joined.rows[joints % 2 * ROWS + row], acc);
            });
        }
    };
    // The same from the chunks in the workspace. All columns at once: the launch may end with the trips of this loop.
    const auto write_folded = [&](const Arrival& done) {
        const Heads heads = heads_of(done.head);
        const i64 first = static_cast<i64>(done.first_slot) * (HEADS * GROUP) + heads.first;
#pragma unroll 1
        for (int e = static_cast<int>(threadIdx.x); e < heads.count * (DIM / 4); e += 32 * WARPS) {
            const int row = e / (DIM / 4);
            const int column = e % (DIM / 4) * 4;
            Row state = {minus_infinity(), 0.f};
            float4 acc = make_float4(0.f, 0.f, 0.f, 0.f);
            fold_partials(partials, first + row, done.chunks, column, state, acc);
            store(done.sequence, heads, row, column, state, acc);
        }
    };
    Block block;
    clear(block);
    i32 joints = 0;         // chunks of the unit that are done
    bool counting = false;  // whether a chunk has been posted that is not settled
    for (Turn turn = {0, 0};; turn.next()) {
        ptx::mbarrier_wait_block(ring.full + turn.slot, turn.parity);
        Step step = ring.steps[turn.slot];
        Goal goal;
        const bool over = step.tile < 0;
        bool last = over;
        if (!over) {
            const i32 first = step.tile * TILE + warp * 4;  // of the warp's keys
            const u8* const rows = ring.queries + step.entry * QUERY_BYTES;
#if ROPE
            if (step.tile == step.begin + joints * step.chunk_tiles) {
                queries.begin(step.length - 1 - first);
            } else {
                queries.advance();
            }
            queries.load(rows, heads_of(step.head).count);
#else
            if (step.tile == step.begin) queries.load(rows, heads_of(step.head).count);
#endif
            const i32 oldest = WINDOW && step.length > window ? step.length - window : 0;
            if (first < step.length && first + SPREAD > oldest) {
                const bool masked = first + SPREAD > step.length || first < oldest;
                const u8* const keys = ring.stages + turn.slot * STAGE_BYTES;
                attend(block, queries, keys, keys + SIDE_BYTES, scale, cap, masked, first, oldest, step.length);
            }
            __syncwarp();
            step = ring.steps[turn.slot];  // again: what is not kept takes no registers
            goal = ring.goals[turn.slot];
            ptx::mbarrier_arrive(ring.empty + turn.slot);
            last = step.tile + 1 == step.end;
            if (!last && step.tile + 1 != step.begin + (joints + 1) * step.chunk_tiles) continue;
        }
        const Heads heads = heads_of(step.head);
        const bool finishes = last && counting && arrivals.settled();
        if (!over) {
            join_warps(block, joined, scale, [&](int row, int column, Row chunk, float4 acc) {
                if (goal.chunks == 0) {
                    keep(joined, joints, row, column, chunk, acc);
                } else if (row < heads.count) {
                    store_partial(partials, static_cast<i64>(goal.slot) * (HEADS * GROUP) + heads.first + row, column,
                                  chunk, acc);
                }
            });
            ++joints;
            if (!last) {
                clear(block);
                continue;
            }
        }
        if (finishes) {
            write_folded(arrivals.arrival());
            crew_meet();  // all have read it
        }
        if (over) break;
        counting = goal.chunks != 0;
        if (!counting) write_joined(goal.sequence, heads, joints);
        if (counting && threadIdx.x == 0) arrivals.post(step.head, goal);
        joints = 0;
        clear(block);
    }
    if (threadIdx.x == 0) arrivals.post_chunks(0);
}
#elif MODE == 1
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    batch_prefill(const ELEMENT* q, ELEMENT* out, float* lse, const i32* qo_indptr, const i64* kv_ptrs,
                  const i32* kv_indptr, const i32* last_page_offset, const Turns frequencies, i64 q_stride,
                  i64 out_stride, i32 num_ptrs, i32 batch, i32 tokens, i32 layer, i32 window, float scale, float cap) {
    ptx::begin_launch();
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
    const Keys keys = keys_of(cache, length > 0 ? cache.kv_indptr[unit.sequence] : 0, length, layer, head);
    start_tiles(keys, begin, end, staging);
    const Turner turner(staging.angles, frequencies);
    if (ROPE && begin < end) {
        // The last stage is empty until the first tile is multiplied.
        float2* const near = reinterpret_cast<float2*>(staging.stages + (STAGES - 1) * STAGE_BYTES);
        float2* const far = near + NEAR * PAIRS;
        const i32 first = max(position(0), 0) / NEAR;
        const i32 last = max(position(rows - 1), 0) / NEAR;
        fill_angles<THREADS>(near, NEAR, 0, 1, frequencies);
        fill_angles<THREADS>(far, last - first + 1, first * NEAR, NEAR, frequencies);
        ptx::copy_async_wait<STAGES - 1>();
        __syncthreads();
        rotate_rows(queries, rows, near, far, first, [&](int row) { return max(position(row), 0); });
        __syncthreads();  // what is behind the last stage, where the tables may end, is the turner's
        turner.begin(begin);
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
    for_each_tile(keys, begin, end, staging, turner, [&](int tile, const u8* k, const u8* v) {
#pragma unroll 1
        for (int part = 0; part < TILE; part += STEP) {
            const i32 at = tile * TILE + part;
            if (at >= warp_newest || at + STEP <= warp_oldest) continue;
            const bool masked = at + STEP > all_see_to || at < all_see_from;
            attend<BLOCKS, STEP>(block, own, k + part * ROW_BYTES, v + part * ROW_BYTES, scale, cap, masked,
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
#else
// most: units there can be; counters: of units handed out (attention_prefill_bring.cuh).
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    batch_prefill_wgmma(const ELEMENT* q, ELEMENT* out, float* lse, const i32* qo_indptr, const i64* kv_ptrs,
                        const i32* kv_indptr, const i32* last_page_offset, i32* counters, const Turns frequencies,
                        i64 q_stride, i64 out_stride, i32 num_ptrs, i32 batch, i32 tokens, i32 layer, i32 window,
                        i32 most, float scale, float cap) {
    ptx::begin_launch();
    CUPY_LORA_SHARED(memory);
    const Rings rings = carve_rings(memory);
    if (threadIdx.x == 0) begin_rings(rings);
    __syncthreads();
    const int crew = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / CREW, 0);  // known to be the warp's
    if (crew == CREWS) {
        ptx::leave_registers<REGISTERS_BRINGING>();
        const Cache cache = {kv_ptrs, kv_indptr, last_page_offset, num_ptrs};
        const Units units(qo_indptr, cache, batch, tokens, window);
        bring(rings, units, cache, frequencies, q, q_stride, layer, window, most, counters);
    } else {
        ptx::take_registers<REGISTERS>();
        Crew(rings, crew).work(out, lse, out_stride, window, scale, cap);
    }
}
#endif
