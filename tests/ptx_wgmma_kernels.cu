// One small kernel for each group of wrappers in ptx_wgmma.cuh: tests/test_ptx_wgmma.py runs them on the CPU and on the
// GPU (compute capability 9.0).
#include "ptx_wgmma.cuh"

// Rows of `width` elements to permuted rows of 128 bytes, panel after panel of 64 columns.
CUPY_LORA_DEVICE void stage(u8* to, const u16* from, int rows, int width) {
    for (int i = static_cast<int>(threadIdx.x); i < rows * width / 8; i += static_cast<int>(blockDim.x)) {
        const int row = i / (width / 8), piece = i % (width / 8);
        u8* const at = to + (piece / 8 * rows + row) * 128 + (piece % 8 ^ row % 8) * 16;
        *reinterpret_cast<uint4*>(at) = reinterpret_cast<const uint4*>(from)[i];
    }
}

template <int N>
CUPY_LORA_DEVICE void load(float (&c)[N][4], const float* from) {
    const int thread = static_cast<int>(threadIdx.x) % 128, g = thread / 32 * 16 + thread % 32 / 4, t = thread % 4;
    for (int n = 0; n < N; ++n) {
        for (int i = 0; i < 4; ++i) c[n][i] = from[(g + i / 2 * 8) * N * 8 + n * 8 + 2 * t + i % 2];
    }
}

template <int N>
CUPY_LORA_DEVICE void store(const float (&c)[N][4], float* to) {
    const int thread = static_cast<int>(threadIdx.x) % 128, g = thread / 32 * 16 + thread % 32 / 4, t = thread % 4;
    for (int n = 0; n < N; ++n) {
        for (int i = 0; i < 4; ++i) to[(g + i / 2 * 8) * N * 8 + n * 8 + 2 * t + i % 2] = c[n][i];
    }
}

// C (64 x 8 EIGHTS) = A (64 x DEPTH) B^T, B (8 EIGHTS x DEPTH), and C += that again where `twice`.
extern "C" __global__ void __launch_bounds__(128) along_k(const u16* a, const u16* b, float* c, i32 twice) {
    ptx::begin_launch();
    CUPY_LORA_SHARED(memory);
    u8* const left = ptx::align_shared(memory);
    u8* const right = left + 64 * DEPTH * 2;
    stage(left, a, 64, DEPTH);
    stage(right, b, EIGHTS * 8, DEPTH);
    __syncthreads();
    ptx::wgmma_fence_shared();
    float sum[EIGHTS][4];
    load(sum, c);
    ptx::wgmma_hold(sum);
    ptx::wgmma_fence();
    for (int round = 0; round <= twice; ++round) {
#pragma unroll
        for (int k = 0; k < DEPTH; k += 16) {
            const u64 of_a = ptx::matrix_along_k(left + k / 64 * 64 * 128);
            const u64 of_b = ptx::matrix_along_k(right + k / 64 * EIGHTS * 8 * 128);
            ptx::wgmma_along_k(sum, of_a + k % 64 / 8, of_b + k % 64 / 8, k > 0 || round > 0, ELEMENT{});
        }
        ptx::wgmma_commit();
    }
    ptx::wgmma_wait<0>();
    ptx::wgmma_hold(sum);
    store(sum, c);
}

#if EIGHTS % 8 == 0  // whole panels of 64 columns
// C (64 x 8 EIGHTS) += A (64 x DEPTH) B, B (DEPTH x 8 EIGHTS); the second half of k as a group of its own, which is
// waited for once the first is done.
extern "C" __global__ void __launch_bounds__(128) across_k(const u16* a, const u16* b, float* c) {
    ptx::begin_launch();
    CUPY_LORA_SHARED(memory);
    u8* const right = ptx::align_shared(memory);
    stage(right, b, DEPTH, EIGHTS * 8);
    __syncthreads();
    ptx::wgmma_fence_shared();
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int g = static_cast<int>(threadIdx.x) / 32 * 16 + lane / 4, t = lane % 4;
    u32 words[DEPTH / 16][4];
    for (int k = 0; k < DEPTH / 16; ++k) {
        for (int i = 0; i < 4; ++i) {
            const u16* const from = a + (g + i % 2 * 8) * DEPTH + k * 16 + i / 2 * 8 + 2 * t;
            words[k][i] = from[0] | static_cast<u32>(from[1]) << 16;
        }
    }
    float sum[EIGHTS][4];
    load(sum, c);
    ptx::wgmma_hold(sum);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < DEPTH / 16; ++k) {
        if (k == DEPTH / 32) ptx::wgmma_commit();
        ptx::wgmma_across_k(sum, words[k], ptx::matrix_across_k(right, DEPTH * 128) + k * 128, ELEMENT{});
    }
    ptx::wgmma_commit();
    ptx::stay_ahead(static_cast<float>(lane));
    ptx::wgmma_wait<1>();
    ptx::wgmma_wait<0>();
    ptx::wgmma_hold(sum);
    ptx::wgmma_hold(words);
    store(sum, c);
}
#endif

// Two warpgroups and a third of fewer registers: the first two write in turns, which the third checks.
extern "C" __global__ void __launch_bounds__(384, 1) turns(i32* out, i32 rounds) {
    ptx::begin_launch();
    CUPY_LORA_SHARED(memory);
    i32* const at = reinterpret_cast<i32*>(memory);
    const int group = static_cast<int>(threadIdx.x) / 128, thread = static_cast<int>(threadIdx.x) % 128;
    if (group == 2) {
        ptx::leave_registers<24>();
        ptx::barrier_meet(3, 384);
        out[thread] = at[thread];
    } else {
        ptx::take_registers<240>();
        if (group == 0) {
            at[thread] = thread;
            ptx::barrier_arrive(2, 256);  // the second goes first
        }
        i32& value = at[group == 0 ? thread : 127 - thread];
        for (i32 round = 0; round < rounds; ++round) {
            ptx::barrier_meet(1 + group, 256);
            value = value * 3 + group + 1;
            ptx::barrier_arrive(2 - group, 256);
        }
        if (group == 1) ptx::barrier_meet(2, 256);
        ptx::barrier_arrive(3, 384);
    }
}
