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
#include "simt.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <dlfcn.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <ucontext.h>

#include <algorithm>
#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <list>
#include <vector>

namespace simt {

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

constexpr size_t STACK = 256 << 10, MAX_THREADS = 16 * 1024, PAGE = 4096, ALIGN = 128;

struct Config {  // mirrored by runner.py
    void (*thread)(void* const* arguments);
    void* const* arguments;
    unsigned grid[3], block, shared, cluster, descending, early, races, poison, seconds, message_size;
    unsigned used_async;  // out: whether early and late differ
    char* message;        // out: what is wrong, or empty
    void* fault;          // out: the illegal address
};

enum Wait { READY, IN_WARP, IN_BLOCK, IN_CLUSTER, IN_MBARRIER, IN_NAMED, EXITED };

struct Copy {
    void* to;
    const void* from;
    unsigned size, bytes, group;
};
struct Block;
struct Warp;
using Times = std::vector<uint64_t>;
struct Fiber {
    void* sp;      // where it left off
    void** frame;  // the same, for the report
    Wait wait;
    const char* what;
    unsigned tid, lane;
    Block* block;
    Warp* warp;
    const void* mbarrier;
    unsigned parity, cluster_phase, group;
    bool in_cluster_barrier, fenced;  // fenced: what barriers told it of is in order with matrix products
    std::vector<Copy> copies;
    Times seen;  // by thread of the block: what it did before that is done, as mbarriers say
    char* stack;
#if !defined(__x86_64__)
    ucontext_t context;
#endif
};
struct Meeting {  // of the lanes of one mask, kept under its lowest lane
    unsigned mask, arrived;
    const char* what;
    int line;
};
struct Issue {  // of a warpgroup's product, by one lane
    float* c;
    unsigned eights;  // of columns
    const unsigned* a;
    unsigned long long a_matrix, b_matrix;
    bool add, is_bf16;
};
struct Sums {  // accumulators of a warp that a product is under way to
    unsigned eights;
    float* at[WARP];
    std::vector<float> values;
};
struct Product {  // a warp's part of one
    unsigned eights, group;
    bool a_shared, is_bf16, add;
    unsigned a[WARP][4];
    unsigned long long a_matrix, b_matrix;
    std::vector<float>* sums;
};
constexpr unsigned UNDER_WAY = 0x7fc5a5a5;  // what those accumulators hold: a NaN
struct Warp {
    Meeting meetings[WARP];
    void* data[WARP];
    unsigned ready, exited;
    Fiber* fibers;
    uint64_t since;  // of its last __syncwarp
    std::vector<Product> products;
    std::list<Sums> sums;
    unsigned product_group;
    size_t issued;
    bool ordered;  // a wgmma_fence since the last wait
};
struct Mbarrier {
    void* at;
    int count, pending, tx;
    unsigned phase;
    Times told, seen;  // by those who arrived in this phase, and in those before
};
struct Named {
    int count, arrived;
    Times told, seen;
};
struct Store {  // what is under way to an mbarrier: a store, a copy, the arrival after copies
    unsigned char *to, *barrier, bytes[16];
    const unsigned char* from;  // null: `bytes` is stored
    unsigned size, valid;       // zeros follow the valid bytes of a copy
    int arrivals, tx;
    const Fiber* by;  // of a copy that its thread may wait for, too: the thread and its group
    unsigned group;
};
struct Access {  // of shared memory: when and by whom
    uint64_t time : 46, thread : 16, atomic : 1;
};
struct Cell {  // of two bytes: the last write, and the last reads of two warps
    Access write, reads[2];
};
struct Block {
    uint3 index;
    unsigned char *pages, *shared, *end;  // shared memory: what lies ahead of it, itself, the page without access
    unsigned arrived, exited;
    const char* file;
    int line;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::vector<Mbarrier> mbarriers;
    std::vector<Cell> cells;
    uint64_t since;  // of its last barrier
    Named named[16];
    std::vector<std::vector<std::pair<unsigned long long, unsigned long long>>> issued;  // products of a warpgroup
};

static Config* config;
static std::vector<Block> blocks;  // of the cluster that runs
static std::vector<Store> stores;  // under way
static Fiber* current;
static unsigned threads, cluster_arrived, cluster_exited, cluster_phase;
static bool restart;           // a barrier opened: begin again with the first thread
static uint64_t now;           // counts barriers, from launch to launch
static unsigned watched;       // bytes of shared memory whose accesses are checked: all or none
static unsigned char* shared;  // of the running thread's block
static sigjmp_buf escape;
static pthread_t owner;

// ---- reports
static std::string text_of(const char* format, va_list list) {
    char text[512];
    vsnprintf(text, sizeof text, format, list);
    return text;
}
__attribute__((format(printf, 1, 2))) static std::string text(const char* format, ...) {
    va_list list;
    va_start(list, format);
    const std::string out = text_of(format, list);
    va_end(list);
    return out;
}

// "block (1, 0, 0) thread 7 @1f3@2a0": the call chain as addresses in the kernel's library, for addr2line.
// `top`: where a function that may have no frame yet was called from is the first such address on the stack.
static std::string place(const Fiber& f, void** frame, void* pc = nullptr, void** top = nullptr) {
    const uint3 b = f.block->index;
    std::string out = text("block (%u, %u, %u) thread %u ", b.x, b.y, b.z, f.tid);
    Dl_info library, info;
    dladdr(reinterpret_cast<void*>(config->thread), &library);
    const auto add = [&](void* address, int back) {
        if (!dladdr(address, &info) || info.dli_fbase != library.dli_fbase) return false;
        out += text("@%lx", static_cast<long>(static_cast<char*>(address) - static_cast<char*>(info.dli_fbase) - back));
        return true;
    };
    if (pc) add(pc, 0);
    const auto low = reinterpret_cast<void**>(f.stack + PAGE), high = reinterpret_cast<void**>(f.stack + STACK);
    for (void** word = top; word && word < top + 64 && word < high; ++word) {
        if (add(*word, 1)) break;
    }
    for (void** before = low; frame >= before && frame + 1 < high && frame[1];) {  // the chain goes up in this stack
        add(frame[1], 1);
        before = frame + 1, frame = static_cast<void**>(frame[0]);
    }
    return out;
}

[[noreturn]] static void stop(const std::string& message) {
    snprintf(config->message, config->message_size, "%s", message.c_str());
    siglongjmp(escape, 1);
}

__attribute__((noinline)) void fail(const char* format, ...) {
    va_list list;
    va_start(list, format);
    std::string message = text_of(format, list);
    va_end(list);
    if (current) message += "; " + place(*current, static_cast<void**>(__builtin_frame_address(0)));
    stop(message);
}

static void on_signal(int signal, siginfo_t* info, void* context) {
    if (!pthread_equal(owner, pthread_self())) {  // not ours: the timer goes to the right thread, the rest is fatal
        if (signal == SIGVTALRM)
            pthread_kill(owner, signal);
        else
            std::signal(signal, SIG_DFL);
        return;
    }
    std::string message = signal == SIGILL      ? "undefined behaviour: a misaligned access, or outside a local array"
                          : signal == SIGFPE    ? "integer division by zero or overflow"
                          : signal == SIGVTALRM ? "a thread ran for too long without waiting"
                                                : text("illegal address %p", info->si_addr);
    if (signal == SIGSEGV || signal == SIGBUS) config->fault = info->si_addr;
    for (const Block& b : blocks)
        if (info->si_addr >= b.end && info->si_addr < b.end + PAGE)
            message += text(" (%ld bytes past the end of shared memory)",
                            static_cast<long>(static_cast<unsigned char*>(info->si_addr) - b.shared - config->shared));
    void *pc = nullptr, **frame = nullptr, **top = nullptr;
#if defined(__x86_64__)
    const auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
    pc = reinterpret_cast<void*>(registers[REG_RIP]), frame = reinterpret_cast<void**>(registers[REG_RBP]);
    if (signal == SIGVTALRM) top = reinterpret_cast<void**>(registers[REG_RSP]);
#elif defined(__aarch64__)
    const auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext;
    pc = reinterpret_cast<void*>(registers.pc), frame = reinterpret_cast<void**>(registers.regs[29]);
    if (signal == SIGVTALRM) top = reinterpret_cast<void**>(registers.sp);
#endif
    if (current) message += "; " + place(*current, frame, pc, top);
    stop(message);
}

// ---- fibers
static char* stack_of(size_t i) {  // the lowest page of each stays without access
    static size_t usable = 0;
    static char* const all = static_cast<char*>(
        mmap(nullptr, MAX_THREADS * STACK, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    for (; usable <= i; ++usable) mprotect(all + usable * STACK + PAGE, STACK - PAGE, PROT_READ | PROT_WRITE);
    return all + i * STACK;
}

static void fiber_main();

#if defined(__x86_64__)
static void* scheduler_sp;
// Saves the callee-saved registers on this stack and takes those of the other.
__attribute__((naked, noinline)) static void switch_stack(void** from, void* to) {
    asm("push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
        "mov %rsp, (%rdi)\n mov %rsi, %rsp\n"
        "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret");
}
static void prepare(Fiber& f) {
    void** const top = reinterpret_cast<void**>(f.stack + STACK) - 8;  // six registers, the entry, no return address
    memset(top, 0, 8 * sizeof(void*));
    top[6] = reinterpret_cast<void*>(fiber_main);
    f.sp = top;
}
static void enter(Fiber& f) { switch_stack(&scheduler_sp, f.sp); }
static void leave(Fiber& f) { switch_stack(&f.sp, scheduler_sp); }
#else
static ucontext_t scheduler_context;
static void prepare(Fiber& f) {
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack, f.context.uc_stack.ss_size = STACK, f.context.uc_link = nullptr;
    makecontext(&f.context, fiber_main, 0);
}
static void enter(Fiber& f) { swapcontext(&scheduler_context, &f.context); }
static void leave(Fiber& f) { swapcontext(&f.context, &scheduler_context); }
#endif

static void wake(Fiber& f) {
    f.wait = READY;
    f.warp->ready |= 1u << f.lane;
}

// Lets others run; comes back when someone has woken this thread (READY: it is its own turn again some time).
__attribute__((noinline)) static void park(Wait wait, const char* what) {
    Fiber& f = *current;
    f.wait = wait, f.what = what, f.frame = static_cast<void**>(__builtin_frame_address(0));
    if (wait != READY) f.warp->ready &= ~(1u << f.lane);
    leave(f);
}

// ---- the block's barrier; threads that have exited count as arrived
static void open_block(Block& b) {
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

// ---- what is known to be done, for the reports of races
static void learn(Times& to, const Times& from) {
    if (to.size() < from.size()) to.resize(from.size());
    for (size_t i = 0; i < from.size(); ++i) to[i] = std::max(to[i], from[i]);
}
// The running thread arrives: those who wait learn what it did, and what it knows.
static void tell_times(Times& told) {
    if (!watched) return;
    told.resize(config->block);
    learn(told, current->seen);
    const unsigned first = current->tid - current->lane;
    for (unsigned i = first; i < config->block && i < first + WARP; ++i)
        told[i] = std::max(told[i], current->warp->since);
    told[current->tid] = ++now;
}
static void tell(Mbarrier& m) { tell_times(m.told); }
// Of all operations of a warp only __syncwarp orders memory.
static void meet_memory(Warp& w, unsigned mask) {
    Times all;
    for (unsigned lane = 0; lane < WARP; ++lane)
        if (mask >> lane & 1) learn(all, w.fibers[lane].seen);
    for (unsigned lane = 0; lane < WARP; ++lane)
        if (mask >> lane & 1) w.fibers[lane].seen = all;
    w.since = ++now;
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

// ---- 16-bit floats, by CUDA's own rounding
unsigned short bf16_bits(float v) { return __bfloat16_as_ushort(__float2bfloat16_rn(v)); }
unsigned short f16_bits(float v) { return __half_as_ushort(__float2half_rn(v)); }
float float_from_f16(unsigned short bits) { return __half2float(__ushort_as_half(bits)); }
static float float_from_bf16(unsigned short bits) { return __bfloat162float(__ushort_as_bfloat16(bits)); }
// cvt.rna: to nearest, ties away from zero; a carry into the exponent is right, up to infinity.
float tf32(float v) { return std::isfinite(v) ? simt_bits<float>((simt_bits<unsigned>(v) + 0x1000u) & ~0x1fffu) : v; }

// ---- tensor cores: fragments as ptx.cuh describes them
struct Fragments {
    float* c;
    unsigned a[4], b[2];
};

// C[16][8] += A[16][K] B[K][8], summed in double, where the products are exact.
template <int K>
static void multiply(void* const* data, const float (&a)[16][K], const float (&b)[K][8]) {
    double sum[16][8] = {};
    for (int row = 0; row < 16; ++row)
        for (int k = 0; k < K; ++k)
            for (int column = 0; column < 8; ++column)
                sum[row][column] += static_cast<double>(a[row][k]) * static_cast<double>(b[k][column]);
    for (unsigned lane = 0; lane < WARP; ++lane)
        for (unsigned i = 0; i < 4; ++i) {
            float& c = static_cast<Fragments*>(data[lane])->c[i];
            c = static_cast<float>(sum[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] + static_cast<double>(c));
        }
}

template <float (*TO_FLOAT)(unsigned short)>
static void multiply_16(void* const* data, unsigned) {
    float a[16][16], b[16][8];
    const auto half = [](const unsigned* words, unsigned i) {
        return TO_FLOAT(static_cast<unsigned short>(words[i / 2] >> i % 2 * 16));
    };
    for (unsigned lane = 0; lane < WARP; ++lane) {
        const Fragments& f = *static_cast<Fragments*>(data[lane]);
        const unsigned g = lane / 4, t = lane % 4;
        for (unsigned i = 0; i < 8; ++i) a[g + i / 2 % 2 * 8][2 * t + i % 2 + i / 4 * 8] = half(f.a, i);
        for (unsigned i = 0; i < 4; ++i) b[2 * t + i % 2 + i / 2 * 8][g] = half(f.b, i);
    }
    multiply(data, a, b);
}

static void multiply_tf32(void* const* data, unsigned) {
    float a[16][8], b[8][8];
    const auto seen = [](unsigned bits) { return simt_bits<float>(bits & ~0x1fffu); };  // by the tensor core
    for (unsigned lane = 0; lane < WARP; ++lane) {
        const Fragments& f = *static_cast<Fragments*>(data[lane]);
        const unsigned g = lane / 4, t = lane % 4;
        for (unsigned i = 0; i < 4; ++i) a[g + i % 2 * 8][t + i / 2 * 4] = seen(f.a[i]);
        for (unsigned i = 0; i < 2; ++i) b[t + i * 4][g] = seen(f.b[i]);
    }
    multiply(data, a, b);
}

void mma_m16n8k16_bf16(float* c, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    Fragments f = {c, {a0, a1, a2, a3}, {b0, b1}};
    meet(~0u, "mma bf16", 0, &f, multiply_16<float_from_bf16>);
}
void mma_m16n8k16_f16(float* c, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    Fragments f = {c, {a0, a1, a2, a3}, {b0, b1}};
    meet(~0u, "mma f16", 0, &f, multiply_16<float_from_f16>);
}
void mma_m16n8k8_tf32(float* c, float a0, float a1, float a2, float a3, float b0, float b1) {
    Fragments f = {c,
                   {__float_as_uint(a0), __float_as_uint(a1), __float_as_uint(a2), __float_as_uint(a3)},
                   {__float_as_uint(b0), __float_as_uint(b1)}};
    meet(~0u, "mma tf32", 0, &f, multiply_tf32);
}

// ---- shared memory
unsigned char* dynamic_shared() { return current->block->shared; }

// The block of the cluster whose shared memory holds these bytes, aligned to their size.
static Block& owner_of(const void* p, size_t size, const char* what) {
    const auto at = static_cast<const unsigned char*>(p);
    for (Block& b : blocks) {
        if (at < b.shared || at + size > b.shared + config->shared) continue;
        if (reinterpret_cast<uintptr_t>(at) % size) fail("%s: shared address %p is no multiple of %zu", what, p, size);
        if (b.exited == config->block) fail("%s: block %u of the grid's row has exited", what, b.index.x);
        return b;
    }
    fail("%s: %p is not in the shared memory of this %s", what, p, blocks.size() > 1 ? "cluster" : "block");
}
static void own(const void* p, size_t size, const char* what) {
    if (&owner_of(p, size, what) != current->block) fail("%s: %p is in another block's shared memory", what, p);
}

// ---- races: kernels are compiled with -fsanitize=thread, which calls this at each access
// Where two threads of a block access the same two bytes, one of them writing, a barrier must lie between.
static void access(const void* p, size_t size, bool writes, bool atomic = false) {
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

// ---- cp.async
void copy_async(void* shared, const void* global, unsigned size, unsigned bytes) {
    own(shared, size, "cp.async");
    if (bytes && reinterpret_cast<uintptr_t>(global) % size) fail("cp.async: %p is no multiple of %u", global, size);
    config->used_async = 1;
    unsigned char bits[16] = {};
    memcpy(bits, global, bytes);  // an illegal address faults here, not where the copy lands
    access(shared, size, true);
    if (config->early)
        memcpy(shared, bits, size);
    else
        current->copies.push_back({shared, global, size, bytes, current->group});
}
void copy_async_commit() { ++current->group; }
static void land(Fiber& f, unsigned groups) {
    size_t kept = 0;
    for (const Copy c : f.copies)
        if (c.group >= groups)
            f.copies[kept++] = c;
        else
            access(c.to, c.size, true), memset(c.to, 0, c.size), memcpy(c.to, c.from, c.bytes);
    f.copies.resize(kept);
}
// The same of copies that a barrier counts too: those whom it tells may read them without this thread's wait.
static void land_counted(const Fiber& f, unsigned groups) {
    size_t kept = 0;
    for (const Store s : stores)
        if (s.by != &f || s.group >= groups)
            stores[kept++] = s;
        else
            memset(s.to, 0, s.size), memcpy(s.to, s.from, s.valid);
    stores.resize(kept);
}
void copy_async_wait(unsigned allowed) {
    if (current->group <= allowed) return;
    land(*current, current->group - allowed);
    land_counted(*current, current->group - allowed);
}

// ---- mbarriers: the state is kept here; their 8 bytes hold a mark that a stray store would destroy
static uint64_t mark(const void* p) { return 0x6d62617272696572u ^ reinterpret_cast<uintptr_t>(p); }

static Mbarrier& mbarrier_at(const void* p, const char* what) {
    for (Mbarrier& m : owner_of(p, 8, what).mbarriers) {
        if (m.at != p) continue;
        if (*static_cast<const uint64_t*>(p) != mark(p)) fail("%s: the mbarrier at %p was overwritten", what, p);
        return m;
    }
    fail("%s: no mbarrier was initialised at %p", what, p);
}
static void mbarrier_update(void* p, int arrivals, int bytes, const char* what) {
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

#include "wgmma.h"

// ---- clusters
static void open_cluster() {
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
unsigned long long map_shared(const void* p, unsigned rank) {
    own(p, 1, "map_shared");
    if (rank >= blocks.size()) fail("map_shared: block %u of a cluster of %zu", rank, blocks.size());
    const ptrdiff_t offset = static_cast<const unsigned char*>(p) - current->block->shared;
    return reinterpret_cast<uintptr_t>(blocks[rank].shared + offset);
}
static void deliver(const Store& s) {
    if (s.from)
        memset(s.to, 0, s.size), memcpy(s.to, s.from, s.valid);
    else if (s.size)
        owner_of(s.to, s.size, "store_async"), memcpy(s.to, s.bytes, s.size);
    mbarrier_update(s.barrier, s.arrivals, -s.tx, "an asynchronous copy or store");
}
static void send(const Store& s) {
    config->used_async = 1;
    if (config->early)
        deliver(s);
    else
        stores.push_back(s);
}
void store_async(unsigned long long to, const void* value, unsigned size, unsigned long long barrier) {
    Store s = {reinterpret_cast<unsigned char*>(to),
               reinterpret_cast<unsigned char*>(barrier),
               {},
               nullptr,
               size,
               size,
               0,
               static_cast<int>(size),
               nullptr,
               0};
    memcpy(s.bytes, value, size);
    if (&owner_of(s.to, size, "store_async") != &owner_of(s.barrier, 8, "store_async"))
        fail("store_async: the data and its mbarrier are in different blocks");
    send(s);
}
void copy_bulk(void* shared, const void* global, unsigned size, void* barrier) {
    if (size == 0 || size % 16) fail("copy_bulk: %u bytes are no multiple of 16", size);
    if (reinterpret_cast<uintptr_t>(global) % 16) fail("copy_bulk: %p is no multiple of 16", global);
    auto* const to = static_cast<unsigned char*>(shared);
    const auto* const from = static_cast<const unsigned char*>(global);
    own(to, 16, "copy_bulk"), own(to + size - 16, 16, "copy_bulk"), own(barrier, 8, "copy_bulk");
    for (unsigned i = 0; i < size; ++i) static_cast<void>(*const_cast<const volatile unsigned char*>(from + i));
    access(to, size, true), tell(mbarrier_at(barrier, "copy_bulk"));
    send({to, static_cast<unsigned char*>(barrier), {}, from, size, size, 0, static_cast<int>(size), nullptr, 0});
}
void copy_async_arrive(void* p) {
    own(p, 8, "copy_async_arrive");
    tell(mbarrier_at(p, "copy_async_arrive"));
    auto* const barrier = static_cast<unsigned char*>(p);
    for (const Copy& c : current->copies) {
        const auto* const from = static_cast<const unsigned char*>(c.from);
        send({static_cast<unsigned char*>(c.to), barrier, {}, from, c.size, c.bytes, 0, 0, current, c.group});
    }
    current->copies.clear();
    send({nullptr, barrier, {}, nullptr, 0, 0, 1, 0, nullptr, 0});
}
// Nobody can go on: what the waiting mbarriers still need lands now.
static bool deliver_awaited() {
    std::vector<const void*> awaited;
    for (Block& b : blocks)
        for (Fiber& f : b.fibers)
            if (f.wait == IN_MBARRIER) awaited.push_back(f.mbarrier);
    std::sort(awaited.begin(), awaited.end());
    std::vector<Store> all;
    all.swap(stores);
    for (const Store& s : all) {
        if (std::binary_search(awaited.begin(), awaited.end(), s.barrier))
            deliver(s);
        else
            stores.push_back(s);
    }
    return stores.size() < all.size();
}

// ---- the scheduler
static void fiber_main() {
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

[[noreturn]] static void report_stuck() {
    std::string message = "stuck:", before;
    for (Block& b : blocks)
        for (Fiber& f : b.fibers) {
            if (f.wait == EXITED) continue;
            const std::string at = place(f, f.frame), chain = at.substr(at.find('@')) + f.what;
            if (chain != before) message += "\n  from " + at + " on: waiting in " + f.what;
            before = chain;
        }
    current = nullptr;
    stop(message);
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
