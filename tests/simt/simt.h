// What a kernel source sees instead of CUDA when it is compiled for the CPU (CUPY_LORA_SIMT): the
// built-in functions and variables, and the CPU bodies that cuda_src/ptx.cuh calls. The engine (engine/)
// has the threads, blocks and clusters behind them.
#pragma once

#include <vector_functions.h>

#include <cmath>
#include <cstddef>
#include <cstring>
#include <string>
#include <type_traits>
#include <utility>

#define SIMT_API __attribute__((visibility("default")))
#define __launch_bounds__(...)
#define __noinline__ __attribute__((noinline))

namespace simt {

extern SIMT_API uint3 threadIdx, blockIdx;
extern SIMT_API dim3 blockDim, gridDim;

constexpr unsigned WARP = 32;

// Reports an error of the running thread; the launch ends.
[[noreturn]] SIMT_API void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

SIMT_API void syncthreads(const char* file, int line);
SIMT_API unsigned char* dynamic_shared();
SIMT_API void atomic_access(const void* p, size_t size);

// Waits until every lane of the mask has come to the same operation on the same line; the last one
// computes what all of them get.
using Complete = void (*)(void* const* data, unsigned mask);
SIMT_API void meet(unsigned mask, const char* what, int line, void* data, Complete complete);

// ---- behind ptx.cuh and ptx_wgmma.cuh
SIMT_API unsigned short bf16_bits(float v);
SIMT_API unsigned short f16_bits(float v);
SIMT_API float float_from_f16(unsigned short bits);
SIMT_API float tf32(float v);
SIMT_API void mma_m16n8k16_bf16(float* c, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1);
SIMT_API void mma_m16n8k16_f16(float* c, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1);
SIMT_API void mma_m16n8k8_tf32(float* c, float a0, float a1, float a2, float a3, float b0, float b1);
SIMT_API void copy_async(void* shared, const void* global, unsigned size, unsigned bytes);
SIMT_API void copy_async_commit();
SIMT_API void copy_async_wait(unsigned allowed);
SIMT_API void copy_async_arrive(void* barrier);
SIMT_API void copy_bulk(void* shared, const void* global, unsigned size, void* barrier);
SIMT_API void cluster_arrive();
SIMT_API void cluster_wait();
SIMT_API unsigned long long map_shared(const void* p, unsigned rank);
SIMT_API void store_async(unsigned long long to, const void* value, unsigned size, unsigned long long barrier);
SIMT_API void mbarrier_init(void* p, unsigned count);
SIMT_API void mbarrier_expect(void* p, unsigned bytes);
SIMT_API void mbarrier_wait(const void* p, unsigned parity);
SIMT_API void proxy_fence();
SIMT_API unsigned shared_address(const void* p);
SIMT_API void named_barrier(int number, int threads, bool waits);
SIMT_API void wgmma_fence(int line);
SIMT_API void wgmma_commit(int line);
SIMT_API void wgmma_wait(unsigned allowed, int line);
SIMT_API void wgmma(float* c, int eights, const unsigned* a, unsigned long long a_matrix, unsigned long long b_matrix,
                    bool add, bool is_bf16, int line);

// ---- shuffles and votes
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
inline T shuffle(Shuffle mode, const char* what, int line, unsigned mask, T value, int operand, int width = WARP) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
    const int lane = threadIdx.x % WARP, first = lane & ~(width - 1), last = first + width - 1;
    int source = mode == INDEX  ? first | (operand & (width - 1))
                 : mode == UP   ? lane - operand
                 : mode == DOWN ? lane + operand
                                : lane ^ operand;
    if (mode == UP ? source < first : source > last) source = lane;
    Lane l = {0, 0, static_cast<unsigned>(source)};
    memcpy(&l.in, &value, sizeof(T));
    meet(mask, what, line, &l, [](void* const* data, unsigned m) {
        each(data, m, [&](unsigned lane, Lane& to) {
            if (!(m >> to.source & 1)) fail("shuffle: lane %u reads lane %u, not in the mask %08x", lane, to.source, m);
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
            each(data, m, [&](unsigned lane, Lane& from) { to.out |= (from.in == to.in ? 1u : 0u) << lane; });
        });
    });
    return static_cast<unsigned>(l.out);
}

// ldmatrix: each lane passes one row of 16 bytes and gets two neighbours of each of the four matrices.
inline void load_matrices(unsigned (&r)[4], const void* row, bool transposed, int line) {
    struct Part {
        const unsigned short* row;
        unsigned out[4];
        bool transposed;
    } part = {static_cast<const unsigned short*>(row), {}, transposed};
    if (reinterpret_cast<size_t>(row) % 16) fail("ldmatrix: address %p is not 16-byte aligned", row);
    meet(~0u, "ldmatrix", line, &part, [](void* const* data, unsigned) {
        for (unsigned lane = 0; lane < WARP; ++lane) {
            Part& to = *static_cast<Part*>(data[lane]);
            for (unsigned i = 0; i < 4; ++i) {
                const auto at = [&](unsigned line, unsigned column) {
                    return static_cast<unsigned>(static_cast<Part*>(data[8 * i + line])->row[column]);
                };
                const unsigned g = lane / 4, t = lane % 4 * 2;
                to.out[i] = to.transposed ? at(t, g) | at(t + 1, g) << 16 : at(g, t) | at(g, t + 1) << 16;
            }
        }
    });
    for (int i = 0; i < 4; ++i) r[i] = part.out[i];
}

inline void syncwarp(int line, unsigned mask = ~0u) { meet(mask, "__syncwarp", line, nullptr, nullptr); }

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
    return kind + std::to_string(sizeof(V)) + " ";
}

template <auto KERNEL>
struct Entry;
template <class... P, void (*KERNEL)(P...)>
struct Entry<KERNEL> {
    static std::string signature() { return (std::string() + ... + type_code<P>()); }
    template <size_t... I>
    static void call([[maybe_unused]] void* const* arguments, std::index_sequence<I...>) {
        KERNEL(*static_cast<std::remove_reference_t<P>*>(arguments[I])...);
    }
    static void run(void* const* arguments) { call(arguments, std::index_sequence_for<P...>()); }
};

}  // namespace simt

// One line a library: what runner.py looks up in it.
#define SIMT_KERNEL(kernel)                                               \
    extern "C" SIMT_API const char* simt_signature() {                    \
        static const std::string text = simt::Entry<kernel>::signature(); \
        return text.c_str();                                              \
    }                                                                     \
    extern "C" SIMT_API void simt_thread(void* const* arguments) { simt::Entry<kernel>::run(arguments); }

// ---- CUDA's names
using simt::blockDim;
using simt::blockIdx;
using simt::gridDim;
using simt::threadIdx;

#define __syncthreads() simt::syncthreads(__FILE__, __LINE__)
#define __syncwarp(...) simt::syncwarp(__LINE__ __VA_OPT__(, ) __VA_ARGS__)
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
    static_assert(sizeof(To) == sizeof(From), "as many bits");
    To to;
    memcpy(&to, &v, sizeof(To));
    return to;
}
inline unsigned __float_as_uint(float v) { return simt_bits<unsigned>(v); }
inline float __uint_as_float(unsigned v) { return simt_bits<float>(v); }
inline int __float_as_int(float v) { return simt_bits<int>(v); }
inline float __int_as_float(int v) { return simt_bits<float>(v); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v ? __builtin_clz(static_cast<unsigned>(v)) : 32; }
inline float __fdividef(float a, float b) { return a / b; }
inline void sincospif(float v, float* s, float* c) {
    const double pi = 3.14159265358979323846;
    *s = static_cast<float>(std::sin(pi * v));
    *c = static_cast<float>(std::cos(pi * v));
}
inline float rsqrtf(float v) { return 1.f / std::sqrt(v); }
template <class T>
inline T __ldg(const T* p) {
    return *p;
}
template <class T>
inline T min(T a, T b) {
    return b < a ? b : a;
}
template <class T>
inline T max(T a, T b) {
    return a < b ? b : a;
}
template <class T>
__attribute__((no_sanitize("thread"))) inline T atomicAdd(T* p, std::common_type_t<T> v) {
    static_assert(std::is_integral_v<T>, "float atomics are not reproducible");
    simt::atomic_access(p, sizeof(T));
    const T before = *p;
    *p = static_cast<T>(before + v);
    return before;
}
