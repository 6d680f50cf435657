"""Two adapters of different ranks in one batch, over CuPy arrays (NumPy's on a machine without a GPU)."""

import numpy as np

from cupy_lora import LoraBatch, LoraWeights, add_lora, has_gpu_kernels

if has_gpu_kernels():
    import cupy as xp
else:
    xp = np

outs = (4096, 1024, 1024)  # q, k and v, fused into one row
weights = LoraWeights(4096, outs, max_adapters=8, dtype="float16")
draw = np.random.default_rng(0)
for slot, rank in (0, 16), (1, 64):
    a = [draw.standard_normal((rank, 4096)) / 64 for _ in outs]
    b = [draw.standard_normal((out, rank)) / 8 for out in outs]
    weights.load(slot, a, b, scale=0.5)  # alpha / r; any float dtype, from the host or the device

batch = LoraBatch(max_tokens=256, max_adapters=8)
batch.update(np.array([0, 1, 1, -1]))  # the adapter of each token, in any order; -1: none

x = xp.asarray(draw.standard_normal((4, 4096)).astype(np.float16))
y = xp.zeros((4, sum(outs)), np.float16)  # what the base projection gave
add_lora(y, x, weights, batch)  # one launch, in place
print(abs(y).max(axis=1))
