"""The demo's own checkpoint: a small Llama with random weights, the same bits on every machine."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import numpy as np

from ._arrays import BFLOAT16
from ._llama import LlamaConfig
from .peft import safetensors_package

ADAPTERS = Path(__file__).resolve().parent / "data" / "adapters"

DEMO_CONFIG = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=64,
)


def demo_tensors() -> dict[str, np.ndarray]:
    """The demo checkpoint's tensors, bfloat16: the same bits on every machine."""
    draw = np.random.Generator(np.random.PCG64(20240229))
    tensors = {}
    for name, shape in DEMO_CONFIG.tensor_shapes().items():
        uniform = (draw.random(shape) * 2 - 1) * np.sqrt(3.0)  # variance 1
        if len(shape) == 1:
            value = 1 + 0.1 * uniform
        elif name == "model.embed_tokens.weight":
            value = uniform
        else:
            value = uniform / np.sqrt(shape[1])
        tensors[name] = value.astype(np.float32).astype(BFLOAT16)
    tensors["lm_head.weight"] = (tensors["lm_head.weight"].astype(np.float32) * 3).astype(BFLOAT16)
    return tensors


def write_demo_model(path: Path) -> None:
    """Write the demo checkpoint in Hugging Face's layout, unless it is there."""
    if (path / "config.json").is_file():
        return
    safetensors = safetensors_package()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "bfloat16",
    }
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        config[name] = getattr(DEMO_CONFIG, name)
    for name in ("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "tie_word_embeddings"):
        config[name] = getattr(DEMO_CONFIG, name)
    path.mkdir(parents=True, exist_ok=True)
    # The config comes last and by a rename: a run that was cut short leaves no model that looks whole.
    with tempfile.TemporaryDirectory(dir=path) as scratch:
        safetensors.numpy.save_file(demo_tensors(), Path(scratch) / "model", metadata={"format": "pt"})
        (Path(scratch) / "config").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (Path(scratch) / "model").replace(path / "model.safetensors")
        (Path(scratch) / "config").replace(path / "config.json")


def cache_folder() -> Path:
    """Where the demo keeps its checkpoint: ``cupy_lora`` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cupy_lora"
