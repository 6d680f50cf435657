// What mutants.py builds into every kernel: one of its numbered places behaves otherwise, which one says a file
// that the process and its kernels share.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>

#include <cstdlib>

namespace simt {

struct Mutants {
    unsigned active;
    unsigned char reached[8192];
};

inline Mutants& mutants() {
    static Mutants none = {~0u, {}};
    const char* const path = std::getenv("CUPY_LORA_SIMT_MUTANTS");
    void* const p =
        path ? mmap(nullptr, sizeof(Mutants), PROT_READ | PROT_WRITE, MAP_SHARED, open(path, O_RDWR), 0) : MAP_FAILED;
    return p == MAP_FAILED ? none : *static_cast<Mutants*>(p);
}
inline Mutants& shared_mutants = mutants();  // when the kernel is loaded

inline bool mutated(unsigned number) {
    shared_mutants.reached[number] = 1;
    return shared_mutants.active == number;
}

// `a < b` as `a < Bound{number} < b`, which binds as before.
struct Bound {
    unsigned number;
};
template <class A>
struct Bounded {
    A a;
    unsigned number;
};
template <class A>
__attribute__((always_inline)) constexpr Bounded<A> operator<(A a, Bound at) {
    return {a, at.number};
}
template <class A, class B>
__attribute__((always_inline)) constexpr bool operator<(Bounded<A> left, B b) {
    if (!__builtin_is_constant_evaluated() && mutated(left.number)) return left.a <= b;
    return left.a < b;
}

}  // namespace simt
