// RMS norm, and the same with the residual addition before it.
//
//   rms_norm:            out[r, c] = input[r, c] / sqrt(mean_c(input[r, c]^2) + epsilon) * weight[c]
//   fused_add_rms_norm:  residual[r, c] = round(residual[r, c] + input[r, c]), then
//                        input[r, c] = residual[r, c] / sqrt(mean_c(residual[r, c]^2) + epsilon) * weight[c]
//
// input, residual, out (rows, COLUMNS) of ELEMENT, last axis contiguous; weight (COLUMNS) of WEIGHT.
// float32 inside, one rounding. A row is read once: it stays in registers (VECS vectors a thread),
// what does not fit there in shared memory (SHARED_VECS), and only what fits in neither is read
// again (REREAD_VECS; from L2 as a rule).
//
// Threads: THREADS a row. THREADS > 32: a block is one row at a time; THREADS <= 32: a block is
// BLOCK / THREADS rows. A block is done after its rows, or (WALK) goes on over the rows with the grid's stride, the
// next row on its way to registers before the one at hand is reduced (PREFETCH).
//
// A row is cut into vectors of 16 bytes. Vector v belongs to thread v % THREADS, whatever the width
// of the accesses (ACCESS bytes, less than 16 where rows do not start at multiples of 16): the order
// of the sums, and with it every bit of the result, depends on COLUMNS and the dtype only.
//
// Shared memory: 2 x 32 floats (the warps' sums, two sets in turn, so that one barrier a row is
// enough), then SHARED_VECS * THREADS vectors.
//
// Preconditions: pointers and row offsets are multiples of ACCESS (weight: WEIGHT_ACCESS) bytes; out
// is input itself or apart from it; rows of out do not overlap.
#include "vectors.cuh"

using T = ELEMENT;
using W = WEIGHT;

constexpr bool FUSED = FUSED_ADD;                          // the residual form
constexpr int PER_VEC = 16 / static_cast<int>(sizeof(T));  // elements of a vector
constexpr int FULL_VECS = COLUMNS / PER_VEC;               // vectors of a row, the last partial one apart
constexpr int TAIL = COLUMNS % PER_VEC;                    // elements of that one
constexpr int REG_VECS = VECS;
constexpr int IN_SHARED = VECS + SHARED_VECS;  // end of the vectors that are held on the chip
constexpr int ALL_VECS = IN_SHARED + REREAD_VECS;
constexpr int ROWS = THREADS > 32 ? 1 : BLOCK / THREADS;  // of a block at a time
constexpr int WARPS = ceil_div(THREADS, 32);              // of a row
constexpr bool EVEN = FULL_VECS == ALL_VECS * THREADS;    // every thread has ALL_VECS whole vectors
constexpr bool KEEP_WEIGHT = KEEP;                        // weights stay in registers from row to row

static_assert(THREADS * ALL_VECS * PER_VEC >= COLUMNS, "the threads cover the row");
static_assert(THREADS > 32 ? BLOCK == THREADS : BLOCK % 32 == 0, "whole warps");
static_assert(!PREFETCH || (SHARED_VECS == 0 && REREAD_VECS == 0), "only rows in registers are prefetched");
static_assert(WALK || !PREFETCH, "there is a next row");

struct Strides {  // in elements
    i64 outer;
    i64 inner;
};

// Where this thread is: its row of the block, and its first vector in that row.
CUPY_LORA_DEVICE int row_of_block() { return ROWS == 1 ? 0 : static_cast<int>(threadIdx.x) / THREADS; }
CUPY_LORA_DEVICE int first_vector() {
    return ROWS == 1 ? static_cast<int>(threadIdx.x) : static_cast<int>(threadIdx.x) % THREADS;
}

// A thread's vector k of a row is at `mine` + k * STEP, where `mine` is its vector 0: one address, many immediates.
constexpr int STEP = THREADS * PER_VEC;

// Elements of this thread's vector k that exist: PER_VEC, or fewer for the row's last, or none.
CUPY_LORA_DEVICE int extent(int k) {
    const int index = first_vector() + k * THREADS;
    if (EVEN || index < FULL_VECS) return PER_VEC;
    return index == FULL_VECS ? TAIL : 0;
}

CUPY_LORA_DEVICE Vector load_vector(const T* mine, int k) {
    const int n = extent(k);
    const T* const p = mine + k * STEP;
    if (n == PER_VEC) return load_16<ACCESS>(p);
    Vector v;
    v.quad = make_uint4(0, 0, 0, 0);
    if constexpr (TAIL != 0) {
#pragma unroll
        for (int i = 0; i < PER_VEC; ++i) {
            if (i < n) {
                if constexpr (sizeof(T) == 2) {
                    v.halves[i] = reinterpret_cast<const u16*>(p)[i];
                } else {
                    v.words[i] = reinterpret_cast<const u32*>(p)[i];
                }
            }
        }
    }
    return v;
}

CUPY_LORA_DEVICE void store_vector(T* mine, int k, const Vector& v) {
    const int n = extent(k);
    T* const p = mine + k * STEP;
    if (n == PER_VEC) {
        store_16<ACCESS>(p, v);
        return;
    }
    if constexpr (TAIL != 0) {
#pragma unroll
        for (int i = 0; i < PER_VEC; ++i) {
            if (i < n) {
                if constexpr (sizeof(T) == 2) {
                    reinterpret_cast<u16*>(p)[i] = v.halves[i];
                } else {
                    reinterpret_cast<u32*>(p)[i] = v.words[i];
                }
            }
        }
    }
}

template <class E>
CUPY_LORA_DEVICE void unpack(const Vector& v, float* f, E tag) {
    if constexpr (sizeof(E) == 2) {
#pragma unroll
        for (int i = 0; i < 4; ++i) unpack2(v.words[i], f[2 * i], f[2 * i + 1], tag);
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) f[i] = __uint_as_float(v.words[i]);
    }
}

template <class E>
CUPY_LORA_DEVICE Vector pack(const float* f, E tag) {
    Vector v;
    if constexpr (sizeof(E) == 2) {
#pragma unroll
        for (int i = 0; i < 4; ++i) v.words[i] = pack2(f[2 * i], f[2 * i + 1], tag);
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) v.words[i] = __float_as_uint(f[i]);
    }
    return v;
}

// The weights of one vector of the row, in their own dtype.
struct Weights {
    static constexpr int QUADS = PER_VEC * static_cast<int>(sizeof(W)) / 16;
    Vector v[QUADS];
};

CUPY_LORA_DEVICE Weights load_weights(const W* mine, int k) {
    Weights w;
    const int n = extent(k);
    const W* const p = mine + k * STEP;
    if (n == PER_VEC) {
#pragma unroll
        for (int q = 0; q < Weights::QUADS; ++q) {
            w.v[q] = load_16<WEIGHT_ACCESS>(reinterpret_cast<const u8*>(p) + 16 * q);
        }
        return w;
    }
#pragma unroll
    for (int q = 0; q < Weights::QUADS; ++q) w.v[q].quad = make_uint4(0, 0, 0, 0);
    if constexpr (TAIL != 0) {
#pragma unroll
        for (int i = 0; i < PER_VEC; ++i) {
            if (i < n) {
                if constexpr (sizeof(W) == 2) {
                    w.v[0].halves[i] = reinterpret_cast<const u16*>(p)[i];
                } else {
                    w.v[i / 4].words[i % 4] = reinterpret_cast<const u32*>(p)[i];
                }
            }
        }
    }
    return w;
}

// What a thread reads for one vector. Loads come first and in batches: the store of a sum may, for all that
// the compiler knows, write what a later load reads.
struct Raw {
    Vector input;
    Vector residual;
};

CUPY_LORA_DEVICE Raw fetch(const T* input, const T* residual, int k) {
    Raw raw;
    raw.input = load_vector(input, k);
    if constexpr (FUSED) raw.residual = load_vector(residual, k);
    return raw;
}

// The vector to be normalised; the sum with the residual is rounded and stored here.
CUPY_LORA_DEVICE Vector settle(const Raw& raw, T* residual, int k) {
    if constexpr (!FUSED) return raw.input;
    float a[PER_VEC], b[PER_VEC];
    unpack(raw.input, a, T{});
    unpack(raw.residual, b, T{});
#pragma unroll
    for (int i = 0; i < PER_VEC; ++i) a[i] += b[i];
    const Vector sum = pack(a, T{});
    store_vector(residual, k, sum);
    return sum;
}

// Calls use(k, vector k) for k of [BEGIN, END), loaded by load(k) in batches of 4.
template <int BEGIN, int END, class Load, class Use>
CUPY_LORA_DEVICE void in_batches(const Load& load, const Use& use) {
#pragma unroll 1
    for (int first = BEGIN; first < END; first += 4) {
        decltype(load(0)) held[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (first + i < END) held[i] = load(first + i);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (first + i < END) use(first + i, held[i]);
        }
    }
}

CUPY_LORA_DEVICE float sum_of_squares(const Vector& v) {
    float f[PER_VEC], sum = 0.f;
    unpack(v, f, T{});
#pragma unroll
    for (int i = 0; i < PER_VEC; ++i) sum = fmaf(f[i], f[i], sum);
    return sum;
}

CUPY_LORA_DEVICE void give(T* out, int k, const Vector& v, const Weights& weights, float scale) {
    float f[PER_VEC], w[PER_VEC];
    unpack(v, f, T{});
#pragma unroll
    for (int q = 0; q < Weights::QUADS; ++q) unpack(weights.v[q], w + q * (PER_VEC / Weights::QUADS), W{});
#pragma unroll
    for (int i = 0; i < PER_VEC; ++i) f[i] = f[i] * scale * w[i];
    store_vector(out, k, pack(f, T{}));
}

// The sum over the threads of a row, the same bits in each; `set` alternates from call to call.
CUPY_LORA_DEVICE float row_sum(float v, float* sums, int set) {
#pragma unroll
    for (int offset = (THREADS < 32 ? THREADS : 32) / 2; offset > 0; offset /= 2) {
        v += __shfl_xor_sync(0xffffffffu, v, offset);
    }
    if constexpr (WARPS > 1) {
        float* const mine = sums + 32 * set;
        if (threadIdx.x % 32 == 0) mine[threadIdx.x / 32] = v;
        __syncthreads();
        float part[WARPS];
#pragma unroll
        for (int i = 0; i < WARPS; ++i) part[i] = mine[i];
#pragma unroll
        for (int span = 1; span < WARPS; span *= 2) {
#pragma unroll
            for (int i = 0; i + span < WARPS; i += 2 * span) part[i] += part[i + span];
        }
        v = part[0];
    }
    return v;
}

CUPY_LORA_DEVICE i64 row_offset(i64 row, i64 inner, const Strides& strides) {
    if constexpr (LEVELS == 1) {
        return row * strides.outer;
    } else {
        const i64 outer = row / inner;
        return outer * strides.outer + (row - outer * inner) * strides.inner;
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK, MIN_BLOCKS)
    rms_norm(const T* input, T* residual, const W* __restrict__ weight, T* out, i64 rows, i64 inner,
             Strides input_strides, Strides residual_strides, Strides out_strides, float epsilon) {
    ptx::begin_launch();
    CUPY_LORA_SHARED(shared);
    float* const sums = reinterpret_cast<float*>(shared);
    uint4* const kept = reinterpret_cast<uint4*>(shared + 256);

    const int me = first_vector();
    const i64 step = static_cast<i64>(gridDim.x) * ROWS;
    i64 first = static_cast<i64>(blockIdx.x) * ROWS;  // of this block's rows: the same in all its threads
    weight += me * PER_VEC;

    Weights weights[KEEP_WEIGHT ? REG_VECS : 1];
    Raw raw[REG_VECS];  // of the row at hand, then of the next one

    // Rows past the end go through the same shuffles with zeros; their addresses are row 0's.
    auto valid_row = [&](i64 block_row) { return ROWS == 1 || block_row + row_of_block() < rows; };
    auto offset_of = [&](const Strides& strides, i64 block_row) {
        const i64 row = valid_row(block_row) ? block_row + row_of_block() : 0;
        return row_offset(row, inner, strides) + me * PER_VEC;
    };
    auto residual_of = [&](i64 block_row) {
        return FUSED ? residual + offset_of(residual_strides, block_row) : nullptr;
    };
    auto load_row = [&](i64 block_row) {
        const T* const in = input + offset_of(input_strides, block_row);
        const T* const res = residual_of(block_row);
        if (!valid_row(block_row)) return;
#pragma unroll
        for (int k = 0; k < REG_VECS; ++k) raw[k] = fetch(in, res, k);
    };

    load_row(first);
    if constexpr (KEEP_WEIGHT) {
#pragma unroll
        for (int k = 0; k < REG_VECS; ++k) weights[k] = load_weights(weight, k);
    }

    for (int set = 0;; set ^= 1) {
        const bool more = WALK && first + step < rows;
        const bool valid = valid_row(first);
        const T* const in = input + offset_of(input_strides, first);
        T* const res = residual_of(first);

        Vector x[REG_VECS];
#pragma unroll
        for (int k = 0; k < REG_VECS; ++k) {
            if (valid) {
                x[k] = settle(raw[k], res, k);
            } else {
                x[k].quad = make_uint4(0, 0, 0, 0);
            }
        }
        if constexpr (PREFETCH) {
            if (more) load_row(first + step);
        }

        float sum = 0.f;
#pragma unroll
        for (int k = 0; k < REG_VECS; ++k) sum += sum_of_squares(x[k]);
        const auto load = [&](int k) { return fetch(in, res, k); };
        in_batches<REG_VECS, IN_SHARED>(load, [&](int k, const Raw& one) {
            const Vector v = settle(one, res, k);
            kept[me + (k - REG_VECS) * THREADS] = v.quad;
            sum += sum_of_squares(v);
        });
        in_batches<IN_SHARED, ALL_VECS>(load,
                                        [&](int k, const Raw& one) { sum += sum_of_squares(settle(one, res, k)); });

        const float scale = rsqrtf(row_sum(sum, sums, set) * (1.f / COLUMNS) + epsilon);

        if (valid) {
            T* const to = out + offset_of(out_strides, first);
#pragma unroll
            for (int k = 0; k < REG_VECS; ++k) {
                give(to, k, x[k], KEEP_WEIGHT ? weights[KEEP_WEIGHT ? k : 0] : load_weights(weight, k), scale);
            }
#pragma unroll 4
            for (int k = REG_VECS; k < IN_SHARED; ++k) {
                Vector v;
                v.quad = kept[me + (k - REG_VECS) * THREADS];
                give(to, k, v, load_weights(weight, k), scale);
            }
            // The residual form stored the sum, so it is read back from there.
            in_batches<IN_SHARED, ALL_VECS>(
                [&](int k) { return load_vector(FUSED ? res : in, k); },
                [&](int k, const Vector& v) { give(to, k, v, load_weights(weight, k), scale); });
        }

        if (!more) return;
        first += step;
        if constexpr (!PREFETCH) load_row(first);
    }
}
