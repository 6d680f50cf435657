"""Figures of record: what the best kernels reach on one NVIDIA H200, and what this library must reach.

GPU microseconds, bfloat16, cold (rotating buffers), measured on driver 580.159, CUDA 13.0, torch 2.11,
2026-11-20. They hold for this kind of machine; elsewhere compare ratios from one run.
"""

from __future__ import annotations

from dataclasses import dataclass

MACHINE = "NVIDIA H200, driver 580.159, CUDA 13.0"
COPY_TBPS = 4.28
READ_TBPS = 4.56
EMPTY_KERNEL_US = 0.69


@dataclass(frozen=True)
class Figure:
    """One row of record.

    Attributes
    ----------
    target : float
        What must be reached, microseconds.
    best : float or None
        The best peer measured, microseconds.
    peers : dict
        Every peer measured, microseconds.
    read : float or None
        A kernel that only reads the fewest bytes, microseconds.
    """

    target: float
    best: float | None = None
    read: float | None = None
    peers: tuple[tuple[str, float], ...] = ()


_LORA_PEERS = ("LoRAX Triton", "LoRAX CUDA", "vLLM 0.33", "SGLang csgmv", "SGLang triton_v2", "torch loop")


def _lora(read: float, target: float, *peers: float | None) -> Figure:
    named = tuple((name, us) for name, us in zip(_LORA_PEERS, peers, strict=True) if us is not None)
    return Figure(target, min(us for _, us in named), read, named)


# Keyed by the case names of bench_lora.
LORA: dict[str, Figure] = {
    "decode 1 r16 one": _lora(1.8, 2.8, 6.0, 7.2, 9.1, 14.3, 8.8, 9.4),
    "decode 8 r16 distinct": _lora(2.9, 3.2, 6.9, 8.7, 10.4, 15.0, 9.7, 64),
    "decode 8 r16 one": _lora(1.9, 3.3, 6.5, 8.0, 8.2, 14.7, 9.3, 9.5),
    "decode 64 r8 distinct": _lora(4.1, 5.3, 22.3, 12.8, 62.6, 23.0, 17.5, 608),
    "decode 64 r16 distinct": _lora(5.9, 7.2, 17.9, 17.1, 39.6, 23.4, 16.7, 599),
    "decode 64 r16 uniform 8": _lora(3.3, 4.1, 17.5, 15.9, 10.9, 16.7, 10.6, 178),
    "decode 64 r16 zipf": _lora(3.4, 4.3, 17.6, 15.6, 11.5, 17.7, 10.5, 147),
    "decode 64 r16 one": _lora(2.5, 3.6, 17.6, 15.4, 9.1, 16.8, 10.2, 9.9),
    "decode 64 r64 distinct": _lora(17.7, 19.7, 39.9, 29.5, 87.0, 64.3, 29.9, 613),
    "decode 64 r64 uniform 8": _lora(4.1, 5.6, 38.5, 25.2, 17.5, 21.3, 13.7, 179),
    "decode 256 r16 distinct": _lora(18.0, 21, 55.0, 45.6, 124, 53.9, 47.0, 2417),
    "decode 256 r16 uniform 16": _lora(4.2, 5.8, 54.0, 40.8, 24.2, 25.0, 12.5, 511),
    "decode 256 r64 distinct": _lora(62.4, 68, 145, 97.9, 196, 236, 84.5, 2433),
    "decode 64 r16 distinct 4096->4096+1024+1024": _lora(10.7, 13.5, 54.3, 40.8, 269, 30.8, 26.7, 1814),
    "decode 64 r16 distinct 4096->14336+14336": _lora(20.4, 25, 43.6, 67.9, 534, 78.4, 39.6, 1239),
    "prefill 512 r16": _lora(4.8, 6.4, 17.2, None, 20.5, 32.4, 16.5, 13.5),
    "prefill 2048 r16": _lora(13.5, 15.5, 32.8, None, 34.3, 80.8, 26.8, 53.5),
    "prefill 8192 r16": _lora(47.3, 53, 112, None, 143, 281, 78.8, 216),
    "prefill 8192 r64": _lora(49.9, 62, 199, None, 206, 561, 88.5, 216),
}

# Bytes of record (megabytes) of the rows above: the accounting of bench_lora must agree.
LORA_MB: dict[str, float] = dict(
    zip(
        LORA,
        (0.3, 2.3, 0.5, 10.0, 18.4, 3.7, 3.9, 1.8, 68.7, 10.0, 73.4, 10.5, 275, 39.8, 83.4, 12.8, 51.4, 206, 218),
        strict=True,
    )
)

# A batch without an adapter in it; a mixed-rank batch: factor and addend over its own 1-read.
LORA_NO_ADAPTER = 1.2
LORA_MIXED_OVER_READ = (1.25, 1.0)
# The schedule: (tokens up to, microseconds).
LORA_SCHEDULE = ((256, 3.0), (8192, 6.0))

_NORM_PEERS = ("torch", "Liger", "FlashInfer", "LoRAX CUDA")


def _norm(target: float, *peers: float) -> Figure:
    return Figure(target, min(peers), None, tuple(zip(_NORM_PEERS, peers, strict=True)))


# Keyed by (rows, columns).
NORM: dict[tuple[int, int], Figure] = {
    (1, 4096): _norm(1.9, 5.73, 1.98, 2.15, 2.25),
    (64, 4096): _norm(2.3, 6.76, 2.45, 2.59, 2.69),
    (2048, 4096): _norm(9.8, 13.1, 10.7, 13.1, 12.0),
    (8192, 4096): _norm(33.5, 42.6, 34.4, 44.8, 39.5),
}

# Keyed by tokens appended.
KV_APPEND: dict[int, Figure] = {
    64: Figure(2.8, 3.35, None, (("FlashInfer 0.7.2", 3.35),)),
    2048: Figure(6.0, 6.78, None, (("FlashInfer 0.7.2", 6.78),)),
}

# Keyed by (function, batch).
METADATA: dict[tuple[str, int], Figure] = {
    ("block_tables_to_ragged", 64): Figure(2.5, 9.93, None, (("LoRAX", 9.93),)),
    ("block_tables_to_ragged", 256): Figure(4.0, 12.1, None, (("LoRAX", 12.1),)),
    ("block_tables_to_padded", 64): Figure(1.54, 1.54, None, (("LoRAX", 1.54),)),
    ("block_tables_to_padded", 256): Figure(3.52, 3.52, None, (("LoRAX", 3.52),)),
    ("copy_next_input_ids_inplace", 64): Figure(1.33, 1.33, None, (("LoRAX", 1.33),)),
    ("copy_next_input_ids_inplace", 256): Figure(1.41, 1.41, None, (("LoRAX", 1.41),)),
    ("prepare_position_slot_ids decode", 64): Figure(1.18, 1.18, None, (("LoRAX", 1.18),)),
    ("prepare_position_slot_ids decode", 256): Figure(1.26, 1.26, None, (("LoRAX", 1.26),)),
    ("prepare_position_slot_ids prefill", 64): Figure(1.75, 1.75, None, (("LoRAX", 1.75),)),
    ("prepare_position_slot_ids prefill", 256): Figure(3.64, 3.64, None, (("LoRAX", 3.64),)),
    ("slots_filtering", 64): Figure(1.68, 1.68, None, (("LoRAX", 1.68),)),
    ("slots_filtering", 256): Figure(2.28, 2.28, None, (("LoRAX", 2.28),)),
}

# Keyed by case name; "rope" inside the kernel may cost 1.25 times these.
ATTENTION: dict[str, Figure] = {
    "decode 64 context 1024": Figure(72, 72.8, None, (("FlashInfer 0.7.2", 72.8),)),
    "decode 64 context 8192": Figure(485, 495, None, (("FlashInfer 0.7.2", 495),)),
    "prefill 8 x 1024": Figure(
        250, 151.6, None, (("FlashInfer FA3", 183.5), ("FlashInfer FA2", 254), ("torch SDPA, contiguous KV", 151.6))
    ),
}
ATTENTION_ROPE_FACTOR = 1.25
# Decode of one sequence of 131072 tokens: the least share of the copy bandwidth.
LONG_DECODE_OF_COPY = 0.7

# Eager host microseconds per call.
HOST_ADD_LORA = {"cupy": 10.0, "torch": 12.0}
HOST_METADATA = 8.0
HOST_PEERS = {
    "add_lora": (("LoRAX", 52.0), ("vLLM", 100.0), ("SGLang", 41.0)),
    "LoraBatch.update": (("vLLM", 174.0), ("SGLang", 100.0)),
}

# Milliseconds: first call of an op.
FIRST_CALL_COLD_MS = 500.0
FIRST_CALL_CACHED_MS = 50.0
START_TO_RESULT_MS = 300.0
