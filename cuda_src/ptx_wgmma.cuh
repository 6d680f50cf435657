// Warpgroup matrix products (sm_90a) and what goes with them: matrix descriptors, register quotas. As in
// ptx.cuh, the body that the CPU runner executes stands beside the one that the GPU does.
//
// c += a b with a 64 x 16, b 16 x N, float32 accumulators. All 128 threads of a warpgroup take part; warp w (of its
// four) holds the rows 16 w .. 16 w + 15 as mma.sync's 16-row fragments (ptx.cuh): c[n] are the 8 columns from 8 n on.
#pragma once
#include "common.cuh"

namespace ptx {

// ---- matrices in shared memory ------------------------------------------------------------------
// Rows of 128 bytes (64 elements), whose 16-byte pieces are permuted: piece p of row r lies at p ^ (r % 8). Groups of
// 8 rows (1024 bytes, at a multiple of 1024) follow each other. Wider matrices are panels of such rows.
CUPY_LORA_DEVICE u8* align_shared(u8* p) {
#ifndef CUPY_LORA_SIMT
    return p + (-shared_address(p) & 1023u);
#else
    return p + (-simt::shared_address(p) & 1023u);
#endif
}

// The address as descriptors have it, in units of 16 bytes.
CUPY_LORA_DEVICE u64 matrix_address(const void* p) {
#ifndef CUPY_LORA_SIMT
    return shared_address(p) >> 4 & 0x3fffu;
#else
    return simt::shared_address(p) >> 4 & 0x3fffu;
#endif
}

// Bits 0-13 the address, 16-29 the leading and 32-45 the stride offset, all in units of 16 bytes; 62-63 the permutation
// (1: of 128-byte rows). What is added to the address of a descriptor may be added to the descriptor, in those units.
//
// Rows are rows of a, or columns of b, and k runs along them: 32 bytes a product. The stride is that of 8 rows.
CUPY_LORA_DEVICE u64 matrix_along_k(const void* p) { return matrix_address(p) | 1ull << 16 | 64ull << 32 | 1ull << 62; }

// b with a row for each k and the columns along it: 16 rows a product. The stride is that of 8 rows; the leading offset
// that of the panels of 64 columns.
CUPY_LORA_DEVICE u64 matrix_across_k(const void* p, u32 panel_bytes) {
    return matrix_address(p) | static_cast<u64>(panel_bytes >> 4) << 16 | 64ull << 32 | 1ull << 62;
}

// ---- order --------------------------------------------------------------------------------------
// Orders accesses of registers before it with products after it.
CUPY_LORA_DEVICE void wgmma_fence() {
#ifndef CUPY_LORA_SIMT
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
    simt::wgmma_fence(__LINE__);
#endif
}

// Ends the current group of products.
CUPY_LORA_DEVICE void wgmma_commit() {
#ifndef CUPY_LORA_SIMT
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
    simt::wgmma_commit(__LINE__);
#endif
}

// Waits until at most N of the latest groups are still under way.
template <int N>
CUPY_LORA_DEVICE void wgmma_wait() {
#ifndef CUPY_LORA_SIMT
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
#else
    simt::wgmma_wait(N, __LINE__);
#endif
}

// The compiler takes accumulators for known once a product is issued: between its wait and their next use, and between
// their last use and the next product, this keeps it from moving their uses across.
template <int N>
CUPY_LORA_DEVICE void wgmma_hold(float (&c)[N][4]) {
#ifndef CUPY_LORA_SIMT
#pragma unroll
    for (int n = 0; n < N; ++n) asm volatile("" : "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])::"memory");
#endif
}

// Orders what is in shared memory, by this thread or as a barrier told it, with products after it: they read shared
// memory another way than threads write it (the async proxy), in stores and in cp.async.
CUPY_LORA_DEVICE void wgmma_fence_shared() {
#ifndef CUPY_LORA_SIMT
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#else
    simt::proxy_fence();
#endif
}

// The same for registers that a product reads: held after its wait, nothing else is put there before (the assembler
// would move the wait ahead of what is).
template <int N>
CUPY_LORA_DEVICE void wgmma_hold(u32 (&a)[N][4]) {
#ifndef CUPY_LORA_SIMT
#pragma unroll
    for (int n = 0; n < N; ++n) asm volatile("" : "+r"(a[n][0]), "+r"(a[n][1]), "+r"(a[n][2]), "+r"(a[n][3])::"memory");
#endif
}

// What `v` is computed from stays ahead of a wait that follows. The assembler moves a wait up, and arithmetic down, to
// the last branch between them: this is a branch that needs `v`, and is never taken for one that is not below 0.
CUPY_LORA_DEVICE void stay_ahead(float v) {
#ifndef CUPY_LORA_SIMT
    asm volatile("{\n.reg .pred below;\nsetp.lt.f32 below, %0, 0f00000000;\n@below nanosleep.u32 0;\n}" ::"f"(v)
                 : "memory");
#endif
}

// Registers a thread of this warpgroup has from here on; all of its warps come here. A multiple of 8.
template <int N>
CUPY_LORA_DEVICE void take_registers() {
#ifndef CUPY_LORA_SIMT
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
#endif
}

template <int N>
CUPY_LORA_DEVICE void leave_registers() {
#ifndef CUPY_LORA_SIMT
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
#endif
}

// ---- products -----------------------------------------------------------------------------------
// Operands of an asm statement cannot be made by templates; these list accumulators, by eights of columns.
#define CUPY_LORA_ACC_1(c, n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define CUPY_LORA_ACC_4(c, n) \
    CUPY_LORA_ACC_1(c, n), CUPY_LORA_ACC_1(c, n + 1), CUPY_LORA_ACC_1(c, n + 2), CUPY_LORA_ACC_1(c, n + 3)
#define CUPY_LORA_ACC_8(c) CUPY_LORA_ACC_4(c, 0), CUPY_LORA_ACC_4(c, 4)
#define CUPY_LORA_ACC_12(c) CUPY_LORA_ACC_8(c), CUPY_LORA_ACC_4(c, 8)
#define CUPY_LORA_ACC_16(c) CUPY_LORA_ACC_12(c), CUPY_LORA_ACC_4(c, 12)
#define CUPY_LORA_NAMES_32                                                                                            \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%" \
    "30,%31"
#define CUPY_LORA_NAMES_48 CUPY_LORA_NAMES_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define CUPY_LORA_NAMES_64 CUPY_LORA_NAMES_48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
// Both matrices from shared memory, k along the rows of both; `add`: whether c counts, or is overwritten.
#define CUPY_LORA_WGMMA_SHARED(shape, type, names, a, b, add)                                                     \
    "{\n.reg .pred add;\nsetp.ne.b32 add, " add ", 0;\nwgmma.mma_async.sync.aligned." shape ".f32." type "." type \
    " {" names "}, " a ", " b ", add, 1, 1, 0, 0;\n}"
// a from registers, b with the columns along its rows.
#define CUPY_LORA_WGMMA_MIXED(shape, type, names, a, b)                                                                \
    "{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\nwgmma.mma_async.sync.aligned." shape ".f32." type "." type " {" names \
    "}, {" a "}, " b ", add, 1, 1, 1;\n}"

CUPY_LORA_DEVICE void wgmma_along_k(float (&c)[8][4], u64 a, u64 b, bool add, bf16) {
#ifndef CUPY_LORA_SIMT
    asm volatile(CUPY_LORA_WGMMA_SHARED("m64n64k16", "bf16", CUPY_LORA_NAMES_32, "%32", "%33", "%34")
                 : CUPY_LORA_ACC_8(c)
                 : "l"(a), "l"(b), "r"(static_cast<int>(add)));
#else
    simt::wgmma(c[0], 8, nullptr, a, b, add, true, __LINE__);
#endif
}

CUPY_LORA_DEVICE void wgmma_along_k(float (&c)[8][4], u64 a, u64 b, bool add, f16) {
#ifndef CUPY_LORA_SIMT
    asm volatile(CUPY_LORA_WGMMA_SHARED("m64n64k16", "f16", CUPY_LORA_NAMES_32, "%32", "%33", "%34")
                 : CUPY_LORA_ACC_8(c)
                 : "l"(a), "l"(b), "r"(static_cast<int>(add)));
#else
    simt::wgmma(c[0], 8, nullptr, a, b, add, false, __LINE__);
#endif
}

CUPY_LORA_DEVICE void wgmma_along_k(float (&c)[12][4], u64 a, u64 b, bool add, bf16) {
#ifndef CUPY_LORA_SIMT
    asm volatile(CUPY_LORA_WGMMA_SHARED("m64n96k16", "bf16", CUPY_LORA_NAMES_48, "%48", "%49", "%50")
                 : CUPY_LORA_ACC_12(c)
                 : "l"(a), "l"(b), "r"(static_cast<int>(add)));
#else
    simt::wgmma(c[0], 12, nullptr, a, b, add, true, __LINE__);
#endif
}

CUPY_LORA_DEVICE void wgmma_along_k(float (&c)[12][4], u64 a, u64 b, bool add, f16) {
#ifndef CUPY_LORA_SIMT
    asm volatile(CUPY_LORA_WGMMA_SHARED("m64n96k16", "f16", CUPY_LORA_NAMES_48, "%48", "%49", "%50")
                 : CUPY_LORA_ACC_12(c)
                 : "l"(a), "l"(b), "r"(static_cast<int>(add)));
#else
    simt::wgmma(c[0], 12, nullptr, a, b, add, false, __LINE__);
#endif
}

CUPY_LORA_DEVICE void wgmma_along_k(float (&c)[16][4], u64 a, u64 b, bool add, bf16) {
#ifndef CUPY_LORA_SIMT
    asm volatile(CUPY_LORA_WGMMA_SHARED("m64n128k16", "bf16", CUPY_LORA_NAMES_64, "%64", "%65", "%66")
                 : CUPY_LORA_ACC_16(c)
                 : "l"(a), "l"(b), "r"(static_cast<int>(add)));
#else
    simt::wgmma(c[0], 16, nullptr, a, b, add, true, __LINE__);
#endif
}

CUPY_LORA_DEVICE void wgmma_along_k(float (&c)[16][4], u64 a, u64 b, bool add, f16) {
#ifndef CUPY_LORA_SIMT
    asm volatile(CUPY_LORA_WGMMA_SHARED("m64n128k16", "f16", CUPY_LORA_NAMES_64, "%64", "%65", "%66")
                 : CUPY_LORA_ACC_16(c)
                 : "l"(a), "l"(b), "r"(static_cast<int>(add)));
#else
    simt::wgmma(c[0], 16, nullptr, a, b, add, false, __LINE__);
#endif
}

// a[0], a[1]: rows g, g + 8 at k = 2t, 2t + 1; a[2], a[3]: at k = 2t + 8, 2t + 9. They stay as they are until the wait.
CUPY_LORA_DEVICE void wgmma_across_k(float (&c)[8][4], const u32 (&a)[4], u64 b, bf16) {
#ifndef CUPY_LORA_SIMT
    asm volatile(CUPY_LORA_WGMMA_MIXED("m64n64k16", "bf16", CUPY_LORA_NAMES_32, "%32,%33,%34,%35", "%36")
                 : CUPY_LORA_ACC_8(c)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#else
    simt::wgmma(c[0], 8, a, 0, b, true, true, __LINE__);
#endif
}

CUPY_LORA_DEVICE void wgmma_across_k(float (&c)[8][4], const u32 (&a)[4], u64 b, f16) {
#ifndef CUPY_LORA_SIMT
    asm volatile(CUPY_LORA_WGMMA_MIXED("m64n64k16", "f16", CUPY_LORA_NAMES_32, "%32,%33,%34,%35", "%36")
                 : CUPY_LORA_ACC_8(c)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#else
    simt::wgmma(c[0], 8, a, 0, b, true, false, __LINE__);
#endif
}

CUPY_LORA_DEVICE void wgmma_across_k(float (&c)[16][4], const u32 (&a)[4], u64 b, bf16) {
#ifndef CUPY_LORA_SIMT
    asm volatile(CUPY_LORA_WGMMA_MIXED("m64n128k16", "bf16", CUPY_LORA_NAMES_64, "%64,%65,%66,%67", "%68")
                 : CUPY_LORA_ACC_16(c)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#else
    simt::wgmma(c[0], 16, a, 0, b, true, true, __LINE__);
#endif
}

CUPY_LORA_DEVICE void wgmma_across_k(float (&c)[16][4], const u32 (&a)[4], u64 b, f16) {
#ifndef CUPY_LORA_SIMT
    asm volatile(CUPY_LORA_WGMMA_MIXED("m64n128k16", "f16", CUPY_LORA_NAMES_64, "%64,%65,%66,%67", "%68")
                 : CUPY_LORA_ACC_16(c)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#else
    simt::wgmma(c[0], 16, a, 0, b, true, false, __LINE__);
#endif
}

#undef CUPY_LORA_ACC_1
#undef CUPY_LORA_ACC_4
#undef CUPY_LORA_ACC_8
#undef CUPY_LORA_ACC_12
#undef CUPY_LORA_ACC_16
#undef CUPY_LORA_NAMES_32
#undef CUPY_LORA_NAMES_48
#undef CUPY_LORA_NAMES_64
#undef CUPY_LORA_WGMMA_SHARED
#undef CUPY_LORA_WGMMA_MIXED

}  // namespace ptx
