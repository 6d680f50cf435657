"""Make the demo's adapters with the PEFT library, and what PEFT itself computes with them.

    python -m venv /tmp/peft && /tmp/peft/bin/pip install torch==2.13.0 peft==0.21.2 transformers==5.23.0 ml_dtypes
    PYTHONPATH=. /tmp/peft/bin/python tests/data/make_adapters.py

writes cupy_lora/data/adapters/ (which the package carries for its demo) and tests/data/expected.json: per adapter every
module's rank and scale as PEFT's layers hold them, and the float32 logits of transformers' own Llama after a prompt.
"""

import json
import shutil
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM

from cupy_lora.demo import ADAPTERS, write_demo_model

EXPECTED = Path(__file__).parent / "expected.json"
PROMPT = list(b"Which way to the station?")
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# name -> dtype it is stored in, and its LoraConfig
CONFIGS = {
    "rank4-fp32": (torch.float32, {"r": 4, "lora_alpha": 8, "target_modules": ALL}),
    "rank8-qv-bf16": (torch.bfloat16, {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}),
    "rank8-regex-fp32": (
        torch.float32,
        {"r": 8, "lora_alpha": 12, "target_modules": r".*\.layers\.1\.(self_attn\.(q|k|v|o)|mlp\.(up|down))_proj"},
    ),
    "rank16-pattern-bf16": (
        torch.bfloat16,
        {
            "r": 16,
            "lora_alpha": 32,
            "target_modules": ALL,
            "rank_pattern": {"down_proj": 8, r"layers\.0\.self_attn\.[kv]_proj": 32},
            "alpha_pattern": {r"layers.1.mlp.up_proj": 12, "^model.layers.0.self_attn.q_proj": 20},
        },
    ),
    "rank64-rslora-bf16": (torch.bfloat16, {"r": 64, "lora_alpha": 8, "target_modules": ALL, "use_rslora": True}),
}


def main() -> None:
    torch.manual_seed(0)
    expected = {}
    with tempfile.TemporaryDirectory() as scratch:
        write_demo_model(Path(scratch))

        def base():
            return LlamaForCausalLM.from_pretrained(scratch, dtype=torch.float32, attn_implementation="eager").eval()

        expected["bare"] = {"logits": logits(base())}
        shutil.rmtree(ADAPTERS, ignore_errors=True)
        for name, (dtype, settings) in CONFIGS.items():
            model = get_peft_model(base(), LoraConfig(task_type="CAUSAL_LM", **settings))
            config = model.peft_config["default"]
            config.base_model_name_or_path = "demo-llama"
            if isinstance(config.target_modules, set):
                config.target_modules = sorted(config.target_modules)  # a set's order differs from run to run
            for key, weight in model.named_parameters():
                if "lora_A" in key:
                    torch.nn.init.uniform_(weight, -((3 / weight.shape[1]) ** 0.5), (3 / weight.shape[1]) ** 0.5)
                elif "lora_B" in key:
                    # An update about 0.4 times as large as the weight it is added to.
                    module = model.get_submodule(key.split(".lora_B")[0])
                    spread = 0.4 / module.scaling["default"] / weight.shape[1] ** 0.5
                    torch.nn.init.uniform_(weight, -spread * 3**0.5, spread * 3**0.5)
            for module in model.modules():
                if hasattr(module, "lora_A"):
                    module.to(dtype)
            model.save_pretrained(ADAPTERS / name)
            (ADAPTERS / name / "README.md").unlink()  # a model card to fill in
            (ADAPTERS / name / "adapter_model.safetensors").chmod(0o644)

            loaded = PeftModel.from_pretrained(base(), ADAPTERS / name)
            layers = {
                key.removeprefix("base_model.model."): {"rank": module.r["default"], "scale": module.scaling["default"]}
                for key, module in loaded.named_modules()
                if hasattr(module, "lora_A")
            }
            expected[name] = {"modules": layers, "logits": logits(loaded.merge_and_unload().float())}
    rows = ",\n".join(f'"{name}": {json.dumps(value)}' for name, value in expected.items())
    EXPECTED.write_text(f'{{\n"prompt": {json.dumps(PROMPT)},\n{rows}\n}}\n', encoding="utf-8")


def logits(model: torch.nn.Module) -> list[float]:
    with torch.no_grad():
        row = model(torch.tensor([PROMPT])).logits[0, -1]
    return [float(f"{value:.7g}") for value in row.tolist()]


if __name__ == "__main__":
    main()
