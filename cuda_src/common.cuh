// Shared by every kernel: element types, 16-byte vectors, conversions, the shared-memory macro.
//
// The same sources compile for the GPU (NVRTC) and, with CUPY_LORA_SIMT defined, as C++ for the
// CPU runner of the tests, which supplies threadIdx, __syncthreads, shuffles and the like.
#pragma once

#ifdef CUPY_LORA_SIMT
#include "simt.h"
#define CUPY_LORA_SHARED(name) unsigned char* const name = simt::dynamic_shared()
#define CUPY_LORA_CLUSTER(c)
#else
// All shared memory is dynamic and comes through this macro, once per kernel, 128-byte aligned.
#define CUPY_LORA_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
// Before __launch_bounds__: blocks per cluster along x (only on kernels with clusters, sm_90 on).
#define CUPY_LORA_CLUSTER(c) __cluster_dims__(c, 1, 1)
#endif

#define CUPY_LORA_DEVICE __device__ __forceinline__
// One of several large bodies behind a branch: as a call, none of them costs the others registers.
#define CUPY_LORA_DEVICE_CALL __device__ __noinline__

using i32 = int;
using i64 = long long;
using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

// 16-bit floats as bits: no CUDA header is included (they cost NVRTC up to a second per compile).
struct bf16 {
    u16 bits;
};
struct f16 {
    u16 bits;
};

#include "ptx.cuh"
#include "ptx_barriers.cuh"

constexpr CUPY_LORA_DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

// ---- one element to and from float (round to nearest even)
CUPY_LORA_DEVICE float to_float(float v) { return v; }
CUPY_LORA_DEVICE float to_float(bf16 v) { return __uint_as_float(static_cast<u32>(v.bits) << 16); }
CUPY_LORA_DEVICE float to_float(f16 v) { return ptx::float_from_f16(v.bits); }

template <class T>
CUPY_LORA_DEVICE T from_float(float v);
template <>
CUPY_LORA_DEVICE float from_float<float>(float v) {
    return v;
}
template <>
CUPY_LORA_DEVICE bf16 from_float<bf16>(float v) {
    return bf16{static_cast<u16>(ptx::bf16x2_from_floats(v, 0.f) & 0xffffu)};
}
template <>
CUPY_LORA_DEVICE f16 from_float<f16>(float v) {
    return f16{static_cast<u16>(ptx::f16x2_from_floats(v, 0.f) & 0xffffu)};
}

// ---- two elements in one 32-bit word, the first in the low half
CUPY_LORA_DEVICE void unpack2(u32 word, float& low, float& high, bf16) {
    low = __uint_as_float(word << 16);
    high = __uint_as_float(word & 0xffff0000u);
}
CUPY_LORA_DEVICE void unpack2(u32 word, float& low, float& high, f16) {
    low = ptx::float_from_f16(static_cast<u16>(word));
    high = ptx::float_from_f16(static_cast<u16>(word >> 16));
}
CUPY_LORA_DEVICE u32 pack2(float low, float high, bf16) { return ptx::bf16x2_from_floats(low, high); }
CUPY_LORA_DEVICE u32 pack2(float low, float high, f16) { return ptx::f16x2_from_floats(low, high); }

// N elements of T moved by one access; N * sizeof(T) is 1 to 16 bytes and a power of two.
template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
    T v[N];
};
