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
// Shared memory (bytes): 128 for mbarriers | received: float [2][kHalf] of lora_exchange.cuh (clusters) |
// parts: float [kWarps][8][kChunk + 4] | whole: float [8][kChunk] (twice for staged ranks above 64) | v: float
// [8][kMaxRank + 4] (ranks that are not staged) or slots: [kWarps][STAGES] of kStageBytes (ranks that are).
// `direct_shared_bytes` in cupy_lora/_lora_plan.py is the same sum.
//
// Preconditions: kCluster * kWarps <= 64, both powers of two.
#pragma once

#include "lora_expand.cuh"

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
                step[i] = load_columns<true, Leaf<kIn>::kExact>(x_row + at, Leaf<kIn>::kExact ? 8 : kIn - at);
            }
        }
    }
};

// This warp's leaves of x times kBlocks * 16 rows of A, into `parts`. `ranks`: rows of A that exist.
// Leaves are taken in batches whose loads are in flight together, kBudget registers of them; what does not
// fit in one batch is a run-time loop, which keeps the compiler from holding more.
// `then` is called once the first batch is requested: what is needed later is requested behind it (kRequests). The sums
// start from a zero that is read from shared memory after that, because the assembler would otherwise put the first
// products, and their wait for x and A, ahead of copies that nothing seems to need.
template <int kBlocks, int kBudget, bool kRequests = false, class Then>
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
    // Not where predicates or further batches take the registers that the loads in flight would hold.
    constexpr bool kStays = kRequests && Leaf<kIn>::kExact && kBatch == kMine;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int first_column = ((blockIdx.x % kCluster) * kWarps + warp) * kMine * Leaf<kIn>::kColumns + 8 * t;
    const Half* x_at = x_row + first_column;
    const Half* a_at = a + static_cast<i64>(g) * kARow + static_cast<i64>(first_column) * kAColumn;
    int left = kIn - first_column;  // columns from here on
    const auto load = [&](int step, uint4& x, uint4(&rows)[kBlocks][2], bool has_x) {
        const int column = 32 * step, valid = Leaf<kIn>::kExact ? 8 : left - column;
        if (!has_x) x = load_columns<kXVectors, kStays>(x_at + column, valid);
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int rank = 16 * b + 8 * h;  // plus g
                rows[b][h] = load_columns<kAVectors, kStays>(a_at + rank * kARow + column * kAColumn,
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
                if constexpr (kStays) __syncwarp();  // which they stay ahead of
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
        open_exchange<kWidth>(ex, rows);
        exchange_parts<kWidth>(ex, rows);
#pragma unroll 1
        for (int quad = threadIdx.x; quad < rows * (kWidth / 4); quad += kThreads) {
            const int token = quad / (kWidth / 4), at = quad % (kWidth / 4) * 4;
            *reinterpret_cast<float4*>(ex.v + token * (kMaxRank + 4) + first + at) = exchanged<kWidth>(ex, token, at);
        }
        __syncthreads();
    }
}
