// The direct form: a tile of up to 8 rows of one adapter, everything by 16-byte loads into registers.
//
// A cluster of kCluster blocks of kWarps warps works on one (tile, slice):
//   shrink    the 64 leaves of K are dealt to blocks, then warps; a warp multiplies 16 ranks (the
//             16-row operand) by 8 tokens (the 8-wide one) and leaves its part of v in shared memory
//   exchange  each block sums its warps' parts and sends the result to every block of the cluster
//   expand    the columns of y are dealt to blocks and warps in units of 16 * kRows: a lane holds
//             2 * kRows neighbouring columns of tokens 2t and 2t + 1
// x, A, B and y are all requested before the first product: B does not wait for v.
//
// Shared memory (bytes): 128 for two mbarriers | received: float [2][kCluster][8][kChunk] (clusters) |
// parts: float [kWarps][8][kChunk + 4] | v: float [8][kMaxRank + 4] (ranks above 64 or not known at
// compile time). `direct_shared_bytes` in cupy_lora/_lora_plan.py is the same sum.
//
// Preconditions: kCluster * kWarps <= 64, both powers of two.
#pragma once

#include "lora_config.cuh"
#include "lora_math.cuh"

constexpr int kThreads = 32 * kWarps;

// What the two phases exchange, and where in shared memory.
struct Exchange {
    u64* barriers;    // [2], one for each half of `received`
    float* parts;     // [kWarps][8][kChunk + 4]
    float* received;  // [2][kCluster][8][kChunk]
    float* v;         // [8][kMaxRank + 4]
    u32 uses;         // exchanges so far: half = uses % 2, parity of its barrier = uses / 2 % 2
    bool joined;      // the other blocks of the cluster are known to run
};

constexpr int kReceivedBytes = kCluster > 1 ? 2 * kCluster * 8 * kChunk * 4 : 0;
constexpr int kPartsBytes = kWarps * 8 * (kChunk + 4) * 4;

// `local`: parts and v, which no other block writes.
CUPY_LORA_DEVICE Exchange exchange_start(unsigned char* barriers, unsigned char* received, unsigned char* local) {
    Exchange ex;
    ex.barriers = reinterpret_cast<u64*>(barriers);
    ex.received = reinterpret_cast<float*>(received);
    ex.parts = reinterpret_cast<float*>(local);
    ex.v = reinterpret_cast<float*>(local + kPartsBytes);
    ex.uses = 0;
    ex.joined = kCluster == 1;
    if constexpr (kCluster > 1) {
        if (threadIdx.x == 0) {
            ptx::mbarrier_init(ex.barriers, 1);
            ptx::mbarrier_init(ex.barriers + 1, 1);
            ptx::mbarrier_init_fence();
        }
    }
    return ex;
}

CUPY_LORA_DEVICE Exchange exchange_start(unsigned char* shared) {
    return exchange_start(shared, shared + 128, shared + 128 + kReceivedBytes);
}

// After this block's parts are in shared memory and the block has synchronised: sends their sum to the
// cluster and waits for the others'. `kWidth` is the caller's chunk (at most kChunk).
template <int kWidth>
CUPY_LORA_DEVICE void exchange_parts(Exchange& ex, int rows) {
    if constexpr (kCluster > 1) {
        constexpr int kQuads = 8 * kWidth / 4;
        const u32 half = ex.uses & 1, parity = ex.uses >> 1 & 1;
        ++ex.uses;
        u64* const barrier = ex.barriers + half;
        if (threadIdx.x == 0) ptx::mbarrier_expect(barrier, static_cast<u32>(rows * kWidth * 4 * kCluster));
        if (!ex.joined) {
            ptx::cluster_wait();
            ex.joined = true;
        }
        const u32 block = blockIdx.x % kCluster;
        float* const mine = ex.received + (half * kCluster + block) * 8 * kWidth;
#pragma unroll
        for (int first = 0; first < kQuads * kCluster; first += kThreads) {
            const int item = first + static_cast<int>(threadIdx.x);
            const int quad = item % kQuads, peer = item / kQuads;
            const int token = quad / (kWidth / 4), rank = quad % (kWidth / 4) * 4;
            if (peer < kCluster && token < rows) {
                const float4 sum = tree_sum<kWarps>([&](int warp) {
                    return *reinterpret_cast<const float4*>(ex.parts + (warp * 8 + token) * (kWidth + 4) + rank);
                });
                const uint4 bits = make_uint4(__float_as_uint(sum.x), __float_as_uint(sum.y), __float_as_uint(sum.z),
                                              __float_as_uint(sum.w));
                ptx::store_async_16(ptx::map_shared(mine + token * kWidth + rank, peer), bits,
                                    ptx::map_shared(barrier, peer));
            }
        }
        ptx::mbarrier_wait(barrier, parity);
    } else {
        ++ex.uses;
    }
}

// Four ranks of a token of the v just exchanged (not scaled).
template <int kWidth>
CUPY_LORA_DEVICE float4 exchanged(const Exchange& ex, int token, int rank) {
    if constexpr (kCluster > 1) {
        const float* const half = ex.received + ((ex.uses - 1) & 1) * kCluster * 8 * kWidth;
        return tree_sum<kCluster>([&](int block) {
            return *reinterpret_cast<const float4*>(half + (block * 8 + token) * kWidth + rank);
        });
    } else {
        return tree_sum<kWarps>([&](int warp) {
            return *reinterpret_cast<const float4*>(ex.parts + (warp * 8 + token) * (kWidth + 4) + rank);
        });
    }
}

// This warp's leaves of x times kBlocks * 16 rows of A, into `parts`. `ranks`: rows of A that exist.
// kBudget: registers for loads in flight. Lean code, with run-time loops over leaves and steps, serves rows that
// are not aligned, and long rows on a path that must not cost the others their registers.
template <int kBlocks, int kBudget>
CUPY_LORA_DEVICE void shrink_leaves(const Exchange& ex, const Half* x_row, const Half* a, int ranks) {
    constexpr int kWidth = 16 * kBlocks;
    constexpr int kMine = kLeaves / (kCluster * kWarps);  // leaves per warp
    constexpr int kSteps = Leaf<kIn>::kSteps;
    constexpr bool kLean = !kXVectors || !kAVectors || (kBudget < 96 && kMine * kSteps > 8);
    constexpr int kFit = kBudget / (4 + 8 * kBlocks);  // steps in flight together
    constexpr int kBatch = kLean || kFit < 1 ? 1 : kMine * kSteps < kFit ? kMine * kSteps : kFit;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int first_column = ((blockIdx.x % kCluster) * kWarps + warp) * kMine * Leaf<kIn>::kColumns + 8 * t;
    const Half* const x_at = x_row + first_column;
    const Half* const a_at = a + static_cast<i64>(g) * kARow + static_cast<i64>(first_column) * kAColumn;
    const auto load = [&](int step, uint4& x, uint4 (&rows)[kBlocks][2]) {
        const int column = 32 * step, valid = Leaf<kIn>::kExact ? 8 : kIn - first_column - column;
        x = load_columns<kXVectors>(x_at + column, valid);
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int rank = 16 * b + 8 * h;  // plus g
                rows[b][h] = load_columns<kAVectors>(a_at + rank * kARow + column * kAColumn,
                                                     rank + g < ranks ? valid : 0, kAColumn);
            }
        }
    };

    Tree<kMine, kBlocks> tree;
    float sum[kBlocks][1][4];
    if constexpr (kLean) {
#pragma unroll 1
        for (int leaf = 0; leaf < kMine; ++leaf) {
            tree.each([&](int b, int m, int e) { sum[b][m][e] = 0.f; });
#pragma unroll 1
            for (int step = 0; step < kSteps; ++step) {
                uint4 x, rows[kBlocks][2];
                load(leaf * kSteps + step, x, rows);
#pragma unroll
                for (int b = 0; b < kBlocks; ++b) shrink_step<Half>(sum[b][0], rows[b][0], rows[b][1], x);
            }
            tree.push_at(leaf, sum);
        }
    } else {
#pragma unroll
        for (int start = 0; start < kMine * kSteps; start += kBatch) {
            uint4 xs[kBatch], as[kBatch][kBlocks][2];
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                if (start + i < kMine * kSteps) load(start + i, xs[i], as[i]);
            }
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                const int step = start + i;
                if (step < kMine * kSteps) {
                    if (step % kSteps == 0) tree.each([&](int b, int m, int e) { sum[b][m][e] = 0.f; });
#pragma unroll
                    for (int b = 0; b < kBlocks; ++b) shrink_step<Half>(sum[b][0], as[i][b][0], as[i][b][1], xs[i]);
                    if (step % kSteps == kSteps - 1) tree.push(step / kSteps, sum);
                }
            }
        }
    }
    float* const part = ex.parts + warp * 8 * (kWidth + 4);
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
        for (int e = 0; e < 4; ++e) part[(2 * t + e % 2) * (kWidth + 4) + 16 * b + g + 8 * (e / 2)] = tree.total(b, 0, e);
    }
}

// v of every rank into `ex.v`, chunk by chunk: for ranks above 64 and ranks not known at compile time.
template <int kWidth, int kBudget>
CUPY_LORA_DEVICE void shrink_chunks(Exchange& ex, const Half* x_row, const Half* a, int rank, int rows) {
#pragma unroll 1
    for (int first = 0; first < rank; first += kWidth) {
        shrink_leaves<kWidth / 16, kBudget>(ex, x_row, a + static_cast<i64>(first) * kARow, rank - first);
        __syncthreads();
        exchange_parts<kWidth>(ex, rows);
#pragma unroll 1
        for (int quad = threadIdx.x; quad < rows * (kWidth / 4); quad += kThreads) {
            const int token = quad / (kWidth / 4), at = quad % (kWidth / 4) * 4;
            *reinterpret_cast<float4*>(ex.v + token * (kMaxRank + 4) + first + at) = exchanged<kWidth>(ex, token, at);
        }
        __syncthreads();
    }
}

// ---- expand ------------------------------------------------------------------------------------
// The columns of one slice of y as this warp sees them, and the loads and products of one unit of them.
//   kRun: rank_run of the rank; kVector: elements per load of B; kMaxRows: cap on kRows, to save registers
template <int N, int kRun, int kVector, int kMaxRows = 4>
struct Expand {
    static constexpr int kPerWarp = N / (kCluster * kWarps);
    static constexpr int kFullRows = kPerWarp >= 64 ? 4 : kPerWarp >= 32 ? 2 : 1;
    static constexpr int kRows = kFullRows < kMaxRows ? kFullRows : kMaxRows;  // pairs of columns per lane
    static constexpr int kUnit = 16 * kRows;
    static constexpr int kUnits = ceil_div(N, kUnit);
    static constexpr int kDeal = kCluster * kWarps;  // unit u goes to warp u % kDeal of the cluster
    static constexpr int kMine = ceil_div(kUnits, kDeal);
    static constexpr bool kWhole = N % (kUnit * kDeal) == 0;
    using Y = Columns<Out, 2 * kRows, kYVectors>;

    int column;  // this lane's first column in unit 0 of this warp
    int rows;
    Out* y[2];  // rows of tokens 2t and 2t + 1, at `column`
    const Half* b;

    CUPY_LORA_DEVICE int valid(int unit) const { return kWhole ? 2 * kRows : N - column - unit * kDeal * kUnit; }

    CUPY_LORA_DEVICE void load_y(Y (&into)[2], int unit) const {
        if constexpr (!kAddToY) return;
        const int t = threadIdx.x % 4;
        into[0].load(y[0] + unit * kDeal * kUnit, valid(unit));
        if (2 * t + 1 < rows) into[1].load(y[1] + unit * kDeal * kUnit, valid(unit));
    }

    // This lane's rows of B in this unit, `ranks` ranks from `first` on.
    CUPY_LORA_DEVICE void load_b(u32 (&into)[kRows][2][kRun / 2], int unit, int first, int ranks, int rank) const {
        const int columns = valid(unit);
        const Half* const at = b + (unit * kDeal * kUnit) * b_row(rank) + first * kBColumn;
#pragma unroll
        for (int i = 0; i < 2 * kRows; ++i) {
            load_run<kRun, kVector>(into[i / 2][i % 2], at + i * b_row(rank), i < columns ? ranks : 0, kBColumn);
        }
    }

    static CUPY_LORA_DEVICE void start(float (&sum)[kRows][4], const Y (&from)[2]) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
#pragma unroll
            for (int e = 0; e < 4; ++e) sum[i][e] = 0.f;
            if constexpr (kAddToY) {
                from[0].get(i, sum[i][0], sum[i][2]);
                from[1].get(i, sum[i][1], sum[i][3]);
            }
        }
    }

    CUPY_LORA_DEVICE void store(const float (&sum)[kRows][4], int unit) const {
        const int t = threadIdx.x % 4;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            Y out;
#pragma unroll
            for (int i = 0; i < kRows; ++i) out.set(i, sum[i][h], sum[i][h + 2]);
            if (2 * t + h < rows) out.store(y[h] + unit * kDeal * kUnit, valid(unit));
        }
    }
};

template <class E>
CUPY_LORA_DEVICE E expand_start(const Tile& tile, Out* y, i64 y_stride, const Half* b, int rank) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    E e;
    e.column = (static_cast<int>(blockIdx.x % kCluster) * kWarps + warp) * E::kUnit + g * 2 * E::kRows;
    e.rows = tile.rows;
    e.y[0] = y + tile.row(2 * t) * y_stride + e.column;
    e.y[1] = y + tile.row(2 * t + 1) * y_stride + e.column;
    e.b = b + e.column * b_row(rank);
    return e;
}

// The lane's ranks of the split v: first + kRun * t on, from v_quad(rank) (four floats, rank a multiple of 4).
template <int kRun, class VQuad>
CUPY_LORA_DEVICE void split_v(SplitV<Half> (&v)[kRun > 4 ? 2 : 1], int first, const VQuad& v_quad) {
    const int t = threadIdx.x % 4;
    if constexpr (kRun == 2) {
        float4 quad = v_quad(first + 2 * t / 4 * 4);
        if (t % 2) quad.x = quad.z, quad.y = quad.w;
        quad.z = quad.w = 0.f;
        v[0].set(quad);
    } else if constexpr (kRun == 4) {
        v[0].set(v_quad(first + 4 * t));
    } else {
        v[0].set(v_quad(first + 8 * t));
        v[1].set(v_quad(first + 8 * t + 4));
    }
}

// Ranks whose weights are taken by straight-line code; the others loop over them (expand_any).
template <int kRank>
constexpr bool kStraight = kRank > 0 && kRank <= 64 && kXVectors && kAVectors && kBVectors && kYVectors && !kTransposed;

// Every unit of this warp, for a rank known at compile time: `request` asks for the first units of B and y,
// which does not take v; `finish` multiplies.
template <int kRank, int N>
struct ExpandStraight {
    static constexpr int kRun = rank_run(kRank), kGroups = ceil_div(kRank, 4 * kRun);
    using E = Expand<N, kRun, b_vector(kRank)>;
    // Units in flight: as many as fit in about 80 registers.
    static constexpr int kCost = E::kRows * (kGroups * kRun + 2);
    static constexpr int kAhead = E::kMine * kCost <= 80 ? E::kMine : (80 / kCost > 0 ? 80 / kCost : 1);
    E e;
    typename E::Y y_in[kAhead][2];
    u32 b_in[kAhead][kGroups][E::kRows][2][kRun / 2];

    CUPY_LORA_DEVICE void request_unit(int unit) {
        const int t = threadIdx.x % 4;
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
            const int first = 4 * kRun * group + kRun * t;
            e.load_b(b_in[unit % kAhead][group], unit, first, kRank - first, kRank);
        }
        e.load_y(y_in[unit % kAhead], unit);
    }

    CUPY_LORA_DEVICE void request(const Tile& tile, Out* y, i64 y_stride, const Half* b) {
        e = expand_start<E>(tile, y, y_stride, b, kRank);
#pragma unroll
        for (int unit = 0; unit < kAhead; ++unit) request_unit(unit);
    }

    template <class VQuad>
    CUPY_LORA_DEVICE void finish(const VQuad& v_quad) {
        SplitV<Half> v[kGroups][kRun > 4 ? 2 : 1];
#pragma unroll
        for (int group = 0; group < kGroups; ++group) split_v<kRun>(v[group], 4 * kRun * group, v_quad);
#pragma unroll
        for (int unit = 0; unit < E::kMine; ++unit) {
            float sum[E::kRows][4];
            E::start(sum, y_in[unit % kAhead]);
#pragma unroll
            for (int group = 0; group < kGroups; ++group) expand_group<kRun>(sum, b_in[unit % kAhead][group], v[group]);
            if (unit + kAhead < E::kMine) request_unit(unit + kAhead);
            e.store(sum, unit);
        }
    }
};

// Every unit of this warp, for a rank known at run time only. The run is too: its missing ranks are zeros,
// which leaves the sums as they are with a run known at compile time. kVector 8 takes runs of 8 only.
template <int N, int kVector, class V>
CUPY_LORA_DEVICE void expand_any_run(const Tile& tile, Out* y, i64 y_stride, const Half* b, int rank, const V& v_of) {
    using E = Expand<N, 8, kVector, 2>;
    const auto e = expand_start<E>(tile, y, y_stride, b, rank);
    const int run = kVector == 8 ? 8 : rank_run(rank), t = threadIdx.x % 4;
#pragma unroll 1
    for (int unit = 0; unit < E::kMine; ++unit) {
        if (__all_sync(0xffffffffu, e.valid(unit) <= 0)) break;
        typename E::Y y_in[2];
        float sum[E::kRows][4];
        e.load_y(y_in, unit);
        E::start(sum, y_in);
#pragma unroll 1
        for (int first = run * t; first < rank + run * t; first += 4 * run) {
            u32 b_in[E::kRows][2][4];
            e.load_b(b_in, unit, first, first + run <= rank ? run : rank - first, rank);
            SplitV<Half> v[2];
#pragma unroll
            for (int s = 0; s < 2; ++s) {
                float part[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) part[i] = 4 * s + i < run && first + 4 * s + i < rank ? v_of(first + 4 * s + i) : 0.f;
                v[s].set(make_float4(part[0], part[1], part[2], part[3]));
            }
            expand_group<8>(sum, b_in, v);
        }
        e.store(sum, unit);
    }
}

template <int N, int kRank, class V>
CUPY_LORA_DEVICE void expand_any(const Tile& tile, Out* y, i64 y_stride, const Half* b, int rank, const V& v_of) {
    if (kBVectors && !kTransposed && rank % 8 == 0 && rank > 16) {
        expand_any_run<N, 8>(tile, y, y_stride, b, rank, v_of);
    } else if constexpr (kRank == 0 || kRank % 8 != 0 || kRank <= 16 || !kBVectors || kTransposed) {
        expand_any_run<N, 1>(tile, y, y_stride, b, rank, v_of);
    }
}
