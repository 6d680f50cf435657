// 16 bytes in registers, and their loads and stores where rows start at multiples of less than 16 bytes.
#pragma once
#include "common.cuh"

union Vector {
    uint4 quad;
    uint2 pairs[2];
    u32 words[4];
    u16 halves[8];
};

// The 16 bytes at an address that is a multiple of A, by accesses of A bytes.
template <int A>
CUPY_LORA_DEVICE Vector load_16(const void* p) {
    Vector v;
    if constexpr (A == 16) {
        v.quad = *static_cast<const uint4*>(p);
    } else if constexpr (A == 8) {
#pragma unroll
        for (int i = 0; i < 2; ++i) v.pairs[i] = static_cast<const uint2*>(p)[i];
    } else if constexpr (A == 4) {
#pragma unroll
        for (int i = 0; i < 4; ++i) v.words[i] = static_cast<const u32*>(p)[i];
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) v.halves[i] = static_cast<const u16*>(p)[i];
    }
    return v;
}

template <int A>
CUPY_LORA_DEVICE void store_16(void* p, const Vector& v) {
    if constexpr (A == 16) {
        *static_cast<uint4*>(p) = v.quad;
    } else if constexpr (A == 8) {
#pragma unroll
        for (int i = 0; i < 2; ++i) static_cast<uint2*>(p)[i] = v.pairs[i];
    } else if constexpr (A == 4) {
#pragma unroll
        for (int i = 0; i < 4; ++i) static_cast<u32*>(p)[i] = v.words[i];
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) static_cast<u16*>(p)[i] = v.halves[i];
    }
}
