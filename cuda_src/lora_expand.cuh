// The expand of the direct form: the columns of one slice of y, dealt to blocks and warps in units of 16 * kPairs;
// a lane holds 2 * kPairs neighbouring columns of tokens 2t and 2t + 1.
//   ExpandStaged   B and y staged by each warp for itself in STAGES slots of shared memory, ahead of v
//   expand_any     any rank, width and alignment: loops over global memory, after v is there
#pragma once

#include "lora_exchange.cuh"

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
// `request` asks for the first of them, which does not take v; `take_early` moves the first units of few on to
// registers, while v is on its way, and asks for the units that have their slots next; `take` makes v's operand;
// `finish` multiplies.
template <int kRank>
struct ExpandStaged {
    // Narrow units where a wide rank meets the sums of a whole tile, or other bodies in the kernel: registers.
    static constexpr bool kNarrow = kRank > 64 || (kRank > 16 && (kCluster == 1 || kRankCount > 1));
    static constexpr int kDeal = kCluster * kWarps, kPairs = kWidest / kDeal >= 64 && !kNarrow ? 4 : 2,
                         kUnit = 16 * kPairs;
    static constexpr int kUnits = ceil_div(kWidest, kUnit), kMine = ceil_div(kUnits, kDeal);  // unit u: warp u % kDeal
    static constexpr bool kWhole = kOneWidth && kWidest % (kUnit * kDeal) == 0;
    using S = Slot<kRank, kPairs, kUnit, 8>;
    // Beside other ranks, as many of its own units as fit where those of the widest do.
    static constexpr int kSlotBytes = kRankCount > 1 ? S::kBytes : kStageBytes;
    static constexpr int kFit = STAGES * kStageBytes / kSlotBytes, kAhead = kMine < kFit ? kMine : kFit;
    static constexpr int kInRun = S::kRun > 4 ? 2 : 1, kOperands = S::kGroups * kInRun;  // of four ranks a lane
    // Units that go to registers while v is on its way: where it is waited for, and leaves room for them.
    static constexpr int kFew = kMine > 4 ? 0 : kMine == 2 && kAhead == 2 && kWhole ? 2 : 1;
    static constexpr bool kRoom = kRank == 64 && kMine == 1 && sizeof(ColumnsOfB<Half>) == 16;
    static constexpr int kEarly = kCluster == 1 ? 0 : kRank <= 16 ? kFew : kRoom ? 1 : 0;
    static constexpr int kTaken = kEarly > 0 ? kEarly : 1;
    static_assert(S::kBytes <= kStageBytes, "the slots are laid out for the widest rank");

    unsigned char* slots;
    const Half* b_from;
    const Out* y_from[S::kYChunks / 4];
    Out* y_to[2];
    int width;  // of the slice
    int first;  // its column where this warp's unit 0 starts
    int rows;
    bool writes[2];  // tokens 2t and 2t + 1
    typename S::Place place;
    typename S::V v;
    typename S::Sum early_sum[kTaken];
    ColumnsOfB<Half> early_b[kTaken][kOperands][kPairs];

    CUPY_LORA_DEVICE void request_unit(int unit) {
        const int lane = threadIdx.x % 32, column = first + unit * kDeal * kUnit;
        unsigned char* const slot = slots + unit % kAhead * kSlotBytes;
        if (unit < kMine) {
            constexpr int kBChunks = kUnit * kRank / 8;
#pragma unroll
            for (int j = 0; j < ceil_div(kBChunks, 32); ++j) {
                const int item = lane + 32 * j;
                if ((kBChunks % 32 == 0 || item < kBChunks) && (kWhole || b_left(item, width - column, kRank) > 0)) {
                    ptx::copy_async_16(slot + S::b_byte(item), b_from + unit * kDeal * kUnit * kRank + 256 * j);
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

    // Waits for this warp's copies of `unit`.
    CUPY_LORA_DEVICE const unsigned char* arrived(int unit) const {
        ptx::copy_async_wait<kAhead - 1>();
        __syncwarp();
        return slots + unit % kAhead * kSlotBytes;
    }

    // The slot of `unit` has been read by this thread: its next unit overwrites it.
    CUPY_LORA_DEVICE void pass_on(int unit) {
        __syncwarp();
        request_unit(unit + kAhead);
    }

    static CUPY_LORA_DEVICE typename S::Place my_place() { return S::place(threadIdx.x % 32 / 4 * 2 * kPairs, 0); }

    CUPY_LORA_DEVICE void take_early() {
        if constexpr (kEarly > 0) {
            place = my_place();
#pragma unroll
            for (int unit = 0; unit < kEarly; ++unit) {
                const unsigned char* const slot = arrived(unit);
                typename S::Y y[2];
                S::read_y(y, slot, place);
                S::start(early_sum[unit], y);
#pragma unroll
                for (int at = 0; at < kOperands; at += kInRun) {
                    typename S::B b;
                    S::read_b(b, slot, place, at / kInRun);
#pragma unroll
                    for (int s = 0; s < kInRun; ++s) {
#pragma unroll
                        for (int i = 0; i < kPairs; ++i)
                            early_b[unit][at + s][i] = columns_of_b<S::kRun, Half>(b[i], s);
                    }
                }
                pass_on(unit);
            }
        }
    }

    // This lane's v of the ranks from kFrom on that one exchange takes, from v_quad(rank).
    template <int kFrom, class VQuad>
    CUPY_LORA_DEVICE void take(const VQuad& v_quad) {
        constexpr int kEach = 4 * S::kRun, kLeft = S::kGroups - kFrom / kEach;
        S::template split<kFrom / kEach, kFrom / kEach + (kLeft * kEach > 64 ? 64 / kEach : kLeft)>(v, v_quad);
    }

    CUPY_LORA_DEVICE void finish() {
        if constexpr (kEarly == 0) place = my_place();
#pragma unroll
        for (int unit = 0; unit < kEarly; ++unit) {
#pragma unroll
            for (int at = 0; at < kOperands; ++at) {
#pragma unroll
                for (int i = 0; i < kPairs; ++i) {
                    expand_step(early_sum[unit][i], early_b[unit][at][i], v[at / kInRun][at % kInRun]);
                }
            }
            typename S::Y y[2];
            S::round(y, early_sum[unit]);
            store(y, unit);
        }
#pragma unroll(kMine <= 4 && (kRank <= 16 || (kOneWidth && kRankCount == 1)) ? kMine : 1)  // by registers
        for (int unit = kEarly; unit < kMine; ++unit) {
            if (!kWhole && first + unit * kDeal * kUnit >= width) break;
            const unsigned char* const slot = arrived(unit);
            typename S::Y y[2];
            S::multiply(y, slot, place, v);
            store(y, unit);
            pass_on(unit);
        }
    }

    CUPY_LORA_DEVICE void store(const typename S::Y (&y)[2], int unit) const {
        const int g = threadIdx.x % 32 / 4, shift = unit * kDeal * kUnit;
        const bool inside = kWhole || first + g * 2 * kPairs + shift < width;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            if (writes[h] && inside) y[h].store(y_to[h] + shift, 8);
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
