"""NumPy semantics of every op, with the op's own signature: the oracle of the tests and the CPU path.

The functions trust their arguments: the public wrappers check them first.
"""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "bgmv_shrink": "lora",
    "bgmv_expand": "lora",
    "bgmv_expand_slice": "lora",
    "sgmv_shrink": "lora",
    "sgmv_expand": "lora",
    "sgmv_expand_slice": "lora",
    "add_lora": "lora",
    "rms_norm": "norm",
    "fused_add_rms_norm": "norm",
    "init_kv": "kv",
    "append_kv": "kv",
    "batch_prefill": "attention",
    "batch_decode": "attention",
    "block_tables_to_padded": "metadata",
    "block_tables_to_ragged": "metadata",
    "copy_next_input_ids_inplace": "metadata",
    "prepare_position_slot_ids": "metadata",
    "slots_filtering": "metadata",
}


def __getattr__(name: str) -> Any:
    module = _EXPORTS.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{module}", __name__), name)
    globals()[name] = value
    return value
