// Runs a CUDA kernel on the CPU: one fiber per CUDA thread, one block (or one cluster) at a time.
//
// A fiber runs until it must wait for others; then the scheduler takes the next one, in ascending or descending thread
// order (Config.descending). Nothing here is concurrent, so a result depends on the order only where the kernel has a
// race, and runner.py runs both orders and compares. Besides, in one run each access of shared memory is checked
// against those before it, whatever the order: two of different threads, one of them a write, must have a barrier in
// between (Config.races). What a GPU may do late is done at the latest legal moment, or at once (Config.early):
// cp.async lands at the wait that forces it, what an mbarrier counts when nobody can go on without it.
// Not modelled: asm text, memory order between warps, blocks that run at the same time, FTZ, approximate
// functions, the tensor core's rounding (an mma sums in double and rounds once), speed.
#include <pthread.h>
#include <sys/mman.h>
#include <sys/time.h>

#include <csignal>

#include "engine.h"

namespace simt {

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

Config* config;
std::vector<Block> blocks;
std::vector<Store> stores;
Fiber* current;
unsigned threads, cluster_arrived, cluster_exited, cluster_phase;
bool restart;
uint64_t now;
unsigned watched;
unsigned char* shared;
sigjmp_buf escape;
pthread_t owner;

void fiber_main() {
    config->thread(config->arguments);
    Fiber& f = *current;
    Warp& w = *f.warp;
    land(f, ~0u);
    f.wait = EXITED, w.exited |= 1u << f.lane;
    for (const Meeting& m : w.meetings)
        if (m.arrived && m.mask & w.exited)
            fail("lane %u exits, lanes %08x wait for it in %s (line %d)", f.lane, m.arrived, m.what, m.line);
    ++f.block->exited, ++cluster_exited;
    open_block(*f.block);
    open_cluster();
    park(EXITED, "");
}

// What comes at `step` of `n` in the thread order of this run.
static unsigned turn(unsigned step, unsigned n) { return config->descending ? n - 1 - step : step; }

static void start_block(Block& b, unsigned rank, uint3 index) {
    b.index = index, b.arrived = b.exited = 0, b.since = ++now;
    b.mbarriers.clear();
    b.warps.clear(), b.warps.resize((config->block + WARP - 1) / WARP);
    for (Named& n : b.named) n = Named();
    b.issued.assign((b.warps.size() + 3) / 4, {});
    if (config->block % WARP) b.warps.back().exited = ~0u << config->block % WARP;
    for (unsigned tid = 0; tid < config->block; ++tid) {
        Fiber& f = b.fibers[tid];
        f.tid = tid, f.lane = tid % WARP, f.block = &b, f.warp = &b.warps[tid / WARP];
        f.group = 0, f.in_cluster_barrier = f.fenced = false;
        f.copies.clear(), f.seen.clear();
        if (f.lane == 0) f.warp->fibers = &f;
        wake(f);
        f.stack = stack_of(rank * config->block + tid);
        prepare(f);
    }
    memset(b.pages, static_cast<int>(config->poison), b.end - b.pages);
}

static void finish_block(const Block& b) {
    for (const unsigned char* p = b.pages; p < b.end; ++p)
        if ((p < b.shared || p >= b.shared + config->shared) && *p != config->poison)
            fail("block (%u, %u, %u) wrote outside its %u bytes of shared memory, at byte %ld", b.index.x, b.index.y,
                 b.index.z, config->shared, static_cast<long>(p - b.shared));
}

static void run_cluster(unsigned x, unsigned y, unsigned z) {
    const unsigned in_block = (config->block + WARP - 1) / WARP, warps = config->cluster * in_block;
    cluster_arrived = cluster_exited = cluster_phase = 0;
    stores.clear();
    for (unsigned rank = 0; rank < config->cluster; ++rank) start_block(blocks[rank], rank, {x + rank, y, z});
    while (cluster_exited < threads) {
        bool any = restart = false;
        for (unsigned i = 0; i < warps && !restart; ++i) {
            Warp& w = blocks[turn(i, warps) / in_block].warps[turn(i, warps) % in_block];
            while (w.ready && !restart) {
                any = true;
                const int lane = config->descending ? 31 - __builtin_clz(w.ready) : __builtin_ctz(w.ready);
                current = w.fibers + lane, shared = current->block->shared;
                threadIdx.x = current->tid, blockIdx = current->block->index;
                enter(*current);
            }
        }
        current = nullptr;
        if (!any && !deliver_awaited()) report_stuck();
    }
    if (!stores.empty()) fail("%zu asynchronous copies or stores under way when the cluster exited", stores.size());
    for (const Block& b : blocks) finish_block(b), check_products(b);
}

static void run_grid() {
    const unsigned clusters = config->grid[0] / config->cluster, n = clusters * config->grid[1] * config->grid[2];
    for (unsigned i = 0; i < n; ++i) {
        const unsigned at = turn(i, n);
        run_cluster(at % clusters * config->cluster, at / clusters % config->grid[1], at / clusters / config->grid[1]);
    }
}

}  // namespace simt

extern "C" SIMT_API void simt_launch(simt::Config* given) {
    using namespace simt;
    config = given, owner = pthread_self(), threads = config->cluster * config->block;
    watched = config->races ? config->shared : 0;
    gridDim = dim3(config->grid[0], config->grid[1], config->grid[2]), blockDim = dim3(config->block);
    const size_t rounded = (config->shared + ALIGN - 1) / ALIGN * ALIGN;
    const size_t pages = (rounded + PAGE - 1) / PAGE * PAGE + PAGE, slot = pages + PAGE;
    auto* const memory = static_cast<unsigned char*>(
        mmap(nullptr, slot * config->cluster, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    blocks.resize(config->cluster);
    for (unsigned rank = 0; rank < config->cluster; ++rank) {
        Block& b = blocks[rank];
        b.pages = memory + rank * slot, b.end = b.pages + pages, b.shared = b.end - rounded;
        mprotect(b.end, PAGE, PROT_NONE);
        b.fibers.resize(config->block);
        if (config->races && b.cells.size() < config->shared / 2) b.cells.resize(config->shared / 2);
    }
    static char alternate[64 << 10];
    const int signals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGVTALRM};
    struct sigaction action = {}, before[5];
    action.sa_sigaction = on_signal, action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    stack_t stack = {}, stack_before;
    stack.ss_sp = alternate, stack.ss_size = sizeof alternate;
    itimerval limit = {}, none = {};
    limit.it_value.tv_sec = config->seconds;
    sigaltstack(&stack, &stack_before);
    for (int i = 0; i < 5; ++i) sigaction(signals[i], &action, &before[i]);
    setitimer(ITIMER_VIRTUAL, &limit, nullptr);
    if (sigsetjmp(escape, 1) == 0) run_grid();
    current = nullptr;
    setitimer(ITIMER_VIRTUAL, &none, nullptr);
    for (int i = 0; i < 5; ++i) sigaction(signals[i], &before[i], nullptr);
    sigaltstack(&stack_before, nullptr);
    munmap(memory, slot * config->cluster);
}
