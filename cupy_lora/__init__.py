"""LoRA serving kernels for CuPy, torch (through DLPack), JAX and NumPy arrays, without torch.

Names are imported when first used: ``import cupy_lora`` itself imports neither CuPy, torch nor JAX
and works on a machine without a GPU or a driver.
"""

from __future__ import annotations

import importlib
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
    "slots_filtering": "metadata",
    "load_peft": "peft",
    "PeftAdapter": "peft",
}
_MODULES = ("dispatch", "punica_kernels", "reference")

__all__ = sorted([*_EXPORTS, *_MODULES, "__version__"])


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    module = _EXPORTS.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(f".{module}", __name__), name)
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{module}":
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r} in this version") from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
