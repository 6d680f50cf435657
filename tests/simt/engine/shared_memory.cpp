// Shared memory: whose it is, and whether two accesses have a barrier in between.
#include <algorithm>

#include "engine.h"

namespace simt {

// ---- shared memory
unsigned char* dynamic_shared() { return current->block->shared; }

// The block of the cluster whose shared memory holds these bytes, aligned to their size.
Block& owner_of(const void* p, size_t size, const char* what) {
    const auto at = static_cast<const unsigned char*>(p);
    for (Block& b : blocks) {
        if (at < b.shared || at + size > b.shared + config->shared) continue;
        if (reinterpret_cast<uintptr_t>(at) % size) fail("%s: shared address %p is no multiple of %zu", what, p, size);
        if (b.exited == config->block) fail("%s: block %u of the grid's row has exited", what, b.index.x);
        return b;
    }
    fail("%s: %p is not in the shared memory of this %s", what, p, blocks.size() > 1 ? "cluster" : "block");
}
void own(const void* p, size_t size, const char* what) {
    if (&owner_of(p, size, what) != current->block) fail("%s: %p is in another block's shared memory", what, p);
}

unsigned long long map_shared(const void* p, unsigned rank) {
    own(p, 1, "map_shared");
    if (rank >= blocks.size()) fail("map_shared: block %u of a cluster of %zu", rank, blocks.size());
    const ptrdiff_t offset = static_cast<const unsigned char*>(p) - current->block->shared;
    return reinterpret_cast<uintptr_t>(blocks[rank].shared + offset);
}

// ---- what is known to be done, for the reports of races
void learn(Times& to, const Times& from) {
    if (to.size() < from.size()) to.resize(from.size());
    for (size_t i = 0; i < from.size(); ++i) to[i] = std::max(to[i], from[i]);
}
// The running thread arrives: those who wait learn what it did, and what it knows.
void tell_times(Times& told) {
    if (!watched) return;
    told.resize(config->block);
    learn(told, current->seen);
    const unsigned first = current->tid - current->lane;
    for (unsigned i = first; i < config->block && i < first + WARP; ++i)
        told[i] = std::max(told[i], current->warp->since);
    told[current->tid] = ++now;
}
void tell(Mbarrier& m) { tell_times(m.told); }
// Of all operations of a warp only __syncwarp orders memory.
void meet_memory(Warp& w, unsigned mask) {
    Times all;
    for (unsigned lane = 0; lane < WARP; ++lane)
        if (mask >> lane & 1) learn(all, w.fibers[lane].seen);
    for (unsigned lane = 0; lane < WARP; ++lane)
        if (mask >> lane & 1) w.fibers[lane].seen = all;
    w.since = ++now;
}

// ---- races: kernels are compiled with -fsanitize=thread, which calls this at each access
// Where two threads of a block access the same two bytes, one of them writing, a barrier must lie between.
void access(const void* p, size_t size, bool writes, bool atomic) {
    const auto from = static_cast<size_t>(static_cast<const unsigned char*>(p) - shared);
    if (from >= watched) return;
    Block& b = *current->block;
    const unsigned tid = current->tid;
    const auto check = [&](const Access& other, const char* what) {
        const bool same_warp = other.thread / WARP == tid / WARP;
        if (other.time < b.since || other.thread == tid || (same_warp && other.time < current->warp->since)) return;
        if (other.thread < current->seen.size() && other.time < current->seen[other.thread]) return;
        if (!atomic || !other.atomic)
            fail("a race: this thread %s bytes %zu to %zu of shared memory, which thread %u %s without a %s in between",
                 writes ? "writes" : "reads", from, from + size - 1, static_cast<unsigned>(other.thread), what,
                 same_warp ? "__syncwarp" : "barrier");
    };
    for (size_t i = from / 2; i <= (from + size - 1) / 2 && i < b.cells.size(); ++i) {
        Cell& c = b.cells[i];
        const Access mine = {now, tid, atomic};
        check(c.write, "wrote");
        if (writes) {
            for (const Access& read : c.reads) check(read, "read");
            c.write = mine;
        } else {
            if (c.reads[0].thread / WARP != tid / WARP) c.reads[1] = c.reads[0];
            c.reads[0] = mine;
        }
    }
}
void atomic_access(const void* p, size_t size) { access(p, size, true, true); }

}  // namespace simt

#define SIMT_ACCESS(n)                                                                        \
    extern "C" SIMT_API void __tsan_read##n(void* p) { simt::access(p, n, false); }           \
    extern "C" SIMT_API void __tsan_write##n(void* p) { simt::access(p, n, true); }           \
    extern "C" SIMT_API void __tsan_unaligned_read##n(void* p) { simt::access(p, n, false); } \
    extern "C" SIMT_API void __tsan_unaligned_write##n(void* p) { simt::access(p, n, true); }
SIMT_ACCESS(1)
SIMT_ACCESS(2)
SIMT_ACCESS(4)
SIMT_ACCESS(8)
SIMT_ACCESS(16)
extern "C" SIMT_API void __tsan_read_range(void* p, size_t size) { simt::access(p, size, false); }
extern "C" SIMT_API void __tsan_write_range(void* p, size_t size) { simt::access(p, size, true); }
extern "C" SIMT_API void __tsan_init() {}
