// One small kernel for each group of wrappers in ptx.cuh and ptx_barriers.cuh: tests/test_ptx.py runs them on the CPU
// and on the GPU.
#include "common.cuh"

extern "C" __global__ void halves_from_floats(const float* in, u32* bf16x2, u32* f16x2, float* tf32, i32 n) {
    ptx::begin_launch();
    const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= n) return;
    bf16x2[i] = ptx::bf16x2_from_floats(in[2 * i], in[2 * i + 1]);
    f16x2[i] = ptx::f16x2_from_floats(in[2 * i], in[2 * i + 1]);
    tf32[2 * i] = ptx::tf32_from_float(in[2 * i]);
    tf32[2 * i + 1] = ptx::tf32_from_float(in[2 * i + 1]);
}

extern "C" __global__ void floats_from_f16(const u16* in, float* out) {
    ptx::begin_launch();
    const u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    out[i] = ptx::float_from_f16(in[i]);
}

// C (16 x 8) += A (16 x 16) B (16 x 8), all row-major here; the fragments are cut by the table in the PTX ISA.
template <class Half>
CUPY_LORA_DEVICE void multiply(const u16* a, const u16* b, float* c) {
    const int lane = static_cast<int>(threadIdx.x), g = lane / 4, t = lane % 4;
    const auto pair = [](u16 low, u16 high) { return static_cast<u32>(low) | static_cast<u32>(high) << 16; };
    const auto of_a = [&](int row, int k) { return pair(a[row * 16 + k], a[row * 16 + k + 1]); };
    const auto of_b = [&](int k) { return pair(b[k * 8 + g], b[(k + 1) * 8 + g]); };
    float* const rows[2] = {c + g * 8 + 2 * t, c + (g + 8) * 8 + 2 * t};
    float sum[4] = {rows[0][0], rows[0][1], rows[1][0], rows[1][1]};
    ptx::mma_m16n8k16(sum, of_a(g, 2 * t), of_a(g + 8, 2 * t), of_a(g, 2 * t + 8), of_a(g + 8, 2 * t + 8), of_b(2 * t),
                      of_b(2 * t + 8), Half{});
    rows[0][0] = sum[0], rows[0][1] = sum[1], rows[1][0] = sum[2], rows[1][1] = sum[3];
}

extern "C" __global__ void mma_bf16(const u16* a, const u16* b, float* c) {
    ptx::begin_launch();
    multiply<bf16>(a, b, c);
}

extern "C" __global__ void mma_f16(const u16* a, const u16* b, float* c) {
    ptx::begin_launch();
    multiply<f16>(a, b, c);
}

// C (16 x 8) += A (16 x 8) B (8 x 8).
extern "C" __global__ void mma_tf32(const float* a, const float* b, float* c) {
    ptx::begin_launch();
    const int lane = static_cast<int>(threadIdx.x), g = lane / 4, t = lane % 4;
    float* const rows[2] = {c + g * 8 + 2 * t, c + (g + 8) * 8 + 2 * t};
    float sum[4] = {rows[0][0], rows[0][1], rows[1][0], rows[1][1]};
    ptx::mma_m16n8k8_tf32(sum, a[g * 8 + t], a[(g + 8) * 8 + t], a[g * 8 + t + 4], a[(g + 8) * 8 + t + 4], b[t * 8 + g],
                          b[(t + 4) * 8 + g]);
    rows[0][0] = sum[0], rows[0][1] = sum[1], rows[1][0] = sum[2], rows[1][1] = sum[3];
}

extern "C" __global__ void load_once(const uint4* in, uint4* out) {
    ptx::begin_launch();
    const u32 i = threadIdx.x;
    out[i] = ptx::load_once_16(in + i);
    uint2 halves[2] = {ptx::load_once_8(reinterpret_cast<const uint2*>(in + 32 + i)),
                       ptx::load_once_8(reinterpret_cast<const uint2*>(in + 32 + i) + 1)};
    out[32 + i] = make_uint4(halves[0].x, halves[0].y, halves[1].x, halves[1].y);
}

// in: 32 pairs; out: the pairs, then their first halves.
extern "C" __global__ void load_ints(const i32* in, i32* out) {
    ptx::begin_launch();
    const u32 i = threadIdx.x;
    const int2 pair = ptx::load_int2(in + 2 * i);
    out[2 * i] = pair.x, out[2 * i + 1] = pair.y;
    out[64 + i] = ptx::load_int(in + 2 * i);
}

// A ring of three stages over `steps` rows of blockDim.x vectors; rows from `valid` on come as zeros.
extern "C" __global__ void copy_async(const uint4* in, uint4* out, i32 steps, i32 valid) {
    ptx::begin_launch();
    CUPY_LORA_SHARED(shared);
    uint4* const ring = reinterpret_cast<uint4*>(shared);
    const int width = static_cast<int>(blockDim.x), tid = static_cast<int>(threadIdx.x);
    const auto fetch = [&](int step) {
        uint4* const to = ring + step % 3 * width + tid;
        if (step < steps && step % 2)
            ptx::copy_async_16(to, in + static_cast<i64>(step) * width + tid, step < valid);
        else if (step < valid)
            ptx::copy_async_16(to, in + static_cast<i64>(step) * width + tid);
        else if (step < steps)
            ptx::copy_async_16(to, nullptr, false);
        ptx::copy_async_commit();
    };
    fetch(0);
    fetch(1);
    for (int step = 0; step < steps; ++step) {
        ptx::copy_async_wait<1>();
        __syncthreads();  // everyone's part of this step has landed, and everyone has left the stage fetched next
        fetch(step + 2);
        out[static_cast<i64>(step) * width + tid] = ring[step % 3 * width + (tid + 1) % width];
    }
}

// One warp brings `steps` rows of 32 vectors through a ring of two stages, another reads and clears them.
template <bool BULK>
CUPY_LORA_DEVICE void relay(u8* shared, const uint4* in, uint4* out, i32 steps, i32 valid) {
    uint4* const ring = reinterpret_cast<uint4*>(shared);  // [2][32]
    u64* const full = reinterpret_cast<u64*>(shared + 1024);
    u64* const empty = full + 2;
    const u32 lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; ++i) {
            ptx::mbarrier_init(full + i, BULK ? 1 : 32);
            ptx::mbarrier_init(empty + i, 1);
        }
        ptx::mbarrier_init_fence();
    }
    __syncthreads();
    for (i32 step = 0; step < steps; ++step) {
        const int slot = step % 2;
        const u32 parity = static_cast<u32>(step / 2 % 2);
        uint4* const stage = ring + slot * 32;
        if (threadIdx.x < 32) {
            ptx::mbarrier_wait_block(empty + slot, parity ^ 1);
            const uint4* const row = in + static_cast<i64>(step) * 32;
            if constexpr (BULK) {
                if (lane == 0) {
                    ptx::mbarrier_expect(full + slot, 512);
                    ptx::copy_bulk(stage, row, 512, full + slot);
                }
            } else {
                ptx::copy_async_16(stage + lane, row + lane, step < valid);
                ptx::copy_async_arrive(full + slot);
            }
        } else {
            ptx::mbarrier_wait_block(full + slot, parity);
            out[static_cast<i64>(step) * 32 + lane] = stage[(lane + 1) % 32];
            __syncwarp();
            stage[lane] = make_uint4(0, 0, 0, 0);
            if constexpr (BULK) ptx::fence_bulk();
            __syncwarp();
            if (lane == 0) ptx::mbarrier_arrive(empty + slot);
        }
    }
}

extern "C" __global__ void relay_pieces(const uint4* in, uint4* out, i32 steps, i32 valid) {
    ptx::begin_launch();
    CUPY_LORA_SHARED(shared);
    relay<false>(shared, in, out, steps, valid);
}

extern "C" __global__ void powers_of_two(const float* in, float* out) {
    ptx::begin_launch();
    const u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    out[i] = ptx::exp2_approx(in[i]);
}

// Four matrices of 8 x 8, row after row, as each lane gets them: straight, then transposed.
extern "C" __global__ void matrices(const uint4* in, u32* out) {
    ptx::begin_launch();
    CUPY_LORA_SHARED(shared);
    uint4* const rows = reinterpret_cast<uint4*>(shared);
    const u32 lane = threadIdx.x;
    rows[lane] = in[lane];
    __syncwarp();
    u32 straight[4], transposed[4];
    ptx::load_matrices(straight, rows + lane);
    ptx::load_matrices_transposed(transposed, rows + lane);
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        out[i * 32 + lane] = straight[i];
        out[128 + i * 32 + lane] = transposed[i];
    }
}

// Every block leaves its number in its four; the last to arrive adds them up, whichever it is.
extern "C" __global__ void last_adds(float* parts, i32* arrived, float* out) {
    ptx::begin_launch();
    CUPY_LORA_SHARED(shared);
    i32& before = *reinterpret_cast<i32*>(shared);
    if (threadIdx.x == 0) {
        reinterpret_cast<float4*>(parts)[blockIdx.x] = make_float4(1.f, 2.f, static_cast<float>(blockIdx.x + 1), 4.f);
        ptx::fence_gpu();
        before = atomicAdd(arrived, 1);
    }
    __syncthreads();
    if (before != static_cast<i32>(gridDim.x) - 1 || threadIdx.x != 0) return;
    ptx::fence_gpu();
    float sum = 0.f;
    for (u32 i = 0; i < gridDim.x; ++i) sum += ptx::load_fresh_16(parts + i * 4).z;
    *out = sum;
    *arrived = 0;
}

#ifdef BLOCKS  // compute capability 9.0
extern "C" __global__ void relay_bulk(const uint4* in, uint4* out, i32 steps, i32 valid) {
    ptx::begin_launch();
    CUPY_LORA_SHARED(shared);
    relay<true>(shared, in, out, steps, valid);
}

// Each block sends its row of `in` to every block of the cluster, `rounds` times over; `out` is, for each
// block and round, the rows of all blocks as they arrived there.
extern "C" __global__ void CUPY_LORA_CLUSTER(BLOCKS) exchange(const uint4* in, uint4* out, i32 rounds) {
    ptx::begin_launch();
    CUPY_LORA_SHARED(shared);
    u64* const barriers = reinterpret_cast<u64*>(shared);
    uint4* const received = reinterpret_cast<uint4*>(shared + 128);  // [2][BLOCKS][width]
    const u32 width = blockDim.x, tid = threadIdx.x, block = blockIdx.x % BLOCKS;
    if (tid == 0) {
        ptx::mbarrier_init(barriers, 1);
        ptx::mbarrier_init(barriers + 1, 1);
        ptx::mbarrier_init_fence();
    }
    ptx::cluster_arrive_relaxed();
    ptx::cluster_wait();
    for (int round = 0; round < rounds; ++round) {
        const u32 half = static_cast<u32>(round) & 1;
        uint4* const rows = received + half * BLOCKS * width;
        if (tid == 0) ptx::mbarrier_expect(barriers + half, BLOCKS * width * 16);
        for (u32 peer = 0; peer < BLOCKS; ++peer) {
            uint4 v = in[block * width + tid];
            v.x += static_cast<u32>(round);
            ptx::store_async_16(ptx::map_shared(rows + block * width + tid, peer), v,
                                ptx::map_shared(barriers + half, peer));
        }
        ptx::mbarrier_wait(barriers + half, static_cast<u32>(round) >> 1 & 1);
        for (u32 i = 0; i < BLOCKS; ++i) {
            out[((block * static_cast<u32>(rounds) + static_cast<u32>(round)) * BLOCKS + i) * width + tid] =
                rows[i * width + tid];
        }
        __syncthreads();  // the half is written again two rounds on, after every block has sent in between
    }
}
#endif

// Reads what the launch before wrote, and lets the next one start first.
extern "C" __global__ void add_one(int* values, int count) {
    ptx::begin_launch(false);
    ptx::start_next();
    const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < count) values[i] += 1;
}

// Three parts of a block: the first two change what the other wrote, in turns, the second first; the third takes it.
extern "C" __global__ void turns(i32* out, i32 rounds) {
    ptx::begin_launch();
    CUPY_LORA_SHARED(memory);
    i32* const at = reinterpret_cast<i32*>(memory);
    const int part = static_cast<int>(threadIdx.x) / 64, thread = static_cast<int>(threadIdx.x) % 64;
    if (part == 2) {
        ptx::barrier_meet(3, 192);
        out[thread] = at[thread];
        return;
    }
    if (part == 0) {
        at[thread] = thread;
        ptx::barrier_arrive(2, 128);
    }
    i32& value = at[part == 0 ? thread : 63 - thread];
    for (i32 round = 0; round < rounds; ++round) {
        ptx::barrier_meet(1 + part, 128);
        value = value * 3 + part + 1;
        ptx::barrier_arrive(2 - part, 128);
    }
    if (part == 1) ptx::barrier_meet(2, 128);
    ptx::barrier_arrive(3, 192);
}
