// Adapters of several ranks in one launch: which tile each block works on, by its rank.
//
// A tile of rank 64 has eight times the bytes of one of rank 8. By one cluster each, in the order of the list, the
// heavy ones alone would decide the time. So a tile takes a team of blocks, a part of a cluster, by its rank
// (team_of: the widest the whole cluster), and the teams are laid out by their size, the largest first:
//   position  0 .. |       tiles of the whole cluster       | of half of it ... | of one block |
// Position p is block p % kCluster of a cluster, so that a team, whose size divides those before it, lies in one
// cluster. Clusters take positions in turn, there and back: who had the heaviest tile has the lightest next.
//
// The list does not know ranks, and the table may have other ones than when the list was made: each block reads both.
// A thread holds one tile; kSorted tiles are put in order at a time.
//
// A cluster's teams only ever get smaller within one order, so that no block sends parts to one that still works with
// others on an earlier tile: who is in the smaller team was in the larger. Between two orders the cluster meets.
#pragma once

#include "lora_direct.cuh"

constexpr int kSorted = kThreads;
constexpr int kClasses = kRankCount + (kAnyRank ? 1 : 0);  // coded ranks, then those without code
struct Teams {
    int of[kClasses];
};
constexpr CUPY_LORA_DEVICE Teams class_teams() {
    Teams teams{};
    for (int c = 0; c < kClasses; ++c) teams.of[c] = c < kRankCount ? team_of(kRanks[c]) : kCluster;
    return teams;
}
__device__ constexpr Teams kTeams = class_teams();

// In shared memory: the block's next tile (a Chosen), then the counts: int [kWarps][kClasses].
constexpr int kOrderBytes = 32 * kWarps;
struct __align__(16) Chosen {
    i32 tile, rows, row, spare;  // `row`: the first of its rows
    Record weights;
};
static_assert(sizeof(Chosen) + kWarps * kClasses * 4 <= kOrderBytes, "the order has its part of shared memory");

// The class of a rank; kClasses for no adapter.
CUPY_LORA_DEVICE int class_of(int rank) {
    int c = rank > 0 && kAnyRank ? kRankCount : kClasses;
#pragma unroll
    for (int i = 0; i < kRankCount; ++i) {
        if (rank == kRanks[i]) c = i;
    }
    return c;
}

// This thread's tile in the order: its team has positions first to last - 1.
struct Place {
    int first, last;
};

// Returns how many positions there are. All threads call it.
CUPY_LORA_DEVICE int place_tile(Place& mine, i32* counts, int rank) {
    const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
    const int own = class_of(rank);
    int before = 0;  // tiles of this class in the lanes before
#pragma unroll
    for (int c = 0; c < kClasses; ++c) {
        const u32 same = __ballot_sync(0xffffffffu, own == c);
        if (lane == 0) counts[warp * kClasses + c] = __popc(same);
        if (own == c) before = __popc(same & ((1u << lane) - 1));
    }
    __syncthreads();
    mine = Place{0, 0};
    int position = 0;
#pragma unroll
    for (int team = kCluster; team > 0; team /= 2) {
#pragma unroll
        for (int c = kClasses - 1; c >= 0; --c) {
            if (kTeams.of[c] == team) {
                int all = 0, earlier = before;
#pragma unroll
                for (int w = 0; w < kWarps; ++w) {
                    const int tiles = counts[w * kClasses + c];
                    if (w < warp) earlier += tiles;
                    all += tiles;
                }
                if (own == c) mine = Place{position + earlier * team, position + (earlier + 1) * team};
                position += all * team;
            }
        }
    }
    return position;
}

// Where this block stands in the given round over the positions.
CUPY_LORA_DEVICE int position_in(int round) {
    const int clusters = static_cast<int>(gridDim.x) / kCluster, cluster = static_cast<int>(blockIdx.x) / kCluster;
    const int at = round % 2 ? clusters - 1 - cluster : cluster;
    return round * static_cast<int>(gridDim.x) + at * kCluster + static_cast<int>(blockIdx.x % kCluster);
}
