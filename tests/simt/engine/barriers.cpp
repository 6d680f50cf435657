// Where threads wait for each other: the block's barrier, the lanes of a warp, mbarriers, the cluster's barrier.
#include "engine.h"

namespace simt {

// ---- the block's barrier; threads that have exited count as arrived
void open_block(Block& b) {
    if (b.arrived == 0 || b.arrived + b.exited < config->block) return;
    b.arrived = 0, b.since = ++now, restart = true;
    for (Fiber& f : b.fibers)
        if (f.wait == IN_BLOCK) wake(f);
}

void syncthreads(const char* file, int line) {
    Block& b = *current->block;
    if (b.arrived && (b.line != line || strcmp(b.file, file) != 0))
        fail("divergent __syncthreads: this thread is at line %d, others wait at line %d", line, b.line);
    b.file = file, b.line = line, ++b.arrived;
    current->wait = IN_BLOCK, current->fenced = false;
    open_block(b);
    park(current->wait, "__syncthreads");
}

// ---- the lanes of a warp
void meet(unsigned mask, const char* what, int line, void* data, Complete complete) {
    Fiber& f = *current;
    Warp& w = *f.warp;
    if (!(mask >> f.lane & 1)) fail("%s: lane %u is not in its own mask %08x", what, f.lane, mask);
    if (mask & w.exited) fail("%s: the mask %08x names lanes %08x that have exited", what, mask, mask & w.exited);
    Meeting& m = w.meetings[__builtin_ctz(mask)];
    if (m.arrived == 0) m = {mask, 0, what, line};
    if (m.mask != mask || m.line != line || strcmp(m.what, what) != 0)
        fail("divergent %s (line %d, mask %08x): lanes %08x wait in %s (line %d, mask %08x)", what, line, mask,
             m.arrived, m.what, m.line, m.mask);
    w.data[f.lane] = data;
    m.arrived |= 1u << f.lane;
    if (m.arrived != mask) return park(IN_WARP, what);
    m.arrived = 0;
    if (complete)
        complete(w.data, mask);
    else
        meet_memory(w, mask);
    for (unsigned lane = 0; lane < WARP; ++lane)
        if (mask >> lane & 1) wake(w.fibers[lane]);
    park(READY, what);
}

// ---- mbarriers: the state is kept here; their 8 bytes hold a mark that a stray store would destroy
static uint64_t mark(const void* p) { return 0x6d62617272696572u ^ reinterpret_cast<uintptr_t>(p); }

Mbarrier& mbarrier_at(const void* p, const char* what) {
    for (Mbarrier& m : owner_of(p, 8, what).mbarriers) {
        if (m.at != p) continue;
        if (*static_cast<const uint64_t*>(p) != mark(p)) fail("%s: the mbarrier at %p was overwritten", what, p);
        return m;
    }
    fail("%s: no mbarrier was initialised at %p", what, p);
}
void mbarrier_update(void* p, int arrivals, int bytes, const char* what) {
    Mbarrier& m = mbarrier_at(p, what);
    m.pending -= arrivals, m.tx += bytes;
    if (m.pending < 0) fail("%s: more arrivals than the mbarrier's %d", what, m.count);
    if (m.pending || m.tx) return;
    m.pending = m.count, ++m.phase;
    learn(m.seen, m.told);
    for (Fiber& f : owner_of(p, 8, what).fibers)
        if (f.wait == IN_MBARRIER && f.mbarrier == p && f.parity != m.phase % 2) wake(f);
}
void mbarrier_init(void* p, unsigned count) {
    own(p, 8, "mbarrier_init");
    *static_cast<uint64_t*>(p) = mark(p);
    const Mbarrier fresh = {p, static_cast<int>(count), static_cast<int>(count), 0, 0, {}, {}};
    for (Mbarrier& m : current->block->mbarriers)
        if (m.at == p) {
            m = fresh;
            return;
        }
    current->block->mbarriers.push_back(fresh);
}
void mbarrier_expect(void* p, unsigned bytes) {
    own(p, 8, "mbarrier_expect");
    tell(mbarrier_at(p, "mbarrier_expect"));
    mbarrier_update(p, 1, static_cast<int>(bytes), "mbarrier_expect");
}
void mbarrier_wait(const void* p, unsigned parity) {
    own(p, 8, "mbarrier_wait");
    current->mbarrier = p, current->parity = parity;
    if (mbarrier_at(p, "mbarrier_wait").phase % 2 == parity) park(IN_MBARRIER, "mbarrier_wait");
    learn(current->seen, mbarrier_at(p, "mbarrier_wait").seen);
    current->fenced = false;
}

// ---- clusters
void open_cluster() {
    if (cluster_arrived == 0 || cluster_arrived + cluster_exited < threads) return;
    cluster_arrived = 0, ++cluster_phase, restart = true;
    for (Block& b : blocks)
        for (Fiber& f : b.fibers)
            if (f.wait == IN_CLUSTER) wake(f);
}
void cluster_arrive() {
    if (current->in_cluster_barrier) fail("cluster_arrive: twice without cluster_wait");
    current->in_cluster_barrier = true, current->cluster_phase = cluster_phase;
    ++cluster_arrived;
    open_cluster();
}
void cluster_wait() {
    if (!current->in_cluster_barrier) fail("cluster_wait: without cluster_arrive");
    if (cluster_phase == current->cluster_phase) park(IN_CLUSTER, "cluster_wait");
    current->in_cluster_barrier = false;
}

}  // namespace simt
