// What a GPU does some time later: cp.async, bulk copies, stores to a cluster's other blocks.
#include <algorithm>

#include "engine.h"

namespace simt {

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
void land(Fiber& f, unsigned groups) {
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

// ---- to an mbarrier
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
bool deliver_awaited() {
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

}  // namespace simt
