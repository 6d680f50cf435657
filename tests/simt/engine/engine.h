// What the parts of the engine share: a launch, its blocks, warps and threads, and what is under way between them.
#pragma once

#include <pthread.h>
#include <ucontext.h>

#include <csetjmp>
#include <csignal>
#include <cstdint>
#include <list>
#include <utility>
#include <vector>

#include "simt.h"

namespace simt {

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

extern Config* config;
extern std::vector<Block> blocks;  // of the cluster that runs
extern std::vector<Store> stores;  // under way
extern Fiber* current;
extern unsigned threads, cluster_arrived, cluster_exited, cluster_phase;
extern bool restart;           // a barrier opened: begin again with the first thread
extern uint64_t now;           // counts barriers, from launch to launch
extern unsigned watched;       // bytes of shared memory whose accesses are checked: all or none
extern unsigned char* shared;  // of the running thread's block
extern sigjmp_buf escape;
extern pthread_t owner;

// ---- reports.cpp
[[noreturn]] void stop(const std::string& message);
[[noreturn]] void report_stuck();
void on_signal(int signal, siginfo_t* info, void* context);

// ---- fibers.cpp
char* stack_of(size_t i);
void prepare(Fiber& f);  // to begin with fiber_main
void enter(Fiber& f);    // runs it until it waits
void wake(Fiber& f);
void park(Wait wait, const char* what);

// ---- launch.cpp
void fiber_main();

// ---- barriers.cpp
void open_block(Block& b);
void open_cluster();
Mbarrier& mbarrier_at(const void* p, const char* what);
void mbarrier_update(void* p, int arrivals, int bytes, const char* what);

// ---- shared_memory.cpp
Block& owner_of(const void* p, size_t size, const char* what);
void own(const void* p, size_t size, const char* what);
void learn(Times& to, const Times& from);
void tell_times(Times& told);
void tell(Mbarrier& m);
void meet_memory(Warp& w, unsigned mask);
void access(const void* p, size_t size, bool writes, bool atomic = false);

// ---- products.cpp
float float_from_bf16(unsigned short bits);

// ---- warpgroups.cpp
void check_products(const Block& b);

// ---- copies.cpp
void land(Fiber& f, unsigned groups);
bool deliver_awaited();

}  // namespace simt
