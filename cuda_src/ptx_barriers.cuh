// Barriers of a part of a block: mbarriers, which also count the bytes of copies, and named barriers. As in ptx.cuh,
// the body that the CPU runner executes stands beside the one that the GPU does.
#pragma once

namespace ptx {

// ---- mbarriers (8 bytes of shared memory, 8-byte aligned) --------------------------------------
CUPY_LORA_DEVICE void mbarrier_init(u64* barrier, u32 arrivals) {
#ifndef CUPY_LORA_SIMT
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
#else
    simt::mbarrier_init(barrier, arrivals);
#endif
}

// Makes this thread's mbarrier_init visible to the copy engine, and to the cluster once it arrives at its barrier.
CUPY_LORA_DEVICE void mbarrier_init_fence() {
#if !defined(CUPY_LORA_SIMT) && __CUDA_ARCH__ >= 900
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// Arrives, and adds `bytes` to what the current phase waits for.
CUPY_LORA_DEVICE void mbarrier_expect(u64* barrier, u32 bytes) {
#ifndef CUPY_LORA_SIMT
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
#else
    simt::mbarrier_expect(barrier, bytes);
#endif
}

// Arrives; what this thread wrote before is visible to those who wait.
CUPY_LORA_DEVICE void mbarrier_arrive(u64* barrier) {
#ifndef CUPY_LORA_SIMT
    asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(shared_address(barrier))
                 : "memory");
#else
    simt::mbarrier_expect(barrier, 0);
#endif
}

// Waits for the end of the phase of this parity; what was copied or written for it in this block is then visible.
CUPY_LORA_DEVICE void mbarrier_wait_block(u64* barrier, u32 parity) {
#ifndef CUPY_LORA_SIMT
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "WAIT_%=:\n"
#if __CUDA_ARCH__ >= 900
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"  // sleeps for a while
#else
        "mbarrier.test_wait.parity.shared.b64 done, [%0], %1;\n"
#endif
        "@!done bra WAIT_%=;\n"
        "}" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
#else
    simt::mbarrier_wait(barrier, parity);
#endif
}

// Waits for the end of the phase of this parity; what store_async wrote in it is then visible.
CUPY_LORA_DEVICE void mbarrier_wait(u64* barrier, u32 parity) {
#ifndef CUPY_LORA_SIMT
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "WAIT_%=:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra WAIT_%=;\n"
        "}" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
#else
    simt::mbarrier_wait(barrier, parity);
#endif
}

// ---- named barriers (1 to 15): `threads` of the block meet, of which those that only arrive do not wait
CUPY_LORA_DEVICE void barrier_meet(int barrier, int threads) {
#ifndef CUPY_LORA_SIMT
    asm volatile("barrier.cta.sync.aligned %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
#else
    simt::named_barrier(barrier, threads, true);
#endif
}

CUPY_LORA_DEVICE void barrier_arrive(int barrier, int threads) {
#ifndef CUPY_LORA_SIMT
    asm volatile("barrier.cta.arrive.aligned %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
#else
    simt::named_barrier(barrier, threads, false);
#endif
}

}  // namespace ptx
