"""The shared memory that a LoRA kernel is launched with is what its code lays out, to the byte."""

from __future__ import annotations

import nvrtc
import pytest

from cupy_lora import _lora_plan
from cupy_lora._arrays import BFLOAT16
from cupy_lora.dispatch import LoraConfig

CONFIGS = {
    "direct-1x8": LoraConfig("direct", 8, 1, 8, 2),
    "direct-2x4": LoraConfig("direct", 8, 2, 4, 2),
    "direct-4x8": LoraConfig("direct", 8, 4, 8, 2),
    "direct-4x16": LoraConfig("direct", 8, 4, 16, 1),
    "direct-8x4": LoraConfig("direct", 8, 8, 4, 2),
    "direct-8x8": LoraConfig("direct", 8, 8, 8, 1),
    "direct-16x4": LoraConfig("direct", 8, 16, 4, 1),
    "ring-16-rows": LoraConfig("ring", 16, 1, 8, 6),
    "ring-8-blocks": LoraConfig("ring", 16, 8, 8, 4),
    "ring-32-rows": LoraConfig("ring", 32, 2, 8, 3),
    "ring-16-warps": LoraConfig("ring", 32, 2, 16, 3),
    "ring-64-rows": LoraConfig("ring", 64, 1, 16, 3),
}
RANKS = [(4,), (16,), (24,), (64,), (72,), (128,), (100,), (8, 16, 32, 64), (24, 40, 48), (64, 12, 3)]

UNIT = """
#include "lora_direct.cuh"
#if TILE_ROWS > 8
#include "lora_ring.cuh"
#endif
constexpr CUPY_LORA_DEVICE int larger(int a, int b) { return a > b ? a : b; }
constexpr int kOwn = kPartsBytes + 8 * kChunk * 4, kV = 8 * (kMaxRank + 4) * 4;
#if TILE_ROWS > 8
constexpr int kAll = 128 + kTableBytes + kReceivedBytes + kRingRemoteBytes +
                     larger(ring_bytes(), kOwn + kKeptBytes + kV);
#else
constexpr int kAll = 128 + kReceivedBytes + kOwn + kKeptBytes +
                     larger(widest_staged() > 0 ? kWarps * STAGES * kStageBytes : 0, kV);
#endif
template <int kLaidOut, int kLaunched>
struct Same {
    static_assert(kLaidOut == kLaunched, "laid out, launched with");
};
extern "C" __global__ void unit(int* size) { *size = sizeof(Same<kAll, SHARED>); }
"""


@pytest.mark.parametrize("in_features", [4096, 9600])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("ranks", RANKS, ids=lambda ranks: "+".join(map(str, ranks)))
def test_shared_memory_is_what_the_code_lays_out(ranks: tuple[int, ...], config: str, in_features: int) -> None:
    form, widths = CONFIGS[config], (4096,)
    coded = _lora_plan.coded_ranks(frozenset(ranks), form, in_features, widths)
    kernel = _lora_plan._layer_kernel(form, BFLOAT16, BFLOAT16, in_features, widths, coded, 1, 1)
    assert nvrtc.compile_source(UNIT, "sizes.cu", (*nvrtc.options(kernel, 90), f"-DSHARED={kernel.shared}")) == ""
