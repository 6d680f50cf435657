"""An adapter on torch tensors: no copy, torch's current stream, in place."""

import torch

from cupy_lora import LoraBatch, LoraWeights, add_lora

device = "cuda" if torch.cuda.is_available() else "cpu"
weights = LoraWeights(2048, 8192, max_adapters=4, dtype="bfloat16", device=None if device == "cuda" else "cpu")
a = torch.randn(8, 2048, device=device) / 2048**0.5
b = torch.randn(8192, 8, device=device) / 8**0.5
weights.load(2, a, b, scale=2.0)

batch = LoraBatch(max_tokens=64, max_adapters=4, device=None if device == "cuda" else "cpu")
batch.update(torch.tensor([2, -1, 2], device=device))  # no synchronisation, whichever side the indices are on

base = torch.nn.Linear(2048, 8192, bias=False, device=device, dtype=torch.bfloat16)
x = torch.randn(3, 2048, device=device, dtype=torch.bfloat16)
with torch.no_grad():
    y = base(x)
    add_lora(y, x, weights, batch)
    merged = x.float() @ (base.weight.float() + 2.0 * b @ a).T
print("largest difference from the merged weight:", (y - merged)[[0, 2]].abs().max().item())
