// What decode and prefill attention share: tiles of keys and values staged from the pages, rotated where
// asked, and multiplied with 16-row blocks of queries by mma.sync, with the softmax kept online.
//
//   s = q k^T, y = scale * s (or soft_cap * tanh(s sm_scale / soft_cap)), o = sum_j exp2(y_j - max y) v_j
//
// Configuration by macros: ELEMENT (bf16 or f16), DIM (a multiple of 16), HEADS (of keys), GROUP (query heads of
// a key head), PAGE (tokens of a page), WARPS, TILE (keys of a tile), STAGES, ROPE, SOFT_CAP, WINDOW, VECTORS
// (queries and output can be moved 16 bytes at a time).
//
// A staged row is DIM elements and 16 bytes of nothing: an odd number of 16-byte pieces a row, so that the
// eight rows of an ldmatrix lie in different banks, without a permutation in the addresses.
#pragma once
#include "common.cuh"

constexpr int THREADS = 32 * WARPS;
constexpr int PIECES = DIM / 8;                 // 16-byte pieces of a row
constexpr int ROW_BYTES = DIM * 2 + 16;         // of a staged row
constexpr int SIDE_BYTES = TILE * ROW_BYTES;    // of a tile's keys, or values
constexpr int STAGE_BYTES = 2 * SIDE_BYTES;
constexpr i64 PAGE_SIDE = static_cast<i64>(HEADS) * PAGE * DIM * 2;  // from a page's keys to its values, one layer
constexpr int PAIRS = DIM / 2;                  // that RoPE rotates
constexpr int NEAR = 8;                         // positions of the near table
constexpr int FAR = ceil_div(TILE, NEAR);       // entries of the far table of one tile
constexpr float LOG2E = 1.44269504088896f;
constexpr float LN2 = 0.693147180559945f;

static_assert(DIM % 16 == 0 && TILE % 16 == 0, "fragments of 16");
static_assert(TILE <= THREADS, "one thread finds the page of a row");
static_assert(TILE * PIECES % THREADS == 0, "whole rounds of copies");

CUPY_LORA_DEVICE float minus_infinity() { return __uint_as_float(0xff800000u); }

// ---- sequences and their pages ------------------------------------------------------------------
struct Cache {
    const i64* kv_ptrs;
    const i32* kv_indptr;
    const i32* last_page_offset;
    i32 num_ptrs;
};

// Tokens of a sequence; 0 for one without pages or with tables out of range, of which nothing is read.
CUPY_LORA_DEVICE i32 length_of(const Cache& cache, int sequence) {
    const i32 first = cache.kv_indptr[sequence];
    const i32 end = cache.kv_indptr[sequence + 1];
    const i32 last = cache.last_page_offset[sequence];
    if (first < 0 || end <= first || end > cache.num_ptrs || last < 1 || last > PAGE) return 0;
    return (end - first - 1) * PAGE + last;
}

// The keys of one head of one layer of one sequence.
struct Keys {
    const i64* pages;
    i64 offset;  // bytes from a page's start to the head's keys
    i32 length;
};

CUPY_LORA_DEVICE Keys keys_of(const Cache& cache, int sequence, i32 length, i32 layer, int head) {
    const i64 offset = (static_cast<i64>(layer) * 2 * HEADS + head) * (static_cast<i64>(PAGE) * DIM * 2);
    return {cache.kv_ptrs + cache.kv_indptr[sequence], offset, length};
}

// Where the key at a position lies; 0 past the end and in a page that cannot be one (its keys count as zeros).
CUPY_LORA_DEVICE u64 key_address(const Keys& keys, i32 position) {
    if (position >= keys.length) return 0;
    const u32 at = static_cast<u32>(position);
    const u64 page = static_cast<u64>(keys.pages[at / PAGE]);
    if (page == 0 || page % 16 != 0) return 0;
    return page + static_cast<u64>(keys.offset) + (at % PAGE) * (DIM * 2u);
}

// ---- rotary embedding ---------------------------------------------------------------------------
// A position is a multiple of NEAR and a rest. cos and sin of the angles of the rests are in the near table
// [NEAR][PAIRS], those of the multiples in a far table [..][PAIRS]; their complex product is the angle's.
struct Frequencies {
    double turns[PAIRS];  // of a full circle, per position
};

// Entry i, pair d: the angle at position first + i * step. In float64 up to the fraction of a turn, so that
// the angle of position 1,000,000 is as exact as that of position 1.
CUPY_LORA_DEVICE void fill_angles(float2* table, int entries, i32 first, i32 step, const Frequencies& frequencies) {
    for (int e = static_cast<int>(threadIdx.x); e < entries * PAIRS; e += THREADS) {
        const double turns = static_cast<double>(first + e / PAIRS * step) * frequencies.turns[e % PAIRS];
        float sine, cosine;
        sincospif(static_cast<float>(2.0 * (turns - rint(turns))), &sine, &cosine);
        table[e] = make_float2(cosine, sine);
    }
}

union Piece {
    uint4 quad;
    u32 words[4];
};

// Rotates staged rows in place: pairs (d, d + DIM / 2). position(row) is that of a row; far holds the entries
// from position NEAR * first_far on.
template <class Position>
CUPY_LORA_DEVICE void rotate_rows(u8* rows, int count, const float2* near, const float2* far, i32 first_far,
                                  Position position) {
    constexpr int UNITS = PIECES / 2;  // pieces of half a row
    for (int e = static_cast<int>(threadIdx.x); e < count * UNITS; e += THREADS) {
        const int row = e / UNITS;
        const int unit = e % UNITS;
        const i32 at = position(row);
        const float4* const rest = reinterpret_cast<const float4*>(near + at % NEAR * PAIRS + unit * 8);
        const float4* const base = reinterpret_cast<const float4*>(far + (at / NEAR - first_far) * PAIRS + unit * 8);
        uint4* const low = reinterpret_cast<uint4*>(rows + row * ROW_BYTES) + unit;
        Piece a = {low[0]};
        Piece b = {low[UNITS]};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float4 r = rest[i];
            const float4 f = base[i];
            const float cos0 = r.x * f.x - r.y * f.y, sin0 = r.y * f.x + r.x * f.y;
            const float cos1 = r.z * f.z - r.w * f.w, sin1 = r.w * f.z + r.z * f.w;
            float a0, a1, b0, b1;
            unpack2(a.words[i], a0, a1, ELEMENT{});
            unpack2(b.words[i], b0, b1, ELEMENT{});
            a.words[i] = pack2(a0 * cos0 - b0 * sin0, a1 * cos1 - b1 * sin1, ELEMENT{});
            b.words[i] = pack2(b0 * cos0 + a0 * sin0, b1 * cos1 + a1 * sin1, ELEMENT{});
        }
        low[0] = a.quad;
        low[UNITS] = b.quad;
    }
}

// ---- staging ------------------------------------------------------------------------------------
struct Staging {
    u8* stages;      // [STAGES][keys, values][TILE] rows
    u64* addresses;  // [STAGES][TILE], where the rows of the tiles to come lie
    float2* near;    // [NEAR][PAIRS]
    float2* far;     // [FAR][PAIRS], of the tile
};

CUPY_LORA_DEVICE void copy_tile(const Staging& staging, int slot) {
    u8* const stage = staging.stages + slot * STAGE_BYTES;
    const u64* const addresses = staging.addresses + slot * TILE;
#pragma unroll
    for (int i = 0; i < TILE * PIECES / THREADS; ++i) {
        const int e = static_cast<int>(threadIdx.x) + i * THREADS;
        const int row = e / PIECES;
        const int piece = e % PIECES;
        const u64 address = addresses[row];
        const u8* const key = reinterpret_cast<const u8*>(address) + piece * 16;
        u8* const to = stage + row * ROW_BYTES + piece * 16;
        ptx::copy_async_16(to, key, address != 0);
        ptx::copy_async_16(to + SIDE_BYTES, key + PAGE_SIDE, address != 0);
    }
}

// Calls compute(tile, keys, values) for the tiles begin .. end - 1 (tile t: positions t * TILE on), STAGES - 1 tiles
// ahead of it under way. The near table is filled, and nobody reads the stages any more, when it is called; what the
// caller copied to shared memory before (committed) is there at the first compute.
template <class Compute>
CUPY_LORA_DEVICE void for_each_tile(const Keys& keys, int begin, int end, const Staging& staging,
                                    const Frequencies& frequencies, Compute compute) {
    const int tid = static_cast<int>(threadIdx.x);
    if (tid < TILE) {
#pragma unroll
        for (int i = 0; i < STAGES; ++i) {
            staging.addresses[i * TILE + tid] = begin + i < end ? key_address(keys, (begin + i) * TILE + tid) : 0;
        }
    }
    if constexpr (ROPE) fill_angles(staging.far, FAR, begin * TILE, NEAR, frequencies);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) {
        if (begin + i < end) copy_tile(staging, i);
        ptx::copy_async_commit();
    }
    int slot = 0;
#pragma unroll 1
    for (int tile = begin; tile < end; ++tile) {
        ptx::copy_async_wait<STAGES - 2>();
        __syncthreads();  // the tile has landed, everyone has left the stage that is filled next
        const int next = slot == 0 ? STAGES - 1 : slot - 1;
        if (tile + STAGES - 1 < end) copy_tile(staging, next);
        ptx::copy_async_commit();
        // The page table is read an iteration ahead of the copies that need it, behind the arithmetic.
        u64 address = 0;
        if (tid < TILE && tile + STAGES < end) address = key_address(keys, (tile + STAGES) * TILE + tid);
        u8* const stage = staging.stages + slot * STAGE_BYTES;
        if constexpr (ROPE) {
            const i32 first = tile * TILE;
            rotate_rows(stage, TILE, staging.near, staging.far, first / NEAR, [&](int row) { return first + row; });
            __syncthreads();
            if (tile + 1 < end) fill_angles(staging.far, FAR, first + TILE, NEAR, frequencies);
        }
        compute(tile, stage, stage + SIDE_BYTES);
        if (tid < TILE) staging.addresses[slot * TILE + tid] = address;
        slot = slot == STAGES - 1 ? 0 : slot + 1;
    }
}

// Rows of queries, 16-byte pieces, from row(r), which is null where there is none (zeros then).
template <class Row>
CUPY_LORA_DEVICE void stage_queries(u8* to, int count, Row row) {
    for (int e = static_cast<int>(threadIdx.x); e < count * PIECES; e += THREADS) {
        const int r = e / PIECES;
        const int piece = e % PIECES;
        const ELEMENT* const from = row(r);
        u8* const at = to + r * ROW_BYTES + piece * 16;
        if constexpr (VECTORS) {
            ptx::copy_async_16(at, from + piece * 8, from != nullptr);
        } else {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                reinterpret_cast<u16*>(at)[i] = from == nullptr ? static_cast<u16>(0) : from[piece * 8 + i].bits;
            }
        }
    }
    ptx::copy_async_commit();
}

// ---- 16-row blocks of queries over keys ---------------------------------------------------------
// What a warp holds of M blocks: accumulators as mma fragments, and for rows g and g + 8 of each block the
// maximum of the scores (before scaling) and this lane's part of the sum of the weights.
template <int M>
struct Block {
    float acc[M][DIM / 8][4];
    float top[M][2];
    float sum[M][2];
};

template <int M>
CUPY_LORA_DEVICE void clear(Block<M>& block) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int n = 0; n < DIM / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) block.acc[m][n][i] = 0.f;
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            block.top[m][h] = minus_infinity();
            block.sum[m][h] = 0.f;
        }
    }
}

CUPY_LORA_DEVICE float quad_max(float v) {
    v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 1));
    return fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 2));
}

CUPY_LORA_DEVICE float quad_sum(float v) {
    v += __shfl_xor_sync(0xffffffffu, v, 1);
    return v + __shfl_xor_sync(0xffffffffu, v, 2);
}

CUPY_LORA_DEVICE float tanh_of(float v) {
    return 1.f - 2.f / (1.f + ptx::exp2_approx(v * (2.f * LOG2E)));
}

// One step of the online softmax over KEYS keys; the whole warp takes part. Only the first HALVES halves of each
// block have queries. `scale` turns a score into an exponent of two; soft_cap: a score s is tanh(s * cap) first.
// visible(m, h, key): whether row g + 8 h of block m sees a key; asked where `masked`.
template <int M, int HALVES, int KEYS, class Visible>
CUPY_LORA_DEVICE void attend(Block<M>& block, const u8* queries, const u8* keys, const u8* values, float scale,
                             float cap, bool masked, Visible visible) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const u8* const q = queries + lane % 16 * ROW_BYTES + lane / 16 * 16;
    const u8* const k = keys + (lane / 16 * 8 + lane % 8) * ROW_BYTES + lane / 8 % 2 * 16;
    const u8* const v = values + lane % 16 * ROW_BYTES + lane / 16 * 16;
    float s[M][KEYS / 8][4];
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) s[m][n][i] = 0.f;
        }
    }
#pragma unroll
    for (int step = 0; step < DIM / 16; ++step) {
        u32 a[M][4];
#pragma unroll
        for (int m = 0; m < M; ++m) ptx::load_matrices(a[m], q + m * 16 * ROW_BYTES + step * 32);
#pragma unroll
        for (int n = 0; n < KEYS / 16; ++n) {
            u32 b[4];
            ptx::load_matrices(b, k + n * 16 * ROW_BYTES + step * 32);
#pragma unroll
            for (int m = 0; m < M; ++m) {
                ptx::mma_m16n8k16(s[m][2 * n], a[m][0], a[m][1], a[m][2], a[m][3], b[0], b[1], ELEMENT{});
                ptx::mma_m16n8k16(s[m][2 * n + 1], a[m][0], a[m][1], a[m][2], a[m][3], b[2], b[3], ELEMENT{});
            }
        }
    }
#pragma unroll
    for (int m = 0; m < M; ++m) {
        float factor[2] = {1.f, 1.f};
#pragma unroll
        for (int h = 0; h < HALVES; ++h) {
            float top = block.top[m][h];
#pragma unroll
            for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float& score = s[m][n][2 * h + i];
                    if constexpr (SOFT_CAP) score = tanh_of(score * cap);
                    if (masked && !visible(m, h, n * 8 + lane % 4 * 2 + i)) score = minus_infinity();
                    top = fmaxf(top, score);
                }
            }
            top = quad_max(top);
            // Nothing visible yet: any finite base gives weights of 0.
            const float base = top == minus_infinity() ? 0.f : top * scale;
            factor[h] = ptx::exp2_approx(fmaf(block.top[m][h], scale, -base));
            block.top[m][h] = top;
            float sum = 0.f;
#pragma unroll
            for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float& weight = s[m][n][2 * h + i];
                    weight = ptx::exp2_approx(fmaf(weight, scale, -base));
                    sum += weight;
                }
            }
            block.sum[m][h] = fmaf(block.sum[m][h], factor[h], sum);
        }
        // The maximum seldom moves after the first tiles.
        if (__any_sync(0xffffffffu, factor[0] != 1.f || factor[1] != 1.f)) {
#pragma unroll
            for (int n = 0; n < DIM / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) block.acc[m][n][i] *= factor[i / 2];
            }
        }
    }
#pragma unroll
    for (int j = 0; j < KEYS / 16; ++j) {
        u32 a[M][4];
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float* const pair = s[m][2 * j + i / 2] + i % 2 * 2;
                a[m][i] = i % 2 < HALVES ? pack2(pair[0], pair[1], ELEMENT{}) : 0u;
            }
        }
#pragma unroll
        for (int n = 0; n < DIM / 16; ++n) {
            u32 b[4];
            ptx::load_matrices_transposed(b, v + j * 16 * ROW_BYTES + n * 32);
#pragma unroll
            for (int m = 0; m < M; ++m) {
                ptx::mma_m16n8k16(block.acc[m][2 * n], a[m][0], a[m][1], a[m][2], a[m][3], b[0], b[1], ELEMENT{});
                ptx::mma_m16n8k16(block.acc[m][2 * n + 1], a[m][0], a[m][1], a[m][2], a[m][3], b[2], b[3], ELEMENT{});
            }
        }
    }
}

// ---- which work is this block's -----------------------------------------------------------------
// Exclusive prefix sum over the threads of the block; total: of all. scratch: WARPS + 1 values, free again on return.
template <class N>
CUPY_LORA_DEVICE N scan(N value, N* scratch, N& total) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int warp = static_cast<int>(threadIdx.x) / 32;
    N sum = value;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const N other = __shfl_up_sync(0xffffffffu, sum, distance);
        if (lane >= distance) sum += other;
    }
    if (lane == 31) scratch[warp] = sum;
    __syncthreads();
    N before = 0;
    total = 0;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
        if (w < warp) before += scratch[w];
        total += scratch[w];
    }
    __syncthreads();
    return before + sum - value;
}
