// Floats of 16 and 19 bits, and the tensor core's products.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "engine.h"

namespace simt {

// ---- 16-bit floats, by CUDA's own rounding
unsigned short bf16_bits(float v) { return __bfloat16_as_ushort(__float2bfloat16_rn(v)); }
unsigned short f16_bits(float v) { return __half_as_ushort(__float2half_rn(v)); }
float float_from_f16(unsigned short bits) { return __half2float(__ushort_as_half(bits)); }
float float_from_bf16(unsigned short bits) { return __bfloat162float(__ushort_as_bfloat16(bits)); }
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

}  // namespace simt
