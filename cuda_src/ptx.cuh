// The inline PTX of every kernel (barriers: ptx_barriers.cuh; Hopper alone: ptx_wgmma.cuh), each instruction behind a
// small named wrapper, with the body that the CPU runner executes beside the one that the GPU does. Pointers are
// generic; a wrapper converts them to the state space it needs.
#pragma once

namespace ptx {

#ifndef CUPY_LORA_SIMT
CUPY_LORA_DEVICE u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }
// Shared memory of a block of this cluster, as shared::cluster instructions take it.
using Remote = u32;
#else
using Remote = u64;
#endif

// ---- conversions ------------------------------------------------------------------------------
// Two floats to packed 16-bit floats, round to nearest even, `low` in the low half.
CUPY_LORA_DEVICE u32 bf16x2_from_floats(float low, float high) {
#ifndef CUPY_LORA_SIMT
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
#else
    return simt::bf16_bits(low) | static_cast<u32>(simt::bf16_bits(high)) << 16;
#endif
}

CUPY_LORA_DEVICE u32 f16x2_from_floats(float low, float high) {
#ifndef CUPY_LORA_SIMT
    u32 r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
#else
    return simt::f16_bits(low) | static_cast<u32>(simt::f16_bits(high)) << 16;
#endif
}

CUPY_LORA_DEVICE float float_from_f16(u16 bits) {
#ifndef CUPY_LORA_SIMT
    float r;
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(bits));
    return r;
#else
    return simt::float_from_f16(bits);
#endif
}

// Rounded to tf32 (11 significant bits, float's range), to nearest, ties away from zero.
CUPY_LORA_DEVICE float tf32_from_float(float v) {
#ifndef CUPY_LORA_SIMT
    u32 r;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(v));
    return __uint_as_float(r);
#else
    return simt::tf32(v);
#endif
}

// 2^v to about 2^-22 of the result (2^-inf = 0); subnormal results are flushed to zero.
CUPY_LORA_DEVICE float exp2_approx(float v) {
#ifndef CUPY_LORA_SIMT
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
#else
    return std::exp2(v);
#endif
}

// ---- tensor cores: c += a b, a 16 x k row-major, b k x 8 column-major, float32 accumulators ----
// Fragments as the PTX ISA lays them out: with g = lane / 4 and t = lane % 4,
//   a0, a1: rows g, g + 8 at k = 2t, 2t + 1; a2, a3: the same rows at k = 2t + 8, 2t + 9
//   b0: k = 2t, 2t + 1 of column g; b1: k = 2t + 8, 2t + 9 of column g
//   c0, c1: row g, columns 2t, 2t + 1; c2, c3: row g + 8
CUPY_LORA_DEVICE void mma_m16n8k16(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, bf16) {
#ifndef CUPY_LORA_SIMT
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
    simt::mma_m16n8k16_bf16(c, a0, a1, a2, a3, b0, b1);
#endif
}

CUPY_LORA_DEVICE void mma_m16n8k16(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, f16) {
#ifndef CUPY_LORA_SIMT
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
    simt::mma_m16n8k16_f16(c, a0, a1, a2, a3, b0, b1);
#endif
}

// tf32: a0, a1: rows g, g + 8 at k = t; a2, a3: at k = t + 4; b0: k = t of column g; b1: k = t + 4.
CUPY_LORA_DEVICE void mma_m16n8k8_tf32(float (&c)[4], float a0, float a1, float a2, float a3, float b0, float b1) {
#ifndef CUPY_LORA_SIMT
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)), "r"(__float_as_uint(a3)),
          "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
#else
    simt::mma_m16n8k8_tf32(c, a0, a1, a2, a3, b0, b1);
#endif
}

// Four 8 x 8 matrices of 16-bit elements from shared memory: lane 8 i + r passes the address of row r of
// matrix i (16 bytes, 16-byte aligned). With g = lane / 4 and t = lane % 4, r[i] holds row g, columns
// 2t and 2t + 1 of matrix i: the layout of the fragments above.
CUPY_LORA_DEVICE void load_matrices(u32 (&r)[4], const void* row) {
#ifndef CUPY_LORA_SIMT
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
#else
    simt::load_matrices(r, row, false, __LINE__);
#endif
}

// The same matrices transposed: r[i] holds rows 2t and 2t + 1 of column g.
CUPY_LORA_DEVICE void load_matrices_transposed(u32 (&r)[4], const void* row) {
#ifndef CUPY_LORA_SIMT
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
#else
    simt::load_matrices(r, row, true, __LINE__);
#endif
}

// ---- global loads ------------------------------------------------------------------------------
// 16 bytes that are read once by this block (weights): kept out of L1. 16-byte aligned, read-only for the whole launch.
CUPY_LORA_DEVICE uint4 load_once_16(const void* p) {
#ifndef CUPY_LORA_SIMT
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
#else
    return *static_cast<const uint4*>(p);
#endif
}

// One and two ints, where they stand in the program: a plain load may sink below a branch it could have overlapped.
CUPY_LORA_DEVICE int load_int(const void* p) {
#ifndef CUPY_LORA_SIMT
    int v;
    asm volatile("ld.global.s32 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
#else
    return *static_cast<const int*>(p);
#endif
}

CUPY_LORA_DEVICE int2 load_int2(const void* p) {
#ifndef CUPY_LORA_SIMT
    int2 v;
    asm volatile("ld.global.v2.s32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
    return v;
#else
    return *static_cast<const int2*>(p);
#endif
}

CUPY_LORA_DEVICE uint2 load_once_8(const void* p) {
#ifndef CUPY_LORA_SIMT
    uint2 v;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
    return v;
#else
    return *static_cast<const uint2*>(p);
#endif
}

// 16 bytes from L2, past this multiprocessor's L1: what another block wrote before its fence. It stays where it stands.
CUPY_LORA_DEVICE float4 load_fresh_16(const float* p) {
#ifndef CUPY_LORA_SIMT
    float4 v;
    asm volatile("ld.relaxed.gpu.global.v4.f32 {%0,%1,%2,%3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(p)
                 : "memory");
    return v;
#else
    return *reinterpret_cast<const float4*>(p);
#endif
}

// Orders this thread's accesses to global memory before the fence with those after it, for the whole GPU.
CUPY_LORA_DEVICE void fence_gpu() {
#ifndef CUPY_LORA_SIMT
    asm volatile("fence.acq_rel.gpu;" ::: "memory");
#endif
}

// ---- asynchronous copies global -> shared -------------------------------------------------------
// 16 bytes, both addresses 16-byte aligned; zeros are written instead where `valid` is false (and nothing is read).
CUPY_LORA_DEVICE void copy_async_16(void* shared, const void* global, bool valid) {
#ifndef CUPY_LORA_SIMT
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid ? 16 : 0)
                 : "memory");
#else
    simt::copy_async(shared, global, 16, valid ? 16 : 0);
#endif
}

CUPY_LORA_DEVICE void copy_async_16(void* shared, const void* global) {
#ifndef CUPY_LORA_SIMT
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
#else
    simt::copy_async(shared, global, 16, 16);
#endif
}

// Ends this thread's current group of copies.
CUPY_LORA_DEVICE void copy_async_commit() {
#ifndef CUPY_LORA_SIMT
    asm volatile("cp.async.commit_group;" ::: "memory");
#else
    simt::copy_async_commit();
#endif
}

// Waits until at most N of this thread's latest groups are still under way.
template <int N>
CUPY_LORA_DEVICE void copy_async_wait() {
#ifndef CUPY_LORA_SIMT
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#else
    simt::copy_async_wait(N);
#endif
}

// Once this thread's copies so far have landed, it arrives at the barrier (which counts this arrival).
CUPY_LORA_DEVICE void copy_async_arrive(u64* barrier) {
#ifndef CUPY_LORA_SIMT
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
#else
    simt::copy_async_arrive(barrier);
#endif
}

// A run of bytes by the copy engine (sm_90 on), in multiples of 16, first to leave L2. The barrier counts the bytes.
CUPY_LORA_DEVICE void copy_bulk(void* shared, const void* global, u32 bytes, u64* barrier) {
#ifndef CUPY_LORA_SIMT
    asm volatile(
        "{\n"
        ".reg .b64 policy;\n"
        "createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], "
        "policy;\n"
        "}" ::"r"(shared_address(shared)),
        "l"(global), "r"(bytes), "r"(shared_address(barrier))
        : "memory");
#else
    simt::copy_bulk(shared, global, bytes, barrier);
#endif
}

// Orders this thread's own accesses to shared memory before the fence with later bulk copies to it.
CUPY_LORA_DEVICE void fence_bulk() {
#ifndef CUPY_LORA_SIMT
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// ---- thread-block clusters (sm_90 on) ----------------------------------------------------------
// The split barrier. The arrive is relaxed: it orders nothing (the plain form is a full memory barrier ahead of the
// loads, 0.3 us); barriers initialised before it need mbarrier_init_fence, data goes through store_async.
CUPY_LORA_DEVICE void cluster_arrive_relaxed() {
#ifndef CUPY_LORA_SIMT
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#else
    simt::cluster_arrive();
#endif
}

CUPY_LORA_DEVICE void cluster_wait() {
#ifndef CUPY_LORA_SIMT
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
    simt::cluster_wait();
#endif
}

// The address in block `rank` of the cluster that corresponds to `shared` in this block.
CUPY_LORA_DEVICE Remote map_shared(const void* shared, u32 rank) {
#ifndef CUPY_LORA_SIMT
    u32 r;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(shared_address(shared)), "r"(rank));
    return r;
#else
    return simt::map_shared(shared, rank);
#endif
}

// 16 bytes into another block's shared memory; that block's barrier counts them as they land.
CUPY_LORA_DEVICE void store_async_16(Remote to, uint4 v, Remote barrier) {
#ifndef CUPY_LORA_SIMT
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1,%2,%3,%4}, [%5];" ::"r"(to),
                 "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(barrier)
                 : "memory");
#else
    simt::store_async(to, &v, 16, barrier);
#endif
}

// Launches overlap (_jit.py). begin_launch, the first statement of every kernel, waits until the launch before is done
// and its writes are seen; start_next lets the next one's blocks start, which wait there in turn. sm_90 on.
CUPY_LORA_DEVICE void start_next() {
#if !defined(CUPY_LORA_SIMT) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

CUPY_LORA_DEVICE void begin_launch(bool starts_next = true) {
#if !defined(CUPY_LORA_SIMT) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    if (starts_next) start_next();
}

}  // namespace ptx
