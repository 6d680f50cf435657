// The whole LoRA layer in one launch.
//
//   y[i, slice] += scale * scale[slot, slice] * (x[i] A[slot, slice]^T) B[slot, slice]^T
//   x (tokens, in), y (tokens, sum of the slices' widths), A (rank, in), B (width, rank)
//
// Grid: x = clusters of CLUSTER blocks that take tiles in turn (any number of them is right, as many as
// there are tiles is fastest), y = slices. Block: 32 * WARPS threads. A tile is up to TILE_ROWS tokens of
// one slot, listed by build_tiles (lora_batch.cu). The forms are described in lora_direct.cuh and
// lora_ring.cuh; both give the same bits (lora_math.cuh).
//
// Preconditions: CLUSTER > 1 needs sm_90. Slots that the table does not have and rows from `tokens` on are skipped.
#include "lora_direct.cuh"
#if TILE_ROWS > 8
#include "lora_ring.cuh"
#endif

// One tile of one slice by the direct form; kRank 0: the rank is known at run time only.
template <int kRank>
CUPY_LORA_DEVICE void direct_tile(Exchange& ex, const Layer& layer, const Tile& tile, const Record& w, Out* y,
                                  const In* x_row, const FirstX* first_x) {
    const int g = threadIdx.x % 32 / 4;
    const float scale = w.scale * layer.scale;
    if constexpr (kStaged<kRank>) {
        constexpr int kWidth = chunk_of(kRank);
        constexpr bool kOpens = Leaf<kIn>::kExact && kRank <= kWidth;  // while the loads are under way: by registers
        ExpandStaged<kRank> expand;
        shrink_leaves<kWidth / 16, kShrinkBudget, true>(
            ex, x_row, w.a, kRank,
            [&] {
                expand.request(ex.stages, tile, y, layer.y_stride, w.b, layer.width);
                if constexpr (kOpens) open_exchange<kWidth>(ex, tile.rows);
            },
            first_x);
        __syncthreads();
        if constexpr (!kOpens) open_exchange<kWidth>(ex, tile.rows);
        exchange_parts<kWidth>(ex, tile.rows, [&] { expand.take_early(); });
        const auto scaled = [&](float4 q) { return make_float4(q.x * scale, q.y * scale, q.z * scale, q.w * scale); };
        if constexpr (kRank > kWidth) {
            constexpr int kRest = rest_of(kRank);
            keep_exchanged<kWidth>(ex, tile.rows);
            shrink_leaves<kRest / 16, kShrinkBudget>(ex, x_row, w.a + kWidth * kARow, kRank - kWidth, [] {});
            __syncthreads();
            open_exchange<kRest>(ex, tile.rows);
            exchange_parts<kRest>(ex, tile.rows);
            ptx::start_next();
            expand.template take<0>(
                [&](int rank) { return scaled(*reinterpret_cast<const float4*>(ex.kept + g * kWidth + rank)); });
            expand.template take<kWidth>([&](int rank) { return scaled(exchanged<kRest>(ex, g, rank - kWidth)); });
        } else {
            ptx::start_next();  // not earlier: blocks of the next launch would take room from clusters still to come
            expand.template take<0>([&](int rank) { return scaled(exchanged<kWidth>(ex, g, rank)); });
        }
        expand.finish();
    } else {
        const int rank = kRank ? kRank : w.rank;
        shrink_chunks<kRank ? chunk_of(kRank) : kAnyChunk, kRank ? kShrinkBudget : kAnyBudget>(ex, x_row, w.a, rank,
                                                                                               tile.rows);
        expand_any<kRank>(tile, y, layer.y_stride, w.b, rank, layer.width,
                          [&](int at) { return ex.v[g * (kMaxRank + 4) + at] * scale; });
    }
}

#if TILE_ROWS > 8
using Rows = RingTile;
#else
using Rows = Tile;
#endif

constexpr int kStartBarriers = kExchangeBarriers + (TILE_ROWS > 8 ? 2 : 0);

// What a block works with; all but a few bits of it are addresses.
struct Block {
    Exchange ex;
#if TILE_ROWS > 8
    RingExchange ring;
    unsigned char* local;
#endif
};

CUPY_LORA_DEVICE Block block_at(unsigned char* shared, u32 state) {
    const ExchangeState exchange{state & 3, state >> 3 & 1, (state & 4) != 0};
#if TILE_ROWS > 8
    unsigned char* const received = shared + 128 + kTableBytes;
    unsigned char* const remote = received + kReceivedBytes;
    unsigned char* const local = remote + kRingRemoteBytes;
    return Block{exchange_at(shared, received, local, exchange),
                 ring_at(shared + 8 * kExchangeBarriers, remote, state >> 4), local};
#else
    return Block{exchange_at(shared, exchange)};
#endif
}

CUPY_LORA_DEVICE u32 state_of(const Block& block) {
    u32 state = (block.ex.uses & 3) | (block.ex.joined ? 4u : 0u) | (block.ex.hops & 1) << 3;
#if TILE_ROWS > 8
    state |= (block.ring.uses & 1) << 4;
#endif
    return state;
}

template <int kRank>
CUPY_LORA_DEVICE void tile_of(Block& block, const Layer& layer, const Rows& tile, const Record& w, Out* y,
                              const In* x_row, const FirstX* first_x) {
#if TILE_ROWS > 8
    if constexpr (kStaged<kRank>) {
        ring_tile<kRank>(block.ring, block.ex, block.local, layer, tile, w, y);
    } else {
#pragma unroll 1
        for (int first = 0; first < tile.rows; first += 8) {
            const int rows = tile.rows - first < 8 ? tile.rows - first : 8;
            const Tile eight = tile.eight(first, rows);
            const In* const row = layer.x + eight.row(threadIdx.x % 32 / 4) * layer.x_stride;
            direct_tile<kRank>(block.ex, layer, eight, w, y, row, nullptr);
        }
    }
#else
    direct_tile<kRank>(block.ex, layer, tile, w, y, x_row, first_x);
#endif
}

// The same as a call that takes scalars only: several large bodies in one kernel cost each other registers
// otherwise. Returns the state of the block.
#if TILE_ROWS > 8
#define ROWS_PARAMETERS int rows
#define ROWS_ARGUMENTS tile.rows
#define ROWS_OF_PARAMETERS \
    RingTile { rows, table_of(shared) }
#else
#define ROWS_PARAMETERS int rows, int own, u32 written
#define ROWS_ARGUMENTS tile.rows, tile.own, tile.written
#define ROWS_OF_PARAMETERS Tile{rows, own, written, 0}
#endif

template <int kRank>
CUPY_LORA_DEVICE_CALL u32 tile_call(u32 state, const In* x, Out* y, u32 x_stride, u32 y_stride, ROWS_PARAMETERS,
                                    const Half* a, const Half* b, int rank, float scale, int width) {
    unsigned char* const shared = block_shared();
    Block block = block_at(shared, state);
    const Rows tile = ROWS_OF_PARAMETERS;
    const Layer layer{x, y, x_stride, y_stride, 0, 1.f, width};
    const In* x_row = nullptr;
#if TILE_ROWS <= 8
    x_row = x + tile.row(threadIdx.x % 32 / 4) * x_stride;
#endif
    tile_of<kRank>(block, layer, tile, Record{a, b, rank, scale, 0}, y, x_row, nullptr);
    return state_of(block);
}

// A launch of so few blocks leaves room for the next one's, at 8 warps a multiprocessor, from its start on.
constexpr u32 kFewBlocks = 128 * 8 / kWarps / 2;

// One coded rank is the kernel itself; every other body is called.
constexpr bool kOneBody = kRankCount == 1;

template <int kRank>
CUPY_LORA_DEVICE void tile_or_call(Block& block, const Layer& layer, const Rows& tile, const Record& w, Out* y,
                                   const In* x_row, const FirstX* first_x) {
    unsigned char* const shared = block_shared();
    if constexpr (kOneBody && kRank > 0) {
        tile_of<kRank>(block, layer, tile, w, y, x_row, first_x);
    } else {
        const u32 state = tile_call<kRank>(state_of(block), layer.x, y, layer.x_stride, layer.y_stride, ROWS_ARGUMENTS,
                                           w.a, w.b, w.rank, w.scale * layer.scale, layer.width);
        block = block_at(shared, state);
    }
}

// Picks the code for this tile's rank.
template <int kAt = 0, class... Args>
CUPY_LORA_DEVICE void tile_of_rank(int rank, Block& block, const Args&... args) {
    if constexpr (kAt < kRankCount) {
        if ((!kAnyRank && kRankCount == kAt + 1) || rank == kRanks[kAt]) {
            tile_or_call<kRanks[kAt]>(block, args...);
        } else {
            tile_of_rank<kAt + 1>(rank, block, args...);
        }
    } else if constexpr (kAnyRank) {
        tile_or_call<0>(block, args...);
    }
}

// What tells a block its tiles.
struct Work {
    const Record* table;  // of this slice; a slot's is kSlices further than the one before's
    const i32* tiles;     // head (slot, rows) and, 8 ints further, the rows of each
    const i32* count;
    i32 slots;

    static constexpr int kStride = 8 + kTileRows;
    CUPY_LORA_DEVICE const i32* tile(int at) const { return tiles + static_cast<i64>(at) * kStride; }

    // A record past the count may hold any slot.
    CUPY_LORA_DEVICE bool has(int slot) const { return slot >= 0 && slot < slots; }

    // Of a slot that is there; nothing waits for it before it is used.
    CUPY_LORA_DEVICE Record weights(int slot) const {
        return load_record(table + static_cast<i64>(has(slot) ? slot : 0) * kSlices);
    }
};

extern "C" __global__ void LAYER_CLUSTER __launch_bounds__(kThreads, MIN_BLOCKS)
    add_lora(const In* __restrict__ x, Out* y, const Record* __restrict__ table, const i32* __restrict__ tiles,
             const i32* __restrict__ tile_count, i32 tokens, i32 slots, u32 x_stride, u32 y_stride, float scale) {
    ptx::begin_launch(false);
    unsigned char* const shared = block_shared();
    const int slice = static_cast<int>(blockIdx.y);
    int width = kWidths[0];
    i64 offset = 0;
#pragma unroll
    for (int s = 1; s < kSlices; ++s) {
        if (slice >= s) offset += kWidths[s - 1], width = kWidths[s];
    }
    const Layer layer{x, y, x_stride, y_stride, tokens, scale, width};
    const Work work{table + slice, tiles, tile_count, slots};
    int at = static_cast<int>(blockIdx.x) / kCluster;
    const int step = static_cast<int>(gridDim.x) / kCluster;
    // The first record is read beside the count, not after it: the grid is within the capacity.
    const i32* record = work.tile(at);
    int2 head = ptx::load_int2(record);
    constexpr int kListed = TILE_ROWS > 8 ? kTileRows : 8;
    int listed = ptx::load_int(record + 8 + threadIdx.x % kListed);
#if TILE_ROWS > 8
    int safe = ptx::load_int(record + 8);
#endif
    const int count = ptx::load_int(tile_count);
    Record w = work.weights(head.x);
    if (gridDim.x * gridDim.y <= kFewBlocks) ptx::start_next();
    start_barriers(shared, kStartBarriers);
    Block block = block_at(shared, kCluster == 1 ? 4 : 0);
    if (at >= count) return;
    if constexpr (kCluster > 1) ptx::cluster_arrive_relaxed();
    while (true) {
        const In* x_row = nullptr;
        FirstX first_x;
#if TILE_ROWS > 8
        fill_table(table_of(shared), listed, safe, head.y, tokens);  // while the record is on its way
        __syncthreads();
        const Rows tile{head.y, table_of(shared)};
#else
        const Rows tile = tile_of_list(listed, head.y, tokens);
        if constexpr (kOneBody) {
            x_row = x + tile.row(threadIdx.x % 32 / 4) * x_stride;
            first_x.request(x_row);
        }
#endif
        if (work.has(head.x) && w.rank > 0) tile_of_rank(w.rank, block, layer, tile, w, y + offset, x_row, &first_x);
        at += step;
        if (at >= count) break;
        record = work.tile(at);
        head = ptx::load_int2(record);
        listed = ptx::load_int(record + 8 + threadIdx.x % kListed);
        w = work.weights(head.x);
#if TILE_ROWS > 8
        safe = ptx::load_int(record + 8);
#else
        __syncthreads();  // the next tile's parts overwrite this one's
#endif
    }
    if constexpr (kCluster > 1) {
        if (!block.ex.joined) ptx::cluster_wait();
    }
}
