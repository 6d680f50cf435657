"""An adapter on JAX arrays: x is read where it is, by DLPack; the output is a CuPy or NumPy array."""

import jax
import jax.numpy as jnp
import numpy as np

from cupy_lora import LoraBatch, LoraWeights, add_lora

on_gpu = jax.default_backend() == "gpu"
if on_gpu:
    import cupy as xp
else:
    xp = np
device = None if on_gpu else "cpu"

key_x, key_a, key_b = jax.random.split(jax.random.key(0), 3)
weights = LoraWeights(1024, 512, max_adapters=2, dtype="float16", device=device)
a, b = jax.random.normal(key_a, (4, 1024)) / 32, jax.random.normal(key_b, (512, 4)) / 2
weights.load(0, a, b, scale=1.5)

batch = LoraBatch(max_tokens=16, max_adapters=2, device=device)
batch.update(jnp.array([0, -1, 0]))

x = jax.random.normal(key_x, (3, 1024), jnp.float16).block_until_ready()
y = xp.zeros((3, 512), np.float16)  # JAX's own arrays cannot be written
add_lora(y, x, weights, batch)
delta = jnp.from_dlpack(y)  # back to JAX, again without a copy
print("largest difference:", abs(delta - 1.5 * (x @ a.T) @ b.T)[jnp.array([0, 2])].max())
