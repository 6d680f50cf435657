"""A Llama-shaped model over NumPy or CuPy arrays, for the demo: plain, whole, and the same code in every dtype.

Weights are float32 (holding values of the dtype they are served in). Activations have the dtype of the :class:`Ops`;
every matrix product, norm, rotation and softmax runs in float32 and is rounded once when it is stored. bfloat16 arrays
are only passed on, cut and reshaped: CuPy computes with them, and copies them, in part and depending on its release.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ._arrays import BFLOAT16, FLOAT32
from .peft import read_safetensors

Xp = Any  # the module numpy or cupy
XpArray = Any  # an array of it

# The fused projections of a layer: the block they are in and the modules that are their slices.
GROUPS = {
    "qkv": ("self_attn", ("q_proj", "k_proj", "v_proj")),
    "o": ("self_attn", ("o_proj",)),
    "gate_up": ("mlp", ("gate_proj", "up_proj")),
    "down": ("mlp", ("down_proj",)),
}


@dataclass(frozen=True)
class LlamaConfig:
    """The entries of config.json that the model needs."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_llama3: tuple[float, float, float, float] | None = None  # factor, low and high frequency factor, context
    tie_word_embeddings: bool = False

    def widths(self, group: str) -> tuple[int, tuple[int, ...]]:
        """Input width and output width of each slice of a fused projection."""
        query, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return {
            "qkv": (self.hidden_size, (query, kv, kv)),
            "o": (query, (self.hidden_size,)),
            "gate_up": (self.hidden_size, (self.intermediate_size, self.intermediate_size)),
            "down": (self.intermediate_size, (self.hidden_size,)),
        }[group]

    def module_names(self, layer: int, group: str) -> tuple[str, ...]:
        """Names of the modules that are the slices of a fused projection."""
        block, names = GROUPS[group]
        return tuple(f"model.layers.{layer}.{block}.{name}" for name in names)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of the checkpoint."""
        hidden = self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, hidden)}
        for layer in range(self.num_hidden_layers):
            for group in GROUPS:
                width, slices = self.widths(group)
                for name, out in zip(self.module_names(layer, group), slices, strict=True):
                    shapes[f"{name}.weight"] = (out, width)
            shapes[f"model.layers.{layer}.input_layernorm.weight"] = (hidden,)
            shapes[f"model.layers.{layer}.post_attention_layernorm.weight"] = (hidden,)
        shapes["model.norm.weight"] = (hidden,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes

    def inverse_frequencies(self) -> np.ndarray:
        """``(head_dim / 2,)`` float64: radians per position of each pair of the rotary embedding."""
        freqs = self.rope_theta ** (-np.arange(0, self.head_dim, 2, dtype=np.float64) / self.head_dim)
        if self.rope_llama3 is None:
            return freqs
        factor, low, high, context = self.rope_llama3
        turns = context * freqs / (2 * math.pi)  # of the pair over the context it was trained on
        smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return (1 - smooth) * freqs / factor + smooth * freqs


def read_config(path: Path) -> LlamaConfig:
    """Read the config.json of a Llama checkpoint; ValueError for a model of another shape."""
    try:
        content = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path / 'config.json'}: expected the config of a model, got: {error}") from error

    def refuse(key: str, expected: object, got: object) -> ValueError:
        return ValueError(f"{path / 'config.json'}: {key}: expected {expected}, got {got!r}")

    plain = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    for key, expected in {**plain, "quantization_config": None}.items():
        if content.get(key, None if key == "model_type" else expected) != expected:
            raise refuse(key, expected, content.get(key))
    rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    llama3 = None
    if kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        llama3 = (float(rope[names[0]]), float(rope[names[1]]), float(rope[names[2]]), float(rope[names[3]]))
    elif kind != "default":
        raise refuse("rope_scaling", "default or llama3", kind)
    try:
        heads = int(content["num_attention_heads"])
        return LlamaConfig(
            vocab_size=int(content["vocab_size"]),
            hidden_size=int(content["hidden_size"]),
            intermediate_size=int(content["intermediate_size"]),
            num_hidden_layers=int(content["num_hidden_layers"]),
            num_attention_heads=heads,
            num_key_value_heads=int(content.get("num_key_value_heads") or heads),
            head_dim=int(content.get("head_dim") or content["hidden_size"] // heads),
            rms_norm_eps=float(content.get("rms_norm_eps", 1e-6)),
            rope_theta=float(rope.get("rope_theta", content.get("rope_theta", 10000.0))),
            rope_llama3=llama3,
            tie_word_embeddings=bool(content.get("tie_word_embeddings", False)),
        )
    except KeyError as error:
        raise refuse(str(error.args[0]), "a number", None) from error


def read_tensors(path: Path, config: LlamaConfig) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint in Hugging Face's layout, in one file or in shards.

    Raises
    ------
    ValueError
        If a file or a tensor is missing, a tensor has another shape, or one is there that the model does not use.
    """
    index = path / "model.safetensors.index.json"
    if index.is_file():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        files = ["model.safetensors"]
    tensors: dict[str, np.ndarray] = {}
    for file in files:
        tensors.update(read_safetensors(path / file))
    for name, shape in config.tensor_shapes().items():
        if name not in tensors:
            raise ValueError(f"{path}: {name}: expected a tensor of shape {shape}, got none")
        if tensors[name].shape != shape:
            raise ValueError(f"{path}: {name}: expected shape {shape}, got {tensors[name].shape}")
    spare = set(tensors) - set(config.tensor_shapes())
    if config.tie_word_embeddings:
        spare.discard("lm_head.weight")
    unknown = sorted(name for name in spare if not name.endswith("rotary_emb.inv_freq"))
    if unknown:
        raise ValueError(f"{path}: expected the tensors of a Llama model, got {unknown[0]} too")
    return tensors


def to_float32(xp: Xp, x: XpArray) -> XpArray:
    """Widen to float32."""
    if x.dtype == BFLOAT16:
        return (x.view(xp.uint16).astype(xp.uint32) << xp.uint32(16)).view(xp.float32)
    return x.astype(xp.float32, copy=False)


def from_float32(xp: Xp, x: XpArray, dtype: np.dtype[Any]) -> XpArray:
    """Round float32 to ``dtype``, to nearest, ties to even."""
    if dtype != BFLOAT16:
        return x.astype(dtype, copy=False)
    bits = x.view(xp.uint32)
    rounded = (bits + xp.uint32(0x7FFF) + ((bits >> xp.uint32(16)) & xp.uint32(1))) >> xp.uint32(16)
    # The carry of the rounding would turn a NaN of all ones into a zero.
    return xp.where(xp.isnan(x), xp.uint32(0x7FC0), rounded).astype(xp.uint16).view(BFLOAT16)


@dataclass
class Layer:
    """One decoder layer's weights, float32: ``weight[group]`` is ``(sum of the slices' widths, in)``."""

    weight: dict[str, XpArray]
    input_norm: XpArray
    post_norm: XpArray


@dataclass
class Llama:
    """The weights, on the device of ``xp``, float32 but rounded to the dtype they are served in."""

    config: LlamaConfig
    xp: Xp
    embed: XpArray
    layers: list[Layer]
    norm: XpArray
    head: XpArray

    @classmethod
    def read(cls, path: Path, xp: Xp, dtype: np.dtype[Any]) -> Llama:
        """Read a checkpoint and round its weights to ``dtype``."""
        config = read_config(path)
        tensors = read_tensors(path, config)

        def take(*names: str) -> XpArray:
            parts = [to_float32(np, tensors.pop(f"{name}.weight")) for name in names]
            whole = xp.asarray(parts[0] if len(parts) == 1 else np.concatenate(parts))
            return to_float32(xp, from_float32(xp, whole, dtype))

        embed = take("model.embed_tokens")
        layers = [
            Layer(
                {group: take(*config.module_names(i, group)) for group in GROUPS},
                take(f"model.layers.{i}.input_layernorm"),
                take(f"model.layers.{i}.post_attention_layernorm"),
            )
            for i in range(config.num_hidden_layers)
        ]
        norm = take("model.norm")
        head = embed if config.tie_word_embeddings else take("lm_head")
        return cls(config, xp, embed, layers, norm, head)


class KvCache:
    """Keys (rotated) and values of a sequence, float32: per layer two ``(capacity, num_kv_heads, head_dim)`` arrays."""

    def __init__(self, config: LlamaConfig, capacity: int, xp: Xp) -> None:
        shape = (config.num_hidden_layers, 2, capacity, config.num_key_value_heads, config.head_dim)
        self.layers = xp.zeros(shape, xp.float32)
        self.length = 0


@dataclass
class Batch:
    """The new tokens of several sequences, one after another: a whole prompt or one decoded token each."""

    tokens: XpArray  # (n,) int64
    sequences: Sequence[Any]  # what Ops.open gave
    bounds: Sequence[int]  # (len(sequences) + 1,): the rows of sequence i are bounds[i] .. bounds[i + 1]


class Ops:
    """The operations of the model in one dtype, in plain NumPy or CuPy; a subclass replaces them by the library's."""

    def __init__(self, model: Llama, dtype: np.dtype[Any] = FLOAT32) -> None:
        self.model, self.config, self.xp, self.dtype = model, model.config, model.xp, dtype
        self.frequencies = self.xp.asarray(self.config.inverse_frequencies())

    def widen(self, x: XpArray) -> XpArray:
        return to_float32(self.xp, x)

    def store(self, x: XpArray) -> XpArray:
        return from_float32(self.xp, x, self.dtype)

    def open(self, capacity: int) -> Any:
        """A new sequence, without tokens yet, that will have at most ``capacity``."""
        return KvCache(self.config, capacity, self.xp)

    def close(self, sequence: Any) -> None:
        """The sequence is done."""

    def length(self, sequence: Any) -> int:
        """Tokens of the sequence so far."""
        return int(sequence.length)

    def begin(self, batch: Batch) -> None:
        """Prepare what the layers of one step share; the sequences now count their new tokens."""
        angles = self.positions(batch)[:, None] * self.frequencies[None, :]
        self.cos = self.xp.cos(angles).astype(self.xp.float32)[:, None, :]
        self.sin = self.xp.sin(angles).astype(self.xp.float32)[:, None, :]
        self.grow(batch)

    def positions(self, batch: Batch) -> XpArray:
        """``(n,)`` integers: the position of each new token in its sequence."""
        counts = np.diff(batch.bounds).tolist()
        starts = [self.length(sequence) for sequence in batch.sequences]
        parts = [np.arange(start, start + count) for start, count in zip(starts, counts, strict=True)]
        return self.xp.asarray(np.concatenate(parts))

    def grow(self, batch: Batch) -> None:
        """Count the new tokens."""
        for i, sequence in enumerate(batch.sequences):
            sequence.length += batch.bounds[i + 1] - batch.bounds[i]

    def write_kv(self, k: XpArray, v: XpArray, layer: int, batch: Batch) -> None:
        """Store the new tokens' keys and values, ``(n, num_kv_heads, head_dim)``, behind those of their sequences."""
        k, v = self.widen(k), self.widen(v)
        for i, sequence in enumerate(batch.sequences):
            start, stop = batch.bounds[i], batch.bounds[i + 1]
            rows = slice(sequence.length - (stop - start), sequence.length)
            sequence.layers[layer, 0, rows], sequence.layers[layer, 1, rows] = k[start:stop], v[start:stop]

    def read_kv(self, sequence: Any, layer: int) -> tuple[XpArray, XpArray]:
        """All keys and values of a sequence: ``(length, num_kv_heads, head_dim)`` each, float32."""
        keys, values = sequence.layers[layer]
        return keys[: sequence.length], values[: sequence.length]

    def rms_norm(self, x: XpArray, weight: XpArray) -> XpArray:
        wide = self.widen(x)
        mean = (wide * wide).mean(axis=-1, keepdims=True)
        return self.store(wide / self.xp.sqrt(mean + self.xp.float32(self.config.rms_norm_eps)) * weight)

    def add_rms_norm(self, x: XpArray, residual: XpArray, weight: XpArray) -> tuple[XpArray, XpArray]:
        """``residual + x``, and the norm of that."""
        total = self.store(self.widen(residual) + self.widen(x))
        return total, self.rms_norm(total, weight)

    def weight(self, layer: int, group: str) -> XpArray:
        return self.model.layers[layer].weight[group]

    def linear(self, x: XpArray, layer: int, group: str) -> XpArray:
        """``(n, in) -> (n, sum of the slices' widths)``."""
        return self.store(self.widen(x) @ self.weight(layer, group).T)

    def silu_mul(self, gate_up: XpArray) -> XpArray:
        half = self.config.intermediate_size
        gate, up = self.widen(gate_up[:, :half]), self.widen(gate_up[:, half:])
        # The sigmoid by tanh: exp(-gate) would overflow.
        return self.store(gate * self.xp.float32(0.5) * (1 + self.xp.tanh(gate * self.xp.float32(0.5))) * up)

    def rotate(self, x: XpArray) -> XpArray:
        """Rotary embedding of ``(n, heads, head_dim)``, pairs half a head apart."""
        wide = self.widen(x)
        half = self.config.head_dim // 2
        first, second = wide[..., :half], wide[..., half:]
        rotated = (first * self.cos - second * self.sin, second * self.cos + first * self.sin)
        return self.store(self.xp.concatenate(rotated, axis=-1))

    def attention(self, qkv: XpArray, layer: int, batch: Batch) -> XpArray:
        """Store the new keys and values, then attend causally to all of each sequence: ``(n, heads * head_dim)``."""
        config = self.config
        heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        n = qkv.shape[0]
        split = qkv.reshape(n, heads + 2 * kv_heads, dim)
        q, k = self.rotate(split[:, :heads]), self.rotate(split[:, heads : heads + kv_heads])
        v = split[:, heads + kv_heads :]
        self.write_kv(k, v, layer, batch)
        return self.attend(q, layer, batch).reshape(n, heads * dim)

    def attend(self, q: XpArray, layer: int, batch: Batch) -> XpArray:
        """Causal attention of rotated queries ``(n, heads, head_dim)`` to all keys of their sequences."""
        q = self.widen(q)
        out = self.xp.empty(q.shape, self.xp.float32)
        for i, sequence in enumerate(batch.sequences):
            start, stop = batch.bounds[i], batch.bounds[i + 1]
            out[start:stop] = self._attend(q[start:stop], *self.read_kv(sequence, layer))
        return self.store(out)

    def _attend(self, q: XpArray, keys: XpArray, values: XpArray) -> XpArray:
        """One sequence, float32: its last tokens over all of its keys, query heads grouped by their key head."""
        xp = self.xp
        n, heads, dim = q.shape
        total, kv_heads, _ = keys.shape
        grouped = q.reshape(n, kv_heads, heads // kv_heads, dim).transpose(1, 2, 0, 3)
        keys, values = keys.transpose(1, 2, 0)[:, None], values.transpose(1, 0, 2)[:, None]
        scores = grouped @ keys * xp.float32(1 / math.sqrt(dim))
        if n > 1:
            seen = xp.arange(total)[None, :] <= xp.arange(total - n, total)[:, None]
            scores = xp.where(seen, scores, xp.float32(-np.inf))
        weights = xp.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        return (weights @ values).transpose(2, 0, 1, 3).reshape(n, heads, dim)


def forward(ops: Ops, batch: Batch, rows: XpArray) -> XpArray:
    """One step over a batch of sequences, which grow by their new tokens.

    Parameters
    ----------
    ops : Ops
    batch : Batch
    rows : array of int64
        Rows of the batch whose logits are wanted.

    Returns
    -------
    array
        ``(len(rows), vocab_size)`` float32.
    """
    model = ops.model
    ops.begin(batch)
    hidden = ops.store(model.embed[batch.tokens])
    norms = [*(layer.input_norm for layer in model.layers[1:]), model.norm]  # what follows each layer
    normed = ops.rms_norm(hidden, model.layers[0].input_norm)
    for i, (layer, next_norm) in enumerate(zip(model.layers, norms, strict=True)):
        attended = ops.attention(ops.linear(normed, i, "qkv"), i, batch)
        hidden, normed = ops.add_rms_norm(ops.linear(attended, i, "o"), hidden, layer.post_norm)
        gated = ops.silu_mul(ops.linear(normed, i, "gate_up"))
        hidden, normed = ops.add_rms_norm(ops.linear(gated, i, "down"), hidden, next_norm)
    return ops.widen(normed)[rows] @ model.head.T
