"""LoRA serving kernels for CuPy, torch (through DLPack), JAX and NumPy arrays, without torch.

Names are imported when first used: ``import cupy_lora`` itself imports neither CuPy, torch nor JAX
and works on a machine without a GPU or a driver.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

__version__ = "0.1.0"

# Where each public name lives. A name maps to the module of that name where the two are the same.
_EXPORTS = {
    "bgmv_shrink": "bgmv",
    "bgmv_expand": "bgmv",
    "bgmv_expand_slice": "bgmv",
    "sgmv_shrink": "sgmv",
    "sgmv_expand": "sgmv",
    "sgmv_expand_slice": "sgmv",
    "LoraWeights": "lora_weights",
    "LoraBatch": "lora_batch",
    "add_lora": "lora",
    "rms_norm": "norm",
    "fused_add_rms_norm": "norm",
    "init_kv": "paged_kv",
    "append_kv": "paged_kv",
    "PagedKvCache": "kv_cache",
    "batch_prefill": "attention",
    "batch_decode": "attention",
    "has_gpu_kernels": "metadata",
    "has_triton": "metadata",
    "block_tables_to_padded": "metadata",
    "block_tables_to_ragged": "metadata",
    "copy_next_input_ids_inplace": "metadata",
    "prepare_position_slot_ids": "metadata",
    "prepare_decode_step": "metadata",
    "slots_filtering": "metadata",
    "load_peft": "peft",
    "PeftAdapter": "peft",
    "warmup": "_warmup",
}
_MODULES = ("dispatch", "punica_kernels", "reference")

_PRESENT = {module.name for module in pkgutil.iter_modules(__path__)}

__all__ = sorted(
    {name for name, module in _EXPORTS.items() if module in _PRESENT} | (set(_MODULES) & _PRESENT) | {"__version__"}
)


def __getattr__(name: str) -> Any:
    module = _EXPORTS.get(name, name if name in _MODULES else None)
    if module not in _PRESENT:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = importlib.import_module(f".{module}", __name__)
    if name in _EXPORTS:
        value = getattr(value, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
