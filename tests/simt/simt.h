// Runs a CUDA kernel on the CPU: one fiber per CUDA thread, one block (or one cluster) at a time.
//
// A fiber runs until it must wait for others; then the scheduler takes the next one, in ascending or
// descending thread order (Config.descending). Nothing here is concurrent, so a result depends on the
// order only where the kernel has a race, and tests/simt/runner.py runs both orders and compares.
// What a GPU may do late is done at the latest legal moment, or at once (Config.early): cp.async lands
// at the wait that forces it, st.async when nobody can go on without it.
// Not modelled: asm text, memory order between warps, FTZ, approximate functions, the tensor core's
// rounding (an mma sums in double and rounds once), speed.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <dlfcn.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <ucontext.h>

#include <cmath>
#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#define __launch_bounds__(...)
#define __noinline__ __attribute__((noinline))
#define __ldg(p) (*(p))

static uint3 threadIdx, blockIdx;
static dim3 blockDim, gridDim;

namespace simt {

constexpr unsigned WARP = 32;
constexpr size_t STACK = 256 << 10, PAGE = 4096, ALIGN = 128;

struct Config {  // mirrored by tests/simt/runner.py
    unsigned grid[3], block, shared, cluster;
    int descending, early, seconds;
    unsigned poison;
    char* stacks;           // address space for one stack per thread of a cluster
    size_t* stacks_mapped;  // how many of them are usable already
    char* message;
    size_t message_size;
    void** fault;    // out: the illegal address
    int* used_async;  // out: whether early and late differ
};

enum Wait { READY, IN_WARP, IN_BLOCK, IN_CLUSTER, IN_MBARRIER, EXITED };
constexpr const char* WAIT_NAMES[] = {"ready", "", "__syncthreads", "cluster_wait", "mbarrier_wait", "exited"};

struct Copy {
    void* to;
    const void* from;
    unsigned size, bytes, group;
};
struct Block;
struct Warp;
struct Fiber {
    void* sp = nullptr;
    ucontext_t* context = nullptr;
    void** frame = nullptr;  // where it waits, for the report
    Wait wait = READY;
    const char* what = "";
    unsigned tid = 0, lane = 0;
    Block* block = nullptr;
    Warp* warp = nullptr;
    const void* mbarrier = nullptr;
    unsigned parity = 0, cluster_phase = 0, group = 0;
    bool cluster_arrived = false;
    std::vector<Copy> copies;
};
struct Meeting {  // of the lanes of one mask, kept under its lowest lane
    unsigned mask, arrived;
    const char* what;
    int line;
};
struct Warp {
    Meeting meetings[WARP] = {};
    void* data[WARP] = {};
    unsigned ready = 0, exited = 0;
    Fiber* fibers = nullptr;
};
struct Mbarrier {
    unsigned char* at;
    int count, pending, tx;
    unsigned phase;
};
struct Store {
    unsigned char *to, *barrier;
    unsigned char bytes[16];
    unsigned size;
};
struct Block {
    uint3 index = {};
    unsigned char *shared = nullptr, *pages = nullptr;
    unsigned arrived = 0, exited = 0;
    const char* file = nullptr;
    int line = 0;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::vector<Mbarrier> mbarriers;
};

static Config config;
static std::vector<Block> blocks;  // of the cluster that runs
static std::vector<Store> stores;  // under way
static Fiber* current;
static unsigned cluster_arrived, cluster_exited, cluster_phase;
static bool restart;
static sigjmp_buf escape;
static void (*entry)();

// ---- reports
__attribute__((format(printf, 1, 2))) inline void say(const char* format, ...) {
    const size_t used = strlen(config.message);
    va_list list;
    va_start(list, format);
    vsnprintf(config.message + used, config.message_size - used, format, list);
    va_end(list);
}

// Code addresses relative to the library, for addr2line: "@1f3@2a0".
inline std::string trace(void** frame, void* pc = nullptr) {
    std::string text;
    char word[32];
    Dl_info info;
    const auto base = dladdr(reinterpret_cast<void*>(&say), &info) ? static_cast<char*>(info.dli_fbase) : nullptr;
    const auto add = [&](void* address, int back) {
        snprintf(word, sizeof word, "@%lx", static_cast<long>(static_cast<char*>(address) - base - back));
        text += word;
    };
    if (pc) add(pc, 0);
    for (int depth = 0; frame && frame[1] && depth < 8; ++depth, frame = static_cast<void**>(frame[0])) add(frame[1], 1);
    return text;
}

inline std::string thread_name(const Fiber& f) {
    char text[96];
    snprintf(text, sizeof text, "block (%u, %u, %u) thread %u", f.block->index.x, f.block->index.y, f.block->index.z,
             f.tid);
    return text;
}

[[noreturn]] __attribute__((noinline, format(printf, 1, 2))) inline void fail(const char* format, ...) {
    va_list list;
    va_start(list, format);
    vsnprintf(config.message, config.message_size, format, list);
    va_end(list);
    if (current) {
        const auto where = trace(static_cast<void**>(__builtin_frame_address(0)));
        say("; %s %s", thread_name(*current).c_str(), where.c_str());
    }
    siglongjmp(escape, 1);
}

inline void on_signal(int signal, siginfo_t* info, void* context) {
    static pthread_t owner = pthread_self();  // set by launch() through a first call with signal 0
    if (signal == 0) {
        owner = pthread_self();
        return;
    }
    if (!pthread_equal(owner, pthread_self())) {
        if (signal == SIGVTALRM) pthread_kill(owner, signal);
        else std::signal(signal, SIG_DFL);
        return;
    }
    const char* text = signal == SIGILL      ? "undefined behaviour (misaligned access or index outside a local array)"
                       : signal == SIGFPE    ? "integer division by zero or overflow"
                       : signal == SIGVTALRM ? "a thread ran for too long without waiting"
                                             : "illegal address";
    void *pc = nullptr, **frame = nullptr;
#if defined(__x86_64__)
    const auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
    pc = reinterpret_cast<void*>(registers[REG_RIP]);
    frame = reinterpret_cast<void**>(registers[REG_RBP]);
#endif
    (void)context;
    snprintf(config.message, config.message_size, "%s", text);
    if (signal == SIGSEGV || signal == SIGBUS) {
        *config.fault = info->si_addr;
        say(" %p", info->si_addr);
    }
    if (current) {
        Dl_info place;  // in another library (libc, libm) the frame pointer means nothing
        const bool here = dladdr(pc, &place) && dladdr(reinterpret_cast<void*>(&say), &place) && place.dli_fbase;
        say("; %s %s", thread_name(*current).c_str(), here ? trace(frame, pc).c_str() : "");
    }
    siglongjmp(escape, 1);
}

// ---- fibers
#if defined(__x86_64__)
static void* scheduler_sp;
// Saves the callee-saved registers on this stack and takes those of the other.
__attribute__((naked, noinline)) static void switch_stack(void** from, void* to) {
    asm("push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
        "mov %rsp, (%rdi)\n mov %rsi, %rsp\n"
        "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret");
}
inline void prepare(Fiber& f, char* stack) {
    void** top = reinterpret_cast<void**>(stack + STACK) - 2;
    top[0] = reinterpret_cast<void*>(entry), top[1] = nullptr;
    memset(top - 6, 0, 6 * sizeof(void*));
    f.sp = top - 6;
}
inline void enter(Fiber& f) { switch_stack(&scheduler_sp, f.sp); }
inline void leave(Fiber& f) { switch_stack(&f.sp, scheduler_sp); }
#else
static ucontext_t scheduler_context;
inline void prepare(Fiber& f, char* stack) {
    if (!f.context) f.context = new ucontext_t;
    getcontext(f.context);
    f.context->uc_stack.ss_sp = stack, f.context->uc_stack.ss_size = STACK, f.context->uc_link = nullptr;
    makecontext(f.context, entry, 0);
}
inline void enter(Fiber& f) { swapcontext(&scheduler_context, f.context); }
inline void leave(Fiber& f) { swapcontext(f.context, &scheduler_context); }
#endif

inline void wake(Fiber& f) {
    f.wait = READY;
    f.warp->ready |= 1u << f.lane;
}

// Lets others run; comes back when someone woke this thread.
__attribute__((noinline)) inline void park(Wait wait, const char* what) {
    Fiber& f = *current;
    f.wait = wait, f.what = what, f.frame = static_cast<void**>(__builtin_frame_address(0));
    if (wait != READY) f.warp->ready &= ~(1u << f.lane);
    leave(f);
}

// ---- the block's barrier
inline void release_block(Block& b) {
    if (b.arrived == 0 || b.arrived + b.exited < b.fibers.size()) return;
    b.arrived = 0;
    restart = true;
    for (auto& f : b.fibers)
        if (f.wait == IN_BLOCK) wake(f);
}

inline void syncthreads(const char* file, int line) {
    Block& b = *current->block;
    if (b.arrived && (b.line != line || strcmp(b.file, file) != 0))
        fail("divergent __syncthreads: this thread is at %s:%d, others wait at %s:%d", file, line, b.file, b.line);
    b.file = file, b.line = line, ++b.arrived;
    current->wait = IN_BLOCK;
    release_block(b);
    park(current->wait, "__syncthreads");
}

// ---- the lanes of a warp
using Complete = void (*)(void* const* data, unsigned mask);

// Waits until every lane of the mask is here; the last one computes what all of them get.
inline void meet(unsigned mask, const char* what, int line, void* data, Complete complete) {
    Fiber& f = *current;
    Warp& w = *f.warp;
    if (!(mask >> f.lane & 1)) fail("%s: lane %u is not in its own mask %08x", what, f.lane, mask);
    if (mask & w.exited) fail("%s: the mask %08x names lanes %08x that have exited", what, mask, mask & w.exited);
    Meeting& m = w.meetings[__builtin_ctz(mask)];
    if (m.arrived == 0) m = {mask, 0, what, line};
    if (m.mask != mask || m.line != line || m.what != what)
        fail("divergent %s (line %d, mask %08x): lanes %08x wait in %s (line %d, mask %08x)", what, line, mask,
             m.arrived, m.what, m.line, m.mask);
    w.data[f.lane] = data;
    m.arrived |= 1u << f.lane;
    if (m.arrived != mask) return park(IN_WARP, what);
    m.arrived = 0;
    if (complete) complete(w.data, mask);
    for (unsigned lane = 0; lane < WARP; ++lane)
        if (mask >> lane & 1) wake(w.fibers[lane]);
    park(READY, what);
}

struct Lane {
    unsigned long long in, out;
    unsigned source;
};

template <class F>
inline void each(void* const* data, unsigned mask, F f) {
    for (unsigned lane = 0; lane < WARP; ++lane)
        if (mask >> lane & 1) f(lane, *static_cast<Lane*>(data[lane]));
}

enum Shuffle { INDEX, UP, DOWN, XOR };

template <class T>
inline T shuffle(Shuffle mode, const char* what, int line, unsigned mask, T value, int operand, unsigned width = WARP) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
    const unsigned lane = current->lane, first = lane & ~(width - 1), last = first + width - 1;
    unsigned source = mode == INDEX  ? (first | (operand & (width - 1)))
                      : mode == UP   ? lane - operand
                      : mode == DOWN ? lane + operand
                                     : lane ^ operand;
    if (mode == UP ? static_cast<int>(source) < static_cast<int>(first) : source > last) source = lane;
    Lane l = {0, 0, source};
    memcpy(&l.in, &value, sizeof(T));
    meet(mask, what, line, &l, [](void* const* data, unsigned m) {
        each(data, m, [&](unsigned reader, Lane& to) {
            if (!(m >> to.source & 1)) fail("shuffle: lane %u reads lane %u, outside the mask %08x", reader, to.source, m);
            to.out = static_cast<Lane*>(data[to.source])->in;
        });
    });
    memcpy(&value, &l.out, sizeof(T));
    return value;
}

inline unsigned ballot(const char* what, int line, unsigned mask, bool predicate) {
    Lane l = {predicate, 0, 0};
    meet(mask, what, line, &l, [](void* const* data, unsigned m) {
        unsigned votes = 0;
        each(data, m, [&](unsigned lane, Lane& from) { votes |= static_cast<unsigned>(from.in) << lane; });
        each(data, m, [&](unsigned, Lane& to) { to.out = votes; });
    });
    return static_cast<unsigned>(l.out);
}

template <class T>
inline unsigned match_any(const char* what, int line, unsigned mask, T value) {
    Lane l = {0, 0, 0};
    memcpy(&l.in, &value, sizeof(T));
    meet(mask, what, line, &l, [](void* const* data, unsigned m) {
        each(data, m, [&](unsigned, Lane& to) {
            to.out = 0;
            each(data, m, [&](unsigned lane, Lane& from) { to.out |= static_cast<unsigned>(from.in == to.in) << lane; });
        });
    });
    return static_cast<unsigned>(l.out);
}

// ---- 16-bit floats, by CUDA's own rounding
inline unsigned short bf16_bits(float v) { return __bfloat16_as_ushort(__float2bfloat16_rn(v)); }
inline unsigned short f16_bits(float v) { return __half_as_ushort(__float2half_rn(v)); }
inline float float_from_f16(unsigned short bits) { return __half2float(__ushort_as_half(bits)); }
inline float float_from_bf16(unsigned short bits) { return __bfloat162float(__ushort_as_bfloat16(bits)); }
// cvt.rna: to nearest, ties away from zero; a carry into the exponent is right, up to infinity.
inline float tf32(float v) {
    unsigned bits;
    memcpy(&bits, &v, 4);
    if (std::isfinite(v)) bits = (bits + 0x1000u) & ~0x1fffu;
    memcpy(&v, &bits, 4);
    return v;
}

// ---- tensor cores: fragments as ptx.cuh describes them
struct Fragments {
    float* c;
    unsigned a[4], b[2];
};

// C[16][8] += A[16][K] B[K][8], summed in double: the products are exact there.
template <int K>
__attribute__((optimize("O3"))) inline void multiply(void* const* data, const float (&a)[16][K], const float (&b)[K][8]) {
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
inline void mma_m16n8k16(const char* what, float* c, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                         unsigned b1) {
    Fragments fragments = {c, {a0, a1, a2, a3}, {b0, b1}};
    meet(~0u, what, 0, &fragments, [](void* const* data, unsigned) {
        float a[16][16], b[16][8];
        for (unsigned lane = 0; lane < WARP; ++lane) {
            const Fragments& f = *static_cast<Fragments*>(data[lane]);
            for (unsigned i = 0; i < 8; ++i)
                a[lane / 4 + i / 2 % 2 * 8][lane % 4 * 2 + i % 2 + i / 4 * 8] = TO_FLOAT(f.a[i / 2] >> i % 2 * 16);
            for (unsigned i = 0; i < 4; ++i) b[lane % 4 * 2 + i % 2 + i / 2 * 8][lane / 4] = TO_FLOAT(f.b[i / 2] >> i % 2 * 16);
        }
        multiply(data, a, b);
    });
}
constexpr auto mma_m16n8k16_bf16 = [](auto... v) { mma_m16n8k16<float_from_bf16>("mma bf16", v...); };
constexpr auto mma_m16n8k16_f16 = [](auto... v) { mma_m16n8k16<float_from_f16>("mma f16", v...); };

inline void mma_m16n8k8_tf32(float* c, float a0, float a1, float a2, float a3, float b0, float b1) {
    const float in[6] = {a0, a1, a2, a3, b0, b1};
    Fragments fragments = {c, {}, {}};
    memcpy(fragments.a, in, 16);
    memcpy(fragments.b, in + 4, 8);
    meet(~0u, "mma tf32", 0, &fragments, [](void* const* data, unsigned) {
        const auto value = [](unsigned bits) {
            float v;
            bits &= ~0x1fffu;  // the tensor core does not look at them
            memcpy(&v, &bits, 4);
            return v;
        };
        float a[16][8], b[8][8];
        for (unsigned lane = 0; lane < WARP; ++lane) {
            const Fragments& f = *static_cast<Fragments*>(data[lane]);
            for (unsigned i = 0; i < 4; ++i) a[lane / 4 + i % 2 * 8][lane % 4 + i / 2 * 4] = value(f.a[i]);
            for (unsigned i = 0; i < 2; ++i) b[lane % 4 + i * 4][lane / 4] = value(f.b[i]);
        }
        multiply(data, a, b);
    });
}

// ---- shared memory
inline unsigned char* dynamic_shared() { return current->block->shared; }

inline Block& owner_of(const void* p, size_t size, const char* what) {
    const auto at = static_cast<const unsigned char*>(p);
    for (Block& b : blocks)
        if (at >= b.shared && at + size <= b.shared + config.shared) {
            if (reinterpret_cast<uintptr_t>(at) % size) fail("%s: shared address %p is not a multiple of %zu", what, p, size);
            if (b.exited == b.fibers.size()) fail("%s: block (%u, %u, %u) has exited", what, b.index.x, b.index.y, b.index.z);
            return b;
        }
    fail("%s: %p is not in the shared memory of this %s", what, p, blocks.size() > 1 ? "cluster" : "block");
}

inline void own(const void* p, size_t size, const char* what) {
    if (&owner_of(p, size, what) != current->block) fail("%s: %p is in the shared memory of another block", what, p);
}

// ---- cp.async
inline void copy_async(void* shared, const void* global, unsigned size, unsigned bytes) {
    own(shared, size, "cp.async");
    if (bytes && reinterpret_cast<uintptr_t>(global) % size) fail("cp.async: global address %p is not a multiple of %u", global, size);
    *config.used_async = 1;
    unsigned char now[16] = {};
    memcpy(now, global, bytes);  // an illegal address faults here, not where the copy lands
    if (config.early) memcpy(shared, now, size);
    else current->copies.push_back({shared, global, size, bytes, current->group});
}
inline void copy_async_commit() { ++current->group; }
inline void land(Fiber& f, unsigned groups) {
    size_t kept = 0;
    for (const Copy& c : f.copies)
        if (c.group >= groups) f.copies[kept++] = c;
        else memset(c.to, 0, c.size), memcpy(c.to, c.from, c.bytes);
    f.copies.resize(kept);
}
inline void copy_async_wait(unsigned allowed) {
    if (current->group > allowed) land(*current, current->group - allowed);
}

// ---- mbarriers: the state is kept here; the 8 bytes hold a mark that a stray store would destroy
inline unsigned long long mark(const void* p) { return 0x6d62617272696572ull ^ reinterpret_cast<uintptr_t>(p); }

inline Mbarrier& mbarrier_at(const void* p, const char* what) {
    for (Mbarrier& m : owner_of(p, 8, what).mbarriers)
        if (m.at == p) {
            const auto expected = mark(p);
            if (memcmp(p, &expected, 8) != 0) fail("%s: the mbarrier at %p was overwritten", what, p);
            return m;
        }
    fail("%s: no mbarrier was initialised at %p", what, p);
}
inline void mbarrier_init(void* p, unsigned count) {
    own(p, 8, "mbarrier_init");
    const auto value = mark(p);
    memcpy(p, &value, 8);
    auto& all = current->block->mbarriers;
    for (size_t i = all.size(); i--;)
        if (all[i].at == p) all.erase(all.begin() + static_cast<long>(i));
    all.push_back({static_cast<unsigned char*>(p), static_cast<int>(count), static_cast<int>(count), 0, 0});
}
inline void mbarrier_update(void* p, int arrivals, int bytes, const char* what) {
    Mbarrier& m = mbarrier_at(p, what);
    m.pending -= arrivals, m.tx += bytes;
    if (m.pending < 0) fail("%s: more arrivals than the mbarrier's %d", what, m.count);
    if (m.pending || m.tx) return;
    m.pending = m.count, ++m.phase;
    for (Fiber& f : owner_of(p, 8, what).fibers)
        if (f.wait == IN_MBARRIER && f.mbarrier == p && f.parity != (m.phase & 1)) wake(f);
}
inline void mbarrier_expect(void* p, unsigned bytes) {
    own(p, 8, "mbarrier_expect");
    mbarrier_at(p, "mbarrier_expect").tx += static_cast<int>(bytes);
    mbarrier_update(p, 1, 0, "mbarrier_expect");
}
inline void mbarrier_wait(const void* p, unsigned parity) {
    own(p, 8, "mbarrier_wait");
    if ((mbarrier_at(p, "mbarrier_wait").phase & 1) != parity) return;
    current->mbarrier = p, current->parity = parity;
    park(IN_MBARRIER, "mbarrier_wait");
}

// ---- clusters
inline void release_cluster() {
    size_t threads = 0;
    for (Block& b : blocks) threads += b.fibers.size();
    if (cluster_arrived == 0 || cluster_arrived + cluster_exited < threads) return;
    cluster_arrived = 0, ++cluster_phase, restart = true;
    for (Block& b : blocks)
        for (Fiber& f : b.fibers)
            if (f.wait == IN_CLUSTER) wake(f);
}
inline void cluster_arrive() {
    if (current->cluster_arrived) fail("cluster_arrive: twice without cluster_wait");
    current->cluster_arrived = true, current->cluster_phase = cluster_phase;
    ++cluster_arrived;
    release_cluster();
}
inline void cluster_wait() {
    if (!current->cluster_arrived) fail("cluster_wait: without cluster_arrive");
    if (cluster_phase == current->cluster_phase) park(IN_CLUSTER, "cluster_wait");
    current->cluster_arrived = false;
}
inline unsigned long long map_shared(const void* p, unsigned rank) {
    own(p, 1, "map_shared");
    if (rank >= blocks.size()) fail("map_shared: block %u of a cluster of %zu", rank, blocks.size());
    return reinterpret_cast<uintptr_t>(blocks[rank].shared + (static_cast<const unsigned char*>(p) - current->block->shared));
}
inline void deliver(const Store& s) {
    owner_of(s.to, s.size, "store_async");
    memcpy(s.to, s.bytes, s.size);
    mbarrier_update(s.barrier, 0, -static_cast<int>(s.size), "store_async");
}
inline void store_async(unsigned long long to, const void* value, unsigned size, unsigned long long barrier) {
    Store s = {reinterpret_cast<unsigned char*>(to), reinterpret_cast<unsigned char*>(barrier), {}, size};
    memcpy(s.bytes, value, size);
    if (&owner_of(s.to, size, "store_async") != &owner_of(s.barrier, 8, "store_async"))
        fail("store_async: the data and its mbarrier are in different blocks");
    *config.used_async = 1;
    if (config.early) deliver(s);
    else stores.push_back(s);
}
// Nobody can go on: what a waiting mbarrier still needs has to land now.
inline bool deliver_awaited() {
    std::vector<Store> all;
    all.swap(stores);
    bool any = false;
    for (const Store& s : all) {
        bool awaited = false;
        for (Block& b : blocks)
            for (Fiber& f : b.fibers) awaited |= f.wait == IN_MBARRIER && f.mbarrier == s.barrier;
        if (awaited) deliver(s), any = true;
        else stores.push_back(s);
    }
    return any;
}

// ---- the scheduler
inline void exit_thread() {
    Fiber& f = *current;
    land(f, ~0u);
    f.wait = EXITED;
    Warp& w = *f.warp;
    w.exited |= 1u << f.lane;
    for (const Meeting& m : w.meetings)
        if (m.arrived && (m.mask >> f.lane & 1))
            fail("lane %u exits while lanes %08x wait for it in %s (line %d)", f.lane, m.arrived, m.what, m.line);
    ++f.block->exited, ++cluster_exited;
    release_block(*f.block);
    release_cluster();
    park(EXITED, "exited");
}

inline void report_stuck() {
    current = nullptr;
    snprintf(config.message, config.message_size, "stuck:");
    std::string before;
    for (Block& b : blocks)
        for (Fiber& f : b.fibers) {
            if (f.wait == EXITED) continue;
            const std::string here = std::string(f.wait == IN_WARP ? f.what : WAIT_NAMES[f.wait]) + " " + trace(f.frame);
            if (here != before) say("\n  from %s on: waiting in %s", thread_name(f).c_str(), here.c_str());
            before = here;
        }
    siglongjmp(escape, 1);
}

// True where the thread order of this run comes to `i` in step `step` of `n`.
inline unsigned turn(unsigned step, unsigned n) { return config.descending ? n - 1 - step : step; }

inline void run_cluster(unsigned first, unsigned y, unsigned z) {
    const unsigned warps = (config.block + WARP - 1) / WARP;
    cluster_arrived = cluster_exited = cluster_phase = 0;
    stores.clear();
    for (unsigned rank = 0; rank < blocks.size(); ++rank) {
        Block& b = blocks[rank];
        b.index = {first + rank, y, z}, b.arrived = b.exited = 0;
        b.mbarriers.clear();
        b.warps.assign(warps, Warp());
        for (unsigned tid = 0; tid < config.block; ++tid) {
            Fiber& f = b.fibers[tid];
            f.tid = tid, f.lane = tid % WARP, f.block = &b, f.warp = &b.warps[tid / WARP];
            f.group = 0, f.cluster_arrived = false;
            f.copies.clear();
            if (f.lane == 0) f.warp->fibers = &f;
            wake(f);
            prepare(f, config.stacks + (static_cast<size_t>(rank) * config.block + tid) * STACK);
        }
        if (config.block % WARP) b.warps.back().exited = ~0u << config.block % WARP;
        memset(b.pages, static_cast<int>(config.poison), b.shared + (config.shared + ALIGN - 1) / ALIGN * ALIGN - b.pages);
    }
    const unsigned threads = static_cast<unsigned>(blocks.size()) * config.block;
    while (cluster_exited < threads) {
        bool any = restart = false;
        for (unsigned i = 0; i < blocks.size() * warps && !restart; ++i) {
            const unsigned j = turn(i, static_cast<unsigned>(blocks.size()) * warps);
            Warp& w = blocks[j / warps].warps[j % warps];
            while (w.ready && !restart) {
                any = true;
                current = w.fibers + (config.descending ? 31 - __builtin_clz(w.ready) : __builtin_ctz(w.ready));
                threadIdx.x = current->tid, blockIdx = current->block->index;
                enter(*current);
                current = nullptr;
            }
        }
        if (!any && !deliver_awaited()) report_stuck();
    }
    if (!stores.empty()) fail("store_async: %zu stores were still under way when the cluster exited", stores.size());
    for (Block& b : blocks) {
        const auto check = [&](const unsigned char* p, const unsigned char* end) {
            for (; p < end; ++p)
                if (*p != config.poison)
                    fail("block (%u, %u, %u) wrote outside its %u bytes of shared memory, at byte %ld", b.index.x, b.index.y,
                         b.index.z, config.shared, static_cast<long>(p - b.shared));
        };
        check(b.pages, b.shared);
        check(b.shared + config.shared, b.shared + (config.shared + ALIGN - 1) / ALIGN * ALIGN);
    }
}

inline void run_grid() {
    const size_t pages = (config.shared + PAGE - 1) / PAGE * PAGE + PAGE;  // one page at least ahead of the data
    const size_t slot = pages + PAGE;                                     // and one without access behind it
    const size_t fibers = static_cast<size_t>(config.cluster) * config.block;
    auto* const memory = static_cast<unsigned char*>(
        mmap(nullptr, slot * config.cluster, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    for (; *config.stacks_mapped < fibers; ++*config.stacks_mapped)  // the lowest page of each stays without access
        mprotect(config.stacks + *config.stacks_mapped * STACK + PAGE, STACK - PAGE, PROT_READ | PROT_WRITE);
    blocks.assign(config.cluster, Block());
    for (unsigned rank = 0; rank < config.cluster; ++rank) {
        Block& b = blocks[rank];
        b.pages = memory + rank * slot;
        b.shared = b.pages + pages - (config.shared + ALIGN - 1) / ALIGN * ALIGN;
        mprotect(b.pages + pages, PAGE, PROT_NONE);
        b.fibers.resize(config.block);
    }
    if (sigsetjmp(escape, 1) == 0) {
        const unsigned clusters = config.grid[0] / config.cluster, n = clusters * config.grid[1] * config.grid[2];
        for (unsigned i = 0; i < n; ++i) {
            const unsigned j = turn(i, n);
            run_cluster(j % clusters * config.cluster, j / clusters % config.grid[1], j / clusters / config.grid[1]);
        }
    }
    current = nullptr;
    munmap(memory, slot * config.cluster);
}

inline void launch() {
    static char alternate[64 << 10];
    const int signals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGVTALRM};
    struct sigaction action = {}, before[5];
    stack_t stack = {}, stack_before;
    itimerval limit = {}, none = {};
    stack.ss_sp = alternate, stack.ss_size = sizeof alternate;
    action.sa_sigaction = on_signal, action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    limit.it_value.tv_sec = config.seconds;
    on_signal(0, nullptr, nullptr);
    sigaltstack(&stack, &stack_before);
    for (int i = 0; i < 5; ++i) sigaction(signals[i], &action, &before[i]);
    setitimer(ITIMER_VIRTUAL, &limit, nullptr);
    gridDim = dim3(config.grid[0], config.grid[1], config.grid[2]), blockDim = dim3(config.block);
    run_grid();
    setitimer(ITIMER_VIRTUAL, &none, nullptr);
    for (int i = 0; i < 5; ++i) sigaction(signals[i], &before[i], nullptr);
    sigaltstack(&stack_before, nullptr);
}

// ---- a kernel and its parameters
template <class T>
inline std::string type_code() {
    using V = std::remove_cv_t<T>;
    const char kind = std::is_pointer_v<V>          ? 'p'
                      : std::is_floating_point_v<V> ? 'f'
                      : std::is_same_v<V, bool>     ? 'b'
                      : std::is_class_v<V>          ? 'V'
                      : std::is_signed_v<V>         ? 'i'
                                                    : 'u';
    return kind + std::to_string(sizeof(V)) + ",";
}
static void* const* arguments;

template <auto KERNEL>
struct Entry;
template <class... P, void (*KERNEL)(P...)>
struct Entry<KERNEL> {
    static std::string signature() { return (std::string() + ... + type_code<P>()); }
    template <size_t... I>
    static void call(std::index_sequence<I...>) {
        KERNEL(*static_cast<std::remove_reference_t<P>*>(arguments[I])...);
    }
    static void thread() {
        call(std::index_sequence_for<P...>());
        exit_thread();
    }
};

}  // namespace simt

#define SIMT_KERNEL(kernel)                                                                \
    extern "C" const char* simt_signature() {                                              \
        static const std::string text = simt::Entry<kernel>::signature();                  \
        return text.c_str();                                                               \
    }                                                                                      \
    extern "C" void simt_launch(const simt::Config* config, void* const* arguments) {      \
        simt::config = *config, simt::arguments = arguments;                               \
        simt::entry = simt::Entry<kernel>::thread;                                         \
        simt::launch();                                                                    \
    }

// ---- CUDA's built-in functions
#define __syncthreads() simt::syncthreads(__FILE__, __LINE__)
#define SIMT_MASK_(mask, ...) mask
#define __syncwarp(...) simt::meet(SIMT_MASK_(__VA_ARGS__ __VA_OPT__(, ) ~0u), "__syncwarp", __LINE__, nullptr, nullptr)
#define __shfl_sync(...) simt::shuffle(simt::INDEX, "__shfl_sync", __LINE__, __VA_ARGS__)
#define __shfl_up_sync(...) simt::shuffle(simt::UP, "__shfl_up_sync", __LINE__, __VA_ARGS__)
#define __shfl_down_sync(...) simt::shuffle(simt::DOWN, "__shfl_down_sync", __LINE__, __VA_ARGS__)
#define __shfl_xor_sync(...) simt::shuffle(simt::XOR, "__shfl_xor_sync", __LINE__, __VA_ARGS__)
#define __ballot_sync(mask, p) simt::ballot("__ballot_sync", __LINE__, mask, p)
#define __any_sync(mask, p) (simt::ballot("__any_sync", __LINE__, mask, p) != 0)
#define __all_sync(mask, p) (simt::ballot("__all_sync", __LINE__, mask, !(p)) == 0)
#define __match_any_sync(mask, v) simt::match_any("__match_any_sync", __LINE__, mask, v)

template <class To, class From>
inline To simt_bits(From v) {
    To to;
    memcpy(&to, &v, sizeof(To));
    return to;
}
#define __float_as_uint(v) simt_bits<unsigned>(static_cast<float>(v))
#define __uint_as_float(v) simt_bits<float>(static_cast<unsigned>(v))
#define __float_as_int(v) simt_bits<int>(static_cast<float>(v))
#define __int_as_float(v) simt_bits<float>(static_cast<int>(v))
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v ? __builtin_clz(static_cast<unsigned>(v)) : 32; }
inline float rsqrtf(float v) { return 1.f / std::sqrt(v); }
template <class T>
inline T min(T a, T b) {
    return b < a ? b : a;
}
template <class T>
inline T max(T a, T b) {
    return a < b ? b : a;
}
template <class T>
inline T atomicAdd(T* p, std::common_type_t<T> v) {
    const T before = *p;
    *p = static_cast<T>(before + v);
    return before;
}
template <class T>
inline T atomicMax(T* p, std::common_type_t<T> v) {
    const T before = *p;
    *p = before < v ? v : before;
    return before;
}
template <class T>
inline T atomicMin(T* p, std::common_type_t<T> v) {
    const T before = *p;
    *p = v < before ? v : before;
    return before;
}
