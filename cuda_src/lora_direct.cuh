// The direct form: a tile of up to 8 rows of one adapter, everything by 16-byte loads into registers.
//
// A cluster of kCluster blocks of kWarps warps works on one (tile, slice):
//   shrink    the 64 leaves of K are dealt to blocks, then warps; a warp multiplies 16 ranks (the
//             16-row operand) by 8 tokens (the 8-wide one) and leaves its part of v in shared memory
//   exchange  each block sums its warps' parts and sends the result to every block of the cluster
//   expand    the columns of y are dealt to blocks and warps in units of 16 * kPairs: a lane holds
//             2 * kPairs neighbouring columns of tokens 2t and 2t + 1
// x, A, B and y are all requested before the first product: B does not wait for v. x and A go to registers,
// B and y, where the rank and the alignment allow it, to shared memory: in registers they would cost the block
// its occupancy, and the assembler moves such loads behind the products (10.0 instead of 7 us at 64 adapters).
//
// Shared memory (bytes): 128 for two mbarriers | received: float [2][kCluster][8][kChunk] (clusters) |
// parts: float [kWarps][8][kChunk + 4] | whole: float [8][kChunk] | v: float [8][kMaxRank + 4] (ranks that are
// not staged) or slots: [kWarps][STAGES] of kStageBytes (ranks that are). `direct_shared_bytes` in
// cupy_lora/_lora_plan.py is the same sum.
//
// Preconditions: kCluster * kWarps <= 64, both powers of two.
#pragma once

#include "lora_exchange.cuh"

// The first columns of x that a warp multiplies, requested before the adapter's record has arrived.
struct FirstX {
    static constexpr int kAll = kLeaves / (kCluster * kWarps) * Leaf<kIn>::kSteps;
    // None where a warp has many: they would not be the first to arrive, and cost registers.
    static constexpr int kSteps = !kXVectors || kTileRows > 8 || kAll > 8 ? 0 : kAll < 4 ? kAll : 4;
    uint4 step[kSteps > 0 ? kSteps : 1];

    CUPY_LORA_DEVICE void request(const In* x_row) {
        if constexpr (kSteps > 0) {
            const int warp = threadIdx.x / 32, t = threadIdx.x % 4;
            const int column = static_cast<int>((blockIdx.x % kCluster) * kWarps + warp) * kAll * 32 + 8 * t;
#pragma unroll
            for (int i = 0; i < kSteps; ++i) {
                const int at = column + 32 * i;
                step[i] = load_columns<true>(x_row + at, Leaf<kIn>::kExact ? 8 : kIn - at);
            }
        }
    }
};

// This warp's leaves of x times kBlocks * 16 rows of A, into `parts`. `ranks`: rows of A that exist.
// Leaves are taken in batches whose loads are in flight together, kBudget registers of them; what does not
// fit in one batch is a run-time loop, which keeps the compiler from holding more.
// `then` is called once the first batch is requested: what is needed later is requested behind it. The sums start
// from a zero that is read from shared memory after that, because the assembler would otherwise put the first
// products, and their wait for x and A, ahead of copies that nothing seems to need.
template <int kBlocks, int kBudget, class Then>
CUPY_LORA_DEVICE void shrink_leaves(const Exchange& ex, const Half* x_row, const Half* a, int ranks, const Then& then,
                                    const FirstX* first_x = nullptr) {
    constexpr int kWidth = 16 * kBlocks;
    constexpr int kMine = kLeaves / (kCluster * kWarps);  // leaves per warp
    constexpr int kSteps = Leaf<kIn>::kSteps;
    // Steps in flight together; fewer beside the many pending sums of a wide rank in few warps.
    constexpr int kFull = kBudget / (4 + 8 * kBlocks);
    constexpr int kFit = !kXVectors || !kAVectors || (kBlocks > 2 && kMine > 4) ? 1 : kFull;
    constexpr int kBatch = floor_power(kFit / kSteps < kMine ? kFit / kSteps : kMine);  // leaves; 0: part of one
    constexpr int kLeavesAt = kBatch > 0 ? kBatch : 1,
                  kStepsAt = kBatch > 0 ? kSteps : ceil_div(kSteps, ceil_div(kSteps, kFit > 0 ? kFit : 1));
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int first_column = ((blockIdx.x % kCluster) * kWarps + warp) * kMine * Leaf<kIn>::kColumns + 8 * t;
    const Half* x_at = x_row + first_column;
    const Half* a_at = a + static_cast<i64>(g) * kARow + static_cast<i64>(first_column) * kAColumn;
    int left = kIn - first_column;  // columns from here on
    const auto load = [&](int step, uint4& x, uint4(&rows)[kBlocks][2], bool has_x) {
        const int column = 32 * step, valid = Leaf<kIn>::kExact ? 8 : left - column;
        if (!has_x) x = load_columns<kXVectors>(x_at + column, valid);
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
    const auto advance = [&](int steps) { x_at += 32 * steps, a_at += 32 * steps * kAColumn, left -= 32 * steps; };

    volatile float* const zero_at = ex.parts + warp * 8 * (kWidth + 4) + lane;  // this warp's own: others may be ahead
    *zero_at = 0.f;
    float zero = 0.f;
    Tree<kMine / kLeavesAt, kBlocks> tree;
#pragma unroll 1
    for (int batch = 0; batch < kMine / kLeavesAt; ++batch) {
        Tree<kLeavesAt, kBlocks> inner;
        float sum[kBlocks][1][4];
        if constexpr (kBatch > 0) {
            uint4 xs[kLeavesAt * kSteps][1], as[kLeavesAt * kSteps][kBlocks][2];
#pragma unroll
            for (int i = 0; i < kLeavesAt * kSteps; ++i) {
                const bool has_x = first_x && i < FirstX::kSteps && batch == 0;
                if (has_x) xs[i][0] = first_x->step[i];
                load(i, xs[i][0], as[i], has_x);
            }
            if (batch == 0) {
                then();
                zero = *zero_at;
            }
#pragma unroll
            for (int i = 0; i < kLeavesAt * kSteps; ++i) {
                if (i % kSteps == 0) inner.each([&](int b, int m, int e) { sum[b][m][e] = zero; });
#pragma unroll
                for (int b = 0; b < kBlocks; ++b) shrink_step<Half>(sum[b], as[i][b][0], as[i][b][1], xs[i]);
                if (i % kSteps == kSteps - 1) inner.push(i / kSteps, sum);
            }
            advance(kLeavesAt * kSteps);
        } else {
            inner.each([&](int b, int m, int e) { sum[b][m][e] = 0.f; });
#pragma unroll 1
            for (int start = 0; start < kSteps; start += kStepsAt) {
                uint4 xs[kStepsAt][1], as[kStepsAt][kBlocks][2];
#pragma unroll
                for (int i = 0; i < kStepsAt; ++i) {
                    if (start + i < kSteps) load(i, xs[i][0], as[i], false);
                }
                if (batch == 0 && start == 0) then();
#pragma unroll
                for (int i = 0; i < kStepsAt; ++i) {
                    if (start + i < kSteps) {
#pragma unroll
                        for (int b = 0; b < kBlocks; ++b) shrink_step<Half>(sum[b], as[i][b][0], as[i][b][1], xs[i]);
                    }
                }
                advance(start + kStepsAt < kSteps ? kStepsAt : kSteps - start);
            }
            inner.push(0, sum);
        }
        inner.each([&](int b, int m, int e) { sum[b][m][e] = inner.total(b, m, e); });
        tree.push_at(batch, sum);
    }
    __syncwarp();  // another lane's zero lies where this one writes
    float* const part = ex.parts + warp * 8 * (kWidth + 4);
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
        for (int e = 0; e < 4; ++e)
            part[(2 * t + e % 2) * (kWidth + 4) + 16 * b + g + 8 * (e / 2)] = tree.total(b, 0, e);
    }
}

// v of every rank into `ex.v`, chunk by chunk: for ranks above 64 and ranks not known at compile time.
template <int kWidth, int kBudget>
CUPY_LORA_DEVICE void shrink_chunks(Exchange& ex, const Half* x_row, const Half* a, int rank, int rows) {
#pragma unroll 1
    for (int first = 0; first < rank; first += kWidth) {
        shrink_leaves<kWidth / 16, kBudget>(ex, x_row, a + static_cast<i64>(first) * kARow, rank - first, [] {});
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
template <int kRun, int kVector, int kMaxRows = 4>
struct Expand {
    static constexpr int kPerWarp = kWidest / (kCluster * kWarps);
    static constexpr int kFullRows = kPerWarp >= 64 ? 4 : kPerWarp >= 32 ? 2 : 1;
    static constexpr int kRows = kFullRows < kMaxRows ? kFullRows : kMaxRows;  // pairs of columns per lane
    static constexpr int kUnit = 16 * kRows;
    static constexpr int kUnits = ceil_div(kWidest, kUnit);
    static constexpr int kDeal = kCluster * kWarps;  // unit u goes to warp u % kDeal of the cluster
    static constexpr int kMine = ceil_div(kUnits, kDeal);
    static constexpr bool kWhole = kOneWidth && kWidest % (kUnit * kDeal) == 0;
    using Y = Columns<Out, 2 * kRows, kYVectors>;

    int column;  // this lane's first column in unit 0 of this warp
    int width;   // of the slice
    bool writes[2];
    Out* y[2];  // rows of tokens 2t and 2t + 1, at `column`
    const Half* b;

    CUPY_LORA_DEVICE int valid(int unit) const { return kWhole ? 2 * kRows : width - column - unit * kDeal * kUnit; }

    CUPY_LORA_DEVICE void load_y(Y (&into)[2], int unit) const {
        if constexpr (kAddToY) {
#pragma unroll
            for (int h = 0; h < 2; ++h) into[h].load(y[h] + unit * kDeal * kUnit, valid(unit));
        }
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
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            Y out;
#pragma unroll
            for (int i = 0; i < kRows; ++i) out.set(i, sum[i][h], sum[i][h + 2]);
            if (writes[h]) out.store(y[h] + unit * kDeal * kUnit, valid(unit));
        }
    }
};

template <class E>
CUPY_LORA_DEVICE E expand_start(const Tile& tile, Out* y, u64 y_stride, const Half* b, int rank, int width) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    E e;
    e.column = (static_cast<int>(blockIdx.x % kCluster) * kWarps + warp) * E::kUnit + g * 2 * E::kRows;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        e.y[h] = y + tile.row(2 * t + h) * y_stride + e.column;
        e.writes[h] = tile.writes(2 * t + h);
    }
    e.width = width_of(width);
    e.b = b + e.column * b_row(rank);
    return e;
}

// Ranks and arrays that the staged expand takes; the others loop over global memory (expand_any).
template <int kRank>
constexpr bool kStaged =
    slot_rank(kRank) && kXVectors && kAVectors && kBVectors && kYVectors && !kTransposed && sizeof(Out) == 2;

// This warp's columns of a slice, B and y staged by the warp for itself in kAhead slots of shared memory:
// `request` asks for the first of them, which does not take v; `finish` multiplies.
template <int kRank>
struct ExpandStaged {
    // Narrow units where a wide rank meets the sums of a whole tile, or other bodies in the kernel: registers.
    static constexpr bool kNarrow = kRank >= 32 && (kCluster == 1 || kRankCount > 1);
    static constexpr int kDeal = kCluster * kWarps, kPairs = kWidest / kDeal >= 64 && !kNarrow ? 4 : 2,
                         kUnit = 16 * kPairs;
    static constexpr int kUnits = ceil_div(kWidest, kUnit), kMine = ceil_div(kUnits, kDeal);  // unit u: warp u % kDeal
    static constexpr bool kWhole = kOneWidth && kWidest % (kUnit * kDeal) == 0;
    static constexpr int kAhead = kMine < STAGES ? kMine : STAGES;
    using S = Slot<kRank, kPairs, kUnit, 8>;
    static_assert(S::kBytes <= kStageBytes, "the slots are laid out for the widest rank");

    unsigned char* slots;
    const Half* b_from;
    const Out* y_from[S::kYChunks / 4];
    Out* y_to[2];
    int width;  // of the slice
    int first;  // its column where this warp's unit 0 starts
    int rows;
    bool writes[2];  // tokens 2t and 2t + 1

    CUPY_LORA_DEVICE void request_unit(int unit) {
        const int lane = threadIdx.x % 32, column = first + unit * kDeal * kUnit;
        unsigned char* const slot = slots + unit % kAhead * kStageBytes;
        if (unit < kMine) {
            constexpr int kBChunks = kUnit * kRank / 8;
#pragma unroll
            for (int j = 0; j < kBChunks / 32; ++j) {
                const int item = lane + 32 * j, row = item / (kRank / 8);
                if (kWhole || column + row < width) {
                    ptx::copy_async_16(slot + S::b_byte(row, item % (kRank / 8)),
                                       b_from + unit * kDeal * kUnit * kRank + 256 * j);
                }
            }
#pragma unroll
            for (int j = 0; j < S::kYChunks / 4; ++j) {
                const int row = (lane + 32 * j) / S::kYChunks, chunk = lane % S::kYChunks;
                if (kAddToY && row < rows && (kWhole || column + chunk * 8 < width)) {
                    ptx::copy_async_16(slot + S::y_byte(row, chunk), y_from[j] + unit * kDeal * kUnit);
                }
            }
        }
        ptx::copy_async_commit();
    }

    CUPY_LORA_DEVICE void request(unsigned char* stages, const Tile& tile, Out* y, u64 y_stride, const Half* b,
                                  int columns) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
        slots = stages + warp * STAGES * kStageBytes;
        rows = tile.rows;
        width = width_of(columns);
        first = (static_cast<int>(blockIdx.x % kCluster) * kWarps + warp) * kUnit;
        b_from = b + static_cast<i64>(first) * kRank + lane * 8;
#pragma unroll
        for (int j = 0; j < S::kYChunks / 4; ++j) {
            y_from[j] = y + tile.row((lane + 32 * j) / S::kYChunks) * y_stride + first + lane % S::kYChunks * 8;
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            y_to[h] = y + tile.row(2 * t + h) * y_stride + first + g * 2 * kPairs;
            writes[h] = tile.writes(2 * t + h);
        }
#pragma unroll
        for (int unit = 0; unit < kAhead; ++unit) request_unit(unit);
    }

    template <class VQuad>
    CUPY_LORA_DEVICE void finish(const VQuad& v_quad) {
        const int g = threadIdx.x % 32 / 4;
        typename S::V v;
        S::split(v, v_quad);
        const typename S::Place place = S::place(g * 2 * kPairs, 0);
#pragma unroll 1
        for (int unit = 0; unit < kMine; ++unit) {
            if (!kWhole && first + unit * kDeal * kUnit >= width) break;
            ptx::copy_async_wait<kAhead - 1>();
            __syncwarp();
            typename S::Y y[2];
            S::multiply(y, slots + unit % kAhead * kStageBytes, place, v);
            const int shift = unit * kDeal * kUnit;
            const bool inside = kWhole || first + g * 2 * kPairs + shift < width;
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                if (writes[h] && inside) y[h].store(y_to[h] + shift, 8);
            }
            __syncwarp();  // the slot's next unit overwrites it
            request_unit(unit + kAhead);
        }
    }
};

// Every unit of this warp, for a rank known at run time only. The run is too: its missing ranks are zeros,
// which leaves the sums as they are with a run known at compile time. kVector 8 takes runs of 8 only.
template <int kVector, class V>
CUPY_LORA_DEVICE void expand_any_run(const Tile& tile, Out* y, u64 y_stride, const Half* b, int rank, int width,
                                     const V& v_of) {
    using E = Expand<8, kVector, 2>;
    const auto e = expand_start<E>(tile, y, y_stride, b, rank, width);
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
                for (int i = 0; i < 4; ++i)
                    part[i] = 4 * s + i < run && first + 4 * s + i < rank ? v_of(first + 4 * s + i) : 0.f;
                v[s].set(make_float4(part[0], part[1], part[2], part[3]));
            }
            expand_group<8>(sum, b_in, v);
        }
        e.store(sum, unit);
    }
}

template <int kRank, class V>
CUPY_LORA_DEVICE void expand_any(const Tile& tile, Out* y, u64 y_stride, const Half* b, int rank, int width,
                                 const V& v_of) {
    if (kBVectors && !kTransposed && rank % 8 == 0 && rank > 16) {
        expand_any_run<8>(tile, y, y_stride, b, rank, width, v_of);
    } else if constexpr (kRank == 0 || kRank % 8 != 0 || kRank <= 16 || !kBVectors || kTransposed) {
        expand_any_run<1>(tile, y, y_stride, b, rank, width, v_of);
    }
}
